#!/usr/bin/env python3
"""Compare the hidden-state store with torch files (gzipped and plain) and with h5py's own gzip, in one run.

    tools/bench_io.py                          128K and 4K tokens, H = 4096: 12 minutes, 10 GB of disk
    tools/bench_io.py --tokens 4096 --tries 3     a quick look: two minutes
    tools/bench_io.py --out docs/benchmarks       also write io.json and io.png there
    tools/bench_io.py --convert                   time tools/convert_ckpt_to_hdf5.py instead: 4 minutes, 8 GB

What it measures: for each format the size of the file, the time to write it to the disk, and the time and
bytes for one rank of --ranks to read its own rows. SpecForge's gzipped file is read whole, because it cannot
be read in parts. The hidden states are those of the demo's target (tools/fetch_embedded_target.py); copies of
them fill the width of a large model and the length.

With --convert it times the whole conversion command. The sources are --files plain files of --file-tokens
tokens (from the page cache, from the disk, and with --verify), and a quarter as many gzipped files. With
--out it writes convert.json.

How to read the tables: "saved" is the share of raw bytes saved. "read, cached" comes from the page cache and
shows the cost of decoding; "read, disk" comes from the disk. "per core" divides bytes by processor time.
"inflated/used" is decompressed bytes / bytes needed (1 is ideal). The last table compares the figures with
what the project promises; the exit code is 1 if a promise is missed.
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

import eagle_ds  # noqa: F401  first: explains how to install missing packages

# isort: split

import h5py
import torch
from rich.console import Console
from rich.table import Table

from eagle_ds.bench import conversion
from eagle_ds.bench.embedded_target import DEFAULT_FOLDER, ensure_embedded_target
from eagle_ds.bench.plots import io_figure
from eagle_ds.bench.store_io import Goal, Measurement, as_record, goals, measure_all
from eagle_ds.bench.synthetic_data import States, capture_states, info_for
from eagle_ds.store.manifest import StoreInfo


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[131_072, 4096], help="lengths to measure")
    parser.add_argument("--width", type=int, default=4096, help="hidden size H of the simulated target")
    parser.add_argument("--ranks", type=int, default=8, help="ranks that share the sequence")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count() or 1, help="threads of our encoder and our reader"
    )
    parser.add_argument(
        "--tries", type=int, default=2, help="reads from the page cache per rank; the best one counts"
    )
    parser.add_argument("--convert", action="store_true", help="time the conversion tool instead")
    parser.add_argument(
        "--files", type=int, default=16, help="with --convert: number of plain files (default: %(default)s)"
    )
    parser.add_argument(
        "--file-tokens", type=int, default=8192,
        help="with --convert: tokens of each file (default: %(default)s)"
    )
    parser.add_argument(
        "--target", type=Path, default=DEFAULT_FOLDER, help="folder of the demo's target; made if missing"
    )
    parser.add_argument(
        "--scratch", type=Path, help="folder on the disk to measure (default: the system's temporary folder)"
    )
    parser.add_argument(
        "--out", type=Path, help="also write io.json and io.png, or convert.json, into this folder"
    )
    return parser.parse_args()


def main() -> int:
    options = parse()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    states = capture_states(ensure_embedded_target(options.target), options.width)
    info = info_for(options.target, options.width)
    torch.set_num_threads(1)
    console = Console(width=150)
    bench = bench_conversion if options.convert else bench_formats
    met = bench(options, states, info, console)
    return 0 if met else 1


def bench_formats(options: argparse.Namespace, states: States, info: StoreInfo, console: Console) -> bool:
    """Measure size, writing and reading of each format; return whether every promise is met."""
    records, promised = [], []
    for num_tokens in options.tokens:
        with tempfile.TemporaryDirectory(dir=options.scratch, prefix="bench-io-") as folder:
            sizes = num_tokens, options.ranks, options.threads, options.tries
            results = list(measure_all(states, info, *sizes, Path(folder)))
        promised.append((num_tokens, goals({result.name: result for result in results})))
        records += results
        console.print(table(results))
        console.print(goal_table(f"{num_tokens} tokens", promised[-1][1]))
    if options.out:
        document = {
            **about(options),
            "measurements": [as_record(record) for record in records],
            "promises": [
                {"num_tokens": tokens, **goal_record(goal)} for tokens, found in promised for goal in found
            ],
        }
        write_json(options.out / "io.json", document)
        (options.out / "io.png").write_bytes(io_figure(document))
    return all(goal.met for _, found in promised for goal in found)


def bench_conversion(options: argparse.Namespace, states: States, info: StoreInfo, console: Console) -> bool:
    """Measure the conversion tool; return whether every promise is met."""
    with tempfile.TemporaryDirectory(dir=options.scratch, prefix="bench-convert-") as folder:
        sizes = options.files, options.file_tokens, options.threads
        runs = list(conversion.measure_conversions(states, info, *sizes, Path(folder)))
    promised = conversion.goals(runs)
    console.print(conversion_table(runs, options.threads))
    console.print(goal_table("conversion", promised))
    if options.out:
        document = {
            **about(options),
            "file_tokens": options.file_tokens,
            "measurements": [conversion.as_record(run) for run in runs],
            "promises": [goal_record(goal) for goal in promised],
        }
        write_json(options.out / "convert.json", document)
    return all(goal.met for goal in promised)


def table(results: Sequence[Measurement]) -> Table:
    """Return a table with one row per format."""
    first = results[0]
    size = f"{first.num_tokens} tokens, {first.raw_bytes / 1e9:.2f} GB of hidden states"
    shown = Table(title=f"{size}; one rank of {first.ranks} needs 1/{first.ranks} of them")
    headings = ("format", "saved", "write MB/s", "per core", "read, cached", "per core", "read, disk")
    for heading in (*headings, "MB from file", "inflated/used"):
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


def conversion_table(runs: Sequence[conversion.Conversion], workers: int) -> Table:
    """Return a table with one row per run of the tool."""
    shown = Table(title=f"the whole command, {workers} workers")
    headings = ("source", "files", "MB", "raw MB", "stored MB", "time", "source MB/s")
    for heading in (*headings, "without start", "raw MB/s", "disk alone"):
        shown.add_column(heading, justify="left" if heading == "source" else "right")
    for run in runs:
        sizes = [f"{size / 1e6:.0f}" for size in (run.source_bytes, run.raw_bytes, run.stored_bytes)]
        speeds = [f"{speed:.0f}" for speed in (run.source_mb_per_s, run.sustained_mb_per_s, run.raw_mb_per_s)]
        disk = f"{run.disk_mb_per_s:.0f}" if run.disk_mb_per_s else ""
        shown.add_row(run.title, str(run.files), *sizes, f"{run.seconds:.1f} s", *speeds, disk)
    return shown


def goal_table(what: str, promised: Sequence[Goal]) -> Table:
    """Return a table of promises and measured values."""
    shown = Table(title=f"promises: {what}")
    for heading in ("promise", "limit", "measured", ""):
        shown.add_column(heading, justify="left" if heading == "promise" else "right")
    for goal in promised:
        sign = ">=" if goal.at_least else "<="
        verdict = "met" if goal.met else "[bold red]MISSED[/]"
        shown.add_row(goal.text, f"{sign} {goal.limit:.3g}", f"{goal.value:.3g}", verdict)
    return shown


def goal_record(goal: Goal) -> dict[str, object]:
    """Return a promise and its measured value for JSON."""
    return {"promise": goal.text, "limit": goal.limit, "measured": goal.value, "met": goal.met}


def about(options: argparse.Namespace) -> dict[str, object]:
    """Return where and how the figures were measured, for JSON."""
    return {
        "date": date.today().isoformat(),
        "command": " ".join(["tools/bench_io.py", *sys.argv[1:]]),
        "hardware": f"{os.cpu_count()} CPU cores ({processor()})",
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "h5py": h5py.__version__
        },
        "width": options.width,
        "threads": options.threads,
    }


def processor() -> str:
    """Return the processor's name from /proc/cpuinfo, else the machine type."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write_json(path: Path, document: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
