#!/usr/bin/env python3
"""Show the contents of a hidden-state store or of one of its HDF5 files; verify or export them.

A store is the folder that tools/prepare_hidden_states.py and tools/convert_ckpt_to_hdf5.py write. It holds
store.json, manifest.jsonl (one line per sample) and one HDF5 file per sample below samples/.

examples:
    # samples, lengths, trained rows, compression, the target model
    tools/inspect_hdf5.py stores/llama3

    # the same, and the histogram of lengths as a picture
    tools/inspect_hdf5.py stores/llama3 --plot lengths.png

    # read everything and check every checksum; prints each damaged file with its rows
    tools/inspect_hdf5.py stores/llama3 --verify

    # one sample
    tools/inspect_hdf5.py stores/llama3/samples/ab/cd.h5

    # write SpecForge's rows_*/data_*.ckpt files: all samples, or two of them
    tools/inspect_hdf5.py stores/llama3 --export-ckpt out/
    tools/inspect_hdf5.py stores/llama3 --export-ckpt out/ --ids chat-7 chat-9

what the lines mean:
    trained rows    tokens that the loss mask selects, and their fraction of all tokens
    aux layers      target layers whose outputs are stored; they are the draft's input
    saved           1 - stored bytes / raw bytes; bfloat16 hidden states usually save about a third

Without --verify the tool opens only the manifest and at most a few hundred files, and misses damage in other
files. To repair a damaged sample, delete its file and run the command that wrote the store again: it writes
what is missing.

exit codes:
    0  no damage found
    1  the path is not a store, or a file cannot be read or written
    2  wrong command line
    3  damage was found; the lines that begin with "damaged:" name it
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import eagle_ds  # noqa: F401  first: it explains which packages are missing

# isort: split

import numpy as np
from rich.console import Console
from rich.table import Table

from eagle_ds.config.outputs import PICTURES, check_output_file, check_output_folder
from eagle_ds.store.checkpoint_export import export_checkpoints
from eagle_ds.store.manifest import StoreError
from eagle_ds.store.summary import Summary, histogram, summarize
from eagle_ds.store.verification import unlisted_files, verify

BAR_WIDTH = 40  # characters of the longest histogram bar
ENDINGS = (".h5", ".hdf5")


def main() -> int:
    arguments = parse_arguments()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        return 3 if inspect(arguments, Console(highlight=False)) else 0
    except StoreError as error:
        print(f"damaged: {error}", file=sys.stderr)
        return 3
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenProcessPool:
        reason = "a process of --verify was killed, probably because memory ran out"
        print(f"error: {reason}; use fewer --workers", file=sys.stderr)
        return 1


def parse_arguments() -> argparse.Namespace:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("path", type=Path, help="a store, or one .h5 file of it")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE",
        help="write the histogram of lengths as a picture (.png, .svg or .pdf)")
    parser.add_argument(
        "--verify", action="store_true",
        help="read and inflate everything; name every damaged file and its rows")
    parser.add_argument(
        "--workers", type=int, default=min(8, os.cpu_count() or 1),
        help="processes that verify files in parallel (default: %(default)s)")
    parser.add_argument(
        "--export-ckpt", type=Path, metavar="FOLDER", help="write the samples as SpecForge's .ckpt files")
    parser.add_argument("--ids", nargs="+", help="with --export-ckpt: export these samples only")
    return parser.parse_args()


def inspect(arguments: argparse.Namespace, console: Console) -> bool:
    """Do what the command line asks for; True if damage was found."""
    # Outputs are checked first: reading a large store takes long, and a wrong path should fail at once.
    if arguments.plot:
        check_output_file(arguments.plot, "--plot", PICTURES)
    if arguments.export_ckpt:
        check_output_folder(arguments.export_ckpt, "--export-ckpt")
    if arguments.path.is_file() and arguments.path.suffix not in ENDINGS:
        expected = "give a store (a folder with store.json), or one .h5 file of it"
        raise ValueError(f"{arguments.path} is a file of another kind; {expected}")
    summary = summarize(arguments.path)
    show(console, summary)
    if arguments.plot:
        plot_lengths(summary, arguments.plot)
        console.print(f"histogram written to {arguments.plot}")
    damaged = bool(summary.problems)
    if arguments.verify:
        damaged = show_verified(console, arguments.path, arguments.workers)
    if arguments.export_ckpt:
        written = sum(1 for _ in export_checkpoints(arguments.path, arguments.export_ckpt, arguments.ids))
        console.print(f"{written} samples written below {arguments.export_ckpt}")
    return damaged


def show(console: Console, summary: Summary) -> None:
    table = Table(title=str(summary.path), show_header=False, title_justify="left")
    for name, value in rows(summary):
        table.add_row(name, value)
    console.print(table)
    show_histogram(console, summary.lengths)
    show_compression(console, summary)
    for problem in summary.problems:
        console.print(f"damaged: {problem}", markup=False, soft_wrap=True)


def rows(summary: Summary) -> list[tuple[str, str]]:
    """Return the lines of the first table as (name, value)."""
    about = summary.info or summary.header
    lines = [("samples", f"{len(summary.lengths):,}"), ("tokens", f"{int(summary.lengths.sum()):,}")]
    if len(summary.lengths) > 1:
        low, middle, high = np.percentile(summary.lengths, (0, 50, 100)).astype(int)
        lines.append(("tokens per sample", f"{low:,} to {high:,}, median {middle:,}"))
    lines.append(("trained rows", f"{int(summary.trained.sum()):,}, {summary.trained_fraction:.1%}"))
    if len(summary.trained) > 1:
        lines.append(("samples without a trained row", f"{int((summary.trained == 0).sum())}"))
    lines.append(("on disk", f"{summary.stored_bytes / 1e6:,.1f} MB"))
    if about is not None:
        lines += [
            ("target", about.target),
            ("target hash", about.target_hash or "not known"),
            ("aux layers (outputs of)", ", ".join(map(str, about.aux_layer_ids))),
            ("hidden size, dtype", f"{about.hidden_size}, {about.dtype}"),
            ("encoder", about.encoder),
        ]
    if summary.info is not None:
        lines.append(("vocabulary, head rows", f"{summary.info.vocab_size:,}, {summary.info.head_size:,}"))
    return lines


def show_histogram(console: Console, lengths: np.ndarray) -> None:
    if len(lengths) < 2:
        return
    bins = histogram(lengths)
    most = max(count for *_, count in bins)
    table = Table("tokens", "samples", "", title="lengths", title_justify="left", box=None)
    for low, high, count in bins:
        table.add_row(f"{low:,} to {high - 1:,}", f"{count:,}", "#" * round(BAR_WIDTH * count / most))
    console.print(table)


def show_compression(console: Console, summary: Summary) -> None:
    title = f"compression, over {summary.sized_files} file{'s' if summary.sized_files > 1 else ''}"
    table = Table("dataset", "raw MB", "stored MB", "saved", title=title, title_justify="left", box=None)
    for name, size in summary.sizes.items():
        raw, stored = size.raw_bytes / 1e6, size.stored_bytes / 1e6
        table.add_row(name, f"{raw:,.2f}", f"{stored:,.2f}", f"{size.saved:.1%}")
    console.print(table)


def show_verified(console: Console, path: Path, workers: int) -> bool:
    """Verify all files and print each damage when it is found; True if there is any."""
    files = damaged = 0
    for file, damages in verify(path, workers):
        files += 1
        damaged += bool(damages)
        for damage in damages:
            where = "the whole file"
            if damage.rows:
                where = f"{damage.dataset} rows {damage.rows[0]} to {damage.rows[1]}"
            console.print(f"damaged: {file}: {where}: {damage.reason}", markup=False, soft_wrap=True)
    for orphan in unlisted_files(path) if path.is_dir() else []:
        explanation = "a writer was killed before it finished; safe to delete"
        console.print(f"note: {orphan} is not in the manifest: {explanation}", soft_wrap=True)
    console.print(f"{files} files verified, {damaged} damaged")
    return damaged > 0


def plot_lengths(summary: Summary, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")  # draws without a display
    from matplotlib import pyplot

    bins = histogram(summary.lengths)
    figure, axes = pyplot.subplots(figsize=(7, 3.5))
    axes.bar(range(len(bins)), [count for *_, count in bins], width=0.9)
    axes.set_xticks(range(len(bins)), [f"{low:,}" for low, *_ in bins], rotation=45)
    axes.set_xlabel("tokens per sample (lower edge of each bin)")
    axes.set_ylabel("samples")
    trained = f"{summary.trained_fraction:.1%} of rows trained"
    axes.set_title(f"{summary.path.name}: {len(summary.lengths):,} samples, {trained}")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
