#!/usr/bin/env python3
"""Compare the loss curves of runs that should be equal: another layout, precision, kernel or machine.

    tools/compare_runs.py runs/one_gpu runs/ulysses4 runs/ring4 --out docs/benchmarks/layouts
    tools/compare_runs.py a/log.jsonl b/log.jsonl --labels float32 bfloat16 --max-relative 0.01

Each RUN is a run folder or the log.jsonl in it. All runs must have the same optimizer steps over the same
data; others are refused.

How to read the table: it shows the first and the last loss of each run, and its largest absolute and relative
difference from the FIRST run at any step. Differences by rounding start near the precision (1e-7 in float32,
1e-3 in bfloat16) and grow slowly; a wrong gradient shows within a few steps. --out also writes compare.json
(every loss and difference) and compare.png (loss curves, and the differences on a log scale).

Exit code: 0; 1 if a run differs by more than --max-relative; 2 if the runs cannot be compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import eagle_ds  # noqa: F401  first: explains how to install missing packages

# isort: split

from rich.console import Console
from rich.table import Table

from eagle_ds.config.outputs import check_output_folder
from eagle_ds.reporting.compare import Compared, Largest, compare, read_all, write


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN",
        help="run folder or log.jsonl; all are compared with the first"
    )
    parser.add_argument("--labels", nargs="+", default=(), help="a name for each run (default: its folder's)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write compare.json and compare.png here")
    limit = "exit code 1 if a loss differs by more than X times the first run's"
    parser.add_argument("--max-relative", type=float, metavar="X", help=limit)
    return parser.parse_args()


def main() -> int:
    options = parse()
    try:
        if options.max_relative is not None and len(options.runs) < 2:
            raise ValueError("--max-relative compares runs, but only one is given; give two or more")
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
    """Return a table with one row per run."""
    shown = Table(title=f"{len(compared[0].curve.lines)} steps, compared with {compared[0].curve.label}")
    for heading in ("run", "first loss", "last loss", "largest difference", "largest relative difference"):
        shown.add_column(heading, justify="left" if heading == "run" else "right")
    for run in compared:
        losses = run.curve.losses
        differences = ["", ""]
        if run is not compared[0]:
            differences = [_text(run.largest_absolute), _text(run.largest_relative)]
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
        found = f"{run.curve.label} differs by {largest.value:.2e} at step {largest.step}"
        print(f"{found}, more than {limit:g}", file=sys.stderr)
    return 1 if beyond else 0


if __name__ == "__main__":
    sys.exit(main())
