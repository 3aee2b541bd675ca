#!/usr/bin/env python
"""Compare the losses of runs that should be the same: another layout, precision, kernel or machine, the same start and data.

    tools/compare_runs.py runs/one_gpu runs/ulysses4 runs/ring4 --out docs/benchmarks/layouts
    tools/compare_runs.py a/log.jsonl b/log.jsonl --labels float32 bfloat16 --max-relative 0.01

Each RUN is a run folder or the log.jsonl in it. Prints each run's first and last loss and its largest difference from the FIRST
run at any step; --out writes compare.json (every loss and difference) and compare.png (loss curves, and the difference on a log
scale). Differences that come from rounding start near the precision (1e-7 in float32, 1e-3 in bfloat16) and grow slowly; a
wrong gradient shows within a few steps. Runs with other steps, or that trained on other data at some step, are refused.

Exit code: 0; 1 if some run differs by more than --max-relative; 2 if the runs cannot be compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import eagle_ds  # noqa: F401  before any package: says so where they are missing

# isort: split

from rich.console import Console
from rich.table import Table

from eagle_ds.config.outputs import check_output_folder
from eagle_ds.reporting.compare import Compared, Largest, compare, read_all, write


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder or log.jsonl; the others are held to the first")
    parser.add_argument("--labels", nargs="+", default=(), help="a name for each run (default: its folder's)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write compare.json and compare.png here")
    parser.add_argument("--max-relative", type=float, metavar="X", help="exit code 1 if a loss is off by more than X times the first's")
    return parser.parse_args()


def main() -> int:
    options = parse()
    try:
        if options.max_relative is not None and len(options.runs) < 2:
            raise ValueError("--max-relative holds runs to the first one, and only one is given; give two or more")
        if options.out:
            check_output_folder(options.out, "--out")
        compared = compare(read_all(options.runs, options.labels))
        written = write(compared, options.out) if options.out else []
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    Console(width=120).print(table(compared))
    for path in written:
        print(path)
    return _verdict(compared, options.max_relative)


def table(compared: Sequence[Compared]) -> Table:
    """A row a run."""
    shown = Table(title=f"{len(compared[0].curve.lines)} steps, held to {compared[0].curve.label}")
    for heading in ("run", "first loss", "last loss", "largest difference", "largest relative difference"):
        shown.add_column(heading, justify="left" if heading == "run" else "right")
    for run in compared:
        losses = run.curve.losses
        differences = [_text(run.largest_absolute), _text(run.largest_relative)] if run is not compared[0] else ["", ""]
        shown.add_row(run.curve.label, f"{losses[0]:.6f}", f"{losses[-1]:.6f}", *differences)
    return shown


def _text(largest: Largest) -> str:
    return f"{largest.value:.2e} (step {largest.step})" if largest.value else "0"


def _verdict(compared: Sequence[Compared], limit: float | None) -> int:
    if limit is None:
        return 0
    beyond = [run for run in compared if run.largest_relative.value > limit]
    for run in beyond:
        largest = run.largest_relative
        print(f"{run.curve.label} differs by {largest.value:.2e} at step {largest.step}, more than {limit:g}", file=sys.stderr)
    return 1 if beyond else 0


if __name__ == "__main__":
    sys.exit(main())
