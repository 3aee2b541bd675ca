#!/usr/bin/env python
"""Measure the hidden-state store against gzip'd and plain torch files and against h5py's own gzip, in one run.

    tools/bench_io.py                                    # 128K and 4K tokens, H = 4096: 12 minutes on two quiet cores, 10 GB of disk
    tools/bench_io.py --tokens 4096 --tries 3            # a quick look: two minutes
    tools/bench_io.py --out docs/benchmarks              # write io.json and io.png there

The states are those of the embedded target (tools/fetch_embedded_target.py), laid side by side to the width of a large model
and tiled to the length. For each format: size; time to write it durably; time and bytes for one rank of --ranks to read its own
rows. The peer's file is read whole, as the peer does. Ends with the ratios that the project promises; exit code 1 if one is missed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import h5py
import torch
from rich.console import Console
from rich.table import Table

from eagle_ds.bench.chart import io_figure
from eagle_ds.bench.io import Goal, Measurement, as_record, goals, measure_all
from eagle_ds.bench.states import capture_states, facts_for
from eagle_ds.capture.embedded import DEFAULT_FOLDER, ensure_embedded_target


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[131_072, 4096], help="lengths to measure")
    parser.add_argument("--width", type=int, default=4096, help="hidden size H of the imitated target")
    parser.add_argument("--ranks", type=int, default=8, help="ranks that share the sequence")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of our encoder and our reader")
    parser.add_argument("--tries", type=int, default=2, help="warm reads of each rank, of which the best counts")
    parser.add_argument("--target", type=Path, default=DEFAULT_FOLDER, help="folder of the embedded target (made if it is not there)")
    parser.add_argument("--scratch", type=Path, help="folder for the files, on the disk to measure (default: the system's temporary one)")
    parser.add_argument("--out", type=Path, help="write io.json and io.png into this folder")
    return parser.parse_args()


def main() -> int:
    options = parse()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    states = capture_states(ensure_embedded_target(options.target), options.width)
    facts = facts_for(options.target, options.width)
    torch.set_num_threads(1)
    console, records, promised = Console(width=150), [], []
    for num_tokens in options.tokens:
        with tempfile.TemporaryDirectory(dir=options.scratch, prefix="bench-io-") as folder:
            results = list(measure_all(states, facts, num_tokens, options.ranks, options.threads, options.tries, Path(folder)))
        promised.append((num_tokens, goals({result.name: result for result in results})))
        records += results
        console.print(table(results))
        console.print(goal_table(num_tokens, promised[-1][1]))
    if options.out:
        save(options, records, promised)
    return 0 if all(goal.met for _, met in promised for goal in met) else 1


def table(results: Sequence[Measurement]) -> Table:
    """One row a format."""
    first = results[0]
    title = f"{first.num_tokens} tokens, {first.raw_bytes / 1e9:.2f} GB of hidden states; a rank of {first.ranks} needs 1/{first.ranks}"
    shown = Table(title=title)
    for heading in ("format", "saved", "write MB/s", "per core", "read, cached", "per core", "read, disk", "MB from file", "inflated/used"):
        shown.add_column(heading, justify="left" if heading == "format" else "right")
    for result in results:
        shown.add_row(
            result.title,
            f"{result.saved:.1%}",
            f"{result.raw_bytes / 1e6 / result.write.wall_s:.0f}",
            f"{result.raw_bytes / 1e6 / result.write.cpu_s:.0f}",
            f"{result.read_warm.wall_s:.3f} s",
            f"{result.rank_bytes / 1e6 / result.read_warm.cpu_s:.0f} MB/s",
            f"{result.read_cold.wall_s:.3f} s",
            f"{result.rank_bytes_read / 1e6:.0f}",
            f"{result.amplification:.3f}",
        )
    return shown


def goal_table(num_tokens: int, promised: Sequence[Goal]) -> Table:
    """What was promised and what came out."""
    shown = Table(title=f"promises at {num_tokens} tokens")
    for heading in ("promise", "limit", "measured", ""):
        shown.add_column(heading, justify="left" if heading == "promise" else "right")
    for goal in promised:
        sign = ">=" if goal.at_least else "<="
        shown.add_row(goal.text, f"{sign} {goal.limit:.3g}", f"{goal.value:.3g}", "met" if goal.met else "[bold red]MISSED[/]")
    return shown


def save(options: argparse.Namespace, records: Sequence[Measurement], promised: Sequence[tuple[int, Sequence[Goal]]]) -> None:
    """io.json and io.png."""
    document = {
        "date": date.today().isoformat(),
        "command": " ".join(["tools/bench_io.py", *sys.argv[1:]]),
        "hardware": f"{os.cpu_count()}-core CPU, {platform.machine()}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "h5py": h5py.__version__},
        "width": options.width,
        "threads": options.threads,
        "measurements": [as_record(record) for record in records],
        "promises": [
            {"num_tokens": tokens, "promise": goal.text, "limit": goal.limit, "measured": goal.value, "met": goal.met}
            for tokens, met in promised
            for goal in met
        ],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "io.json").write_text(json.dumps(document, indent=2) + "\n")
    (options.out / "io.png").write_bytes(io_figure(document))


if __name__ == "__main__":
    sys.exit(main())
