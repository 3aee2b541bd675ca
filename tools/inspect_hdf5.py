#!/usr/bin/env python3
"""What is in a hidden-state store, or in one file of it.

    tools/inspect_hdf5.py stores/llama3                          # counts, lengths, trained rows, compression, target
    tools/inspect_hdf5.py stores/llama3 --plot lengths.png       # the same, and a histogram as a picture
    tools/inspect_hdf5.py stores/llama3 --verify                 # inflate every chunk; names damaged files and rows
    tools/inspect_hdf5.py stores/llama3/samples/ab/cd.h5         # one file
    tools/inspect_hdf5.py stores/llama3 --export-ckpt out/       # back to rows_*/data_*.ckpt, for another trainer
    tools/inspect_hdf5.py stores/llama3 --export-ckpt out/ --ids chat-7 chat-9

exit codes: 0 sound; 1 not a store, or it cannot be read; 2 the command line cannot be read; 3 damage was found, and named
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import eagle_ds  # noqa: F401  before any package: says so where they are missing

# isort: split

import numpy as np
from rich.console import Console
from rich.table import Table

from eagle_ds.config.outputs import PICTURES, check_output_file, check_output_folder
from eagle_ds.store.inspection import Report, export_checkpoints, histogram, inspect, unlisted_files, verify
from eagle_ds.store.manifest import StoreError

BAR_WIDTH = 40
ENDINGS = (".h5", ".hdf5")


def main() -> int:
    arguments = parse_arguments()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    console = Console(highlight=False)
    try:
        if arguments.plot:
            check_output_file(arguments.plot, "--plot", PICTURES)
        if arguments.export_ckpt:
            check_output_folder(arguments.export_ckpt, "--export-ckpt")
        if arguments.path.is_file() and arguments.path.suffix not in ENDINGS:
            raise ValueError(f"{arguments.path} is a file of another kind; give a store (a folder with store.json), or one .h5 file of it")
        report = inspect(arguments.path)
        show(console, report)
        if arguments.plot:
            plot_lengths(report, arguments.plot)
            console.print(f"histogram written to {arguments.plot}")
        damaged = show_verified(console, arguments.path, arguments.workers) if arguments.verify else bool(report.problems)
        if arguments.export_ckpt:
            written = sum(1 for _ in export_checkpoints(arguments.path, arguments.export_ckpt, arguments.ids))
            console.print(f"{written} samples written below {arguments.export_ckpt}")
    except StoreError as error:
        print(f"damaged: {error}", file=sys.stderr)
        return 3
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenProcessPool:
        print("error: a process of --verify was killed, mostly for its memory; use fewer --workers", file=sys.stderr)
        return 1
    return 3 if damaged else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="a store, or one .h5 file of it")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="write the histogram of lengths as a picture (.png, .svg or .pdf)")
    parser.add_argument("--verify", action="store_true", help="read and inflate everything, name what is damaged")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes of --verify (default: %(default)s)")
    parser.add_argument("--export-ckpt", type=Path, metavar="FOLDER", help="write samples as SpecForge's .ckpt files")
    parser.add_argument("--ids", nargs="+", help="of --export-ckpt: these samples only")
    return parser.parse_args()


def show(console: Console, report: Report) -> None:
    table = Table(title=str(report.path), show_header=False, title_justify="left")
    for name, value in rows(report):
        table.add_row(name, value)
    console.print(table)
    show_histogram(console, report.lengths)
    show_compression(console, report)
    for problem in report.problems:
        console.print(f"damaged: {problem}", markup=False, soft_wrap=True)


def rows(report: Report) -> list[tuple[str, str]]:
    """The table's lines: what it is made from, and how much of it there is."""
    about = report.info or report.header
    lines = [("samples", f"{len(report.lengths):,}"), ("tokens", f"{int(report.lengths.sum()):,}")]
    if len(report.lengths) > 1:
        low, middle, high = np.percentile(report.lengths, (0, 50, 100)).astype(int)
        lines.append(("tokens a sample", f"{low:,} to {high:,}, median {middle:,}"))
    lines.append(("trained rows", f"{int(report.trained.sum()):,}, {report.trained_fraction:.1%}"))
    if len(report.trained) > 1:
        lines.append(("samples without a trained row", f"{int((report.trained == 0).sum())}"))
    lines.append(("on disk", f"{report.stored_bytes / 1e6:,.1f} MB"))
    if about is not None:
        layers = ", ".join(map(str, about.aux_layer_ids))
        lines += [("target", about.target), ("target hash", about.target_hash or "not known"), ("aux layers (outputs of)", layers)]
        lines += [("hidden size, dtype", f"{about.hidden_size}, {about.dtype}"), ("encoder", about.encoder)]
    if report.info is not None:
        lines.append(("vocabulary, head rows", f"{report.info.vocab_size:,}, {report.info.head_size:,}"))
    return lines


def show_histogram(console: Console, lengths: np.ndarray) -> None:
    bins = histogram(lengths)
    if len(lengths) < 2:
        return
    most = max(count for *_, count in bins)
    table = Table("tokens", "samples", "", title="lengths", title_justify="left", box=None)
    for low, high, count in bins:
        table.add_row(f"{low:,} to {high - 1:,}", f"{count:,}", "#" * round(BAR_WIDTH * count / most))
    console.print(table)


def show_compression(console: Console, report: Report) -> None:
    title = f"compression, over {report.sized_files} file{'s' if report.sized_files > 1 else ''}"
    table = Table("dataset", "raw MB", "stored MB", "saved", title=title, title_justify="left", box=None)
    for name, size in report.sizes.items():
        table.add_row(name, f"{size.raw_bytes / 1e6:,.2f}", f"{size.stored_bytes / 1e6:,.2f}", f"{size.saved:.1%}")
    console.print(table)


def show_verified(console: Console, path: Path, workers: int) -> bool:
    """Print every damage as it is found; True if there was any."""
    files = damaged = 0
    for file, damages in verify(path, workers):
        files += 1
        damaged += bool(damages)
        for damage in damages:
            where = f"{damage.dataset} rows {damage.rows[0]} to {damage.rows[1]}" if damage.rows else "the whole file"
            console.print(f"damaged: {file}: {where}: {damage.reason}", markup=False, soft_wrap=True)
    for orphan in unlisted_files(path) if path.is_dir() else []:
        console.print(f"note: {orphan} is not in the manifest: left by a killed writer, safe to delete", soft_wrap=True)
    console.print(f"{files} files verified, {damaged} damaged")
    return damaged > 0


def plot_lengths(report: Report, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bins = histogram(report.lengths)
    figure, axes = pyplot.subplots(figsize=(7, 3.5))
    axes.bar(range(len(bins)), [count for *_, count in bins], width=0.9)
    axes.set_xticks(range(len(bins)), [f"{low:,}" for low, *_ in bins], rotation=45)
    axes.set_xlabel("tokens a sample, from")
    axes.set_ylabel("samples")
    axes.set_title(f"{report.path.name}: {len(report.lengths):,} samples, {report.trained_fraction:.1%} of rows trained")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
