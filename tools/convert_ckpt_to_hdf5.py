#!/usr/bin/env python
"""Convert other projects' hidden-state files into a gzip-filtered HDF5 store that takes a third less room and lets every
rank read only its own rows.

  reads   SpecForge         rows_*/data_*.ckpt, .ckpt.gz
          Model-Optimizer   *.pt
          speculators       hs_*.safetensors   (needs --target for the final norm, and --dataset for the loss mask)
          other HDF5        with --map
  writes  DST/store.json, DST/manifest.jsonl, DST/samples/..., DST/rejected.jsonl (one line a rejected file)

Nothing is unpickled but tensors. Kill it and run it again: what is stored is not converted twice. Rejected files never stop
the others (unless --strict) and are tried again by the next run.

examples
  # what will it take?
  tools/convert_ckpt_to_hdf5.py cache/hidden_states stores/llama3 --target meta-llama/Llama-3.1-8B-Instruct --dry-run

  # convert without the target at hand, freeing each source once its copy was compared bit for bit
  tools/convert_ckpt_to_hdf5.py cache/hidden_states stores/llama3 --target-name meta-llama/Llama-3.1-8B-Instruct \\
      --aux-layer-ids 1,15,28 --vocab-size 128256 --delete-source

  # speculators: the last state is normed, and the loss mask is made from the conversations
  tools/convert_ckpt_to_hdf5.py hidden_states stores/qwen --target models/Qwen3-8B --dataset chats.jsonl --max-length 8192

  # another HDF5 schema, one group a sample, bfloat16 kept as integers
  tools/convert_ckpt_to_hdf5.py dump.h5 stores/x --target models/X --map \\
      'input_ids=data/*/tokens,loss_mask=data/*/mask,aux_hidden_state=data/*/l1+data/*/l15+data/*/l28@bf16,hidden_state=data/*/last@bf16'

exit codes
  0  every file is in the store (converted now or earlier)
  1  nothing can be done as asked: wrong flags, no files, a store made from other data; one sentence says what to change
  2  the command line cannot be read
  3  some files were rejected, all others are in the store; DST/rejected.jsonl has the reasons
  4  --strict: stopped at the first rejected file
  5  a stored file differs from its source (--verify, --delete-source); it is listed among the rejected, the source is kept
  6  the machine failed: disk full or read-only, target unreadable; what was converted is kept
  130  interrupted; what was converted is kept
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import eagle_ds  # noqa: F401  before any package: says so where they are missing

# isort: split

from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from eagle_ds.store.processes import start_fork_server

if TYPE_CHECKING:
    from eagle_ds.convert.run import Progress, Summary
    from eagle_ds.convert.options import ConvertOptions
    from eagle_ds.convert.survey import Prediction

SHOWN_REJECTS = 20
LINE_EVERY_S = 10.0


def main() -> int:
    arguments = parse_arguments()
    if arguments.workers > 1 and not arguments.dry_run:
        start_fork_server()  # before this process loads torch itself, below
    from eagle_ds.convert.run import ConversionStopped, predict_conversion

    console, errors = Console(highlight=False), Console(stderr=True, highlight=False)
    handler = RichHandler(console=errors, show_path=False, show_time=False, markup=False)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])
    try:
        options = make_options(arguments)
        if not arguments.dry_run:
            check_destination(options.destination)
        if arguments.dry_run:
            summary, prediction = predict_conversion(options)
            show_prediction(console, summary, prediction)
        else:
            summary = run(options, errors)
            show_summary(console, summary, options)
    except ValueError as error:
        errors.print(f"error: {error}", markup=False, soft_wrap=True)
        return 1
    except ConversionStopped as error:
        errors.print(f"stopped: {error}", markup=False, soft_wrap=True)
        return 6
    except OSError as error:
        errors.print(f"stopped: {error}; what was converted is kept, run the same command again to go on", markup=False, soft_wrap=True)
        return 6
    except KeyboardInterrupt:
        errors.print("interrupted; what was converted is kept, run the same command again to go on")
        return 130
    show_rejected(console, summary)
    return exit_code(summary)


def check_destination(folder: Path) -> None:
    """Raise ConversionStopped, before any source is looked at, where nothing can be written."""
    from eagle_ds.config.outputs import check_output_folder
    from eagle_ds.convert.run import ConversionStopped

    try:
        check_output_folder(folder, "DST")
    except ValueError as error:
        raise ConversionStopped(str(error)) from error


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SRC", type=Path, help="a file, or a folder that is searched for known formats")
    parser.add_argument("destination", metavar="DST", type=Path, help="the store: a new folder, or an earlier run's")
    info = parser.add_argument_group("what the files do not say")
    info.add_argument("--target", help="the target's folder or Hugging Face id: sizes, layers, final norm, head, tokenizer")
    info.add_argument("--revision", help="of a Hugging Face id")
    info.add_argument("--target-name", help="name to store (default: --target as given)")
    info.add_argument("--aux-layer-ids", type=layer_ids, metavar="I,J,K", help="outputs of these layers, 0-based (default: 1,L//2-1,L-4)")
    info.add_argument("--vocab-size", type=int, help="the target's (default: from --target)")
    info.add_argument("--dataset", type=Path, metavar="JSONL", help="conversations, for the loss mask of formats that lack one")
    info.add_argument("--max-length", type=int, default=1 << 20, help="tokens that the capture cut conversations at")
    info.add_argument("--map", metavar="OURS=THEIRS,...", help="where another HDF5 schema keeps each dataset (see the example above)")
    info.add_argument(
        "--final-norm",
        choices=("auto", "apply", "skip"),
        default="auto",
        help="apply the target's final norm to the last state: auto goes by format and checks it against the norm's weight",
    )
    info.add_argument("--skip-head", action="store_true", help="do not compute target_token_id and target_logsumexp with the head")
    info.add_argument("--head-device", default="auto", metavar="DEVICE", help="of that head: cpu, cuda, cuda:1 (default: a GPU if any)")
    info.add_argument("--cast", choices=("bfloat16", "float16", "float32"), help="convert hidden states of other dtypes, with rounding")
    work = parser.add_argument_group("how to work")
    work.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes (default: %(default)s)")
    work.add_argument("--strict", action="store_true", help="stop at the first rejected file")
    work.add_argument("--verify", action="store_true", help="read every stored file back and compare it with its source bit for bit")
    work.add_argument("--delete-source", action="store_true", help="delete each source file after such a comparison; links stay")
    work.add_argument("--dry-run", action="store_true", help="check flags and a few files, predict size and time, write nothing")
    return parser.parse_args()


def layer_ids(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def make_options(arguments: argparse.Namespace) -> ConvertOptions:
    from eagle_ds.convert import Hdf5Map
    from eagle_ds.convert.options import ConvertOptions

    named = vars(arguments)
    kept = {name: named[name] for name in ConvertOptions.__dataclass_fields__ if name in named}
    mapping = Hdf5Map.parse(arguments.map) if arguments.map else None
    return ConvertOptions(**kept, mapping=mapping, token_labels=not arguments.skip_head)


def run(options: ConvertOptions, errors: Console) -> Summary:
    """Convert, with one line of progress: live on a terminal, every ten seconds elsewhere."""
    from eagle_ds.convert.run import convert

    begin, last_line = time.monotonic(), time.monotonic()
    with errors.status("looking at the source") as status:

        def show(progress: Progress) -> None:
            nonlocal last_line
            text = progress_line(progress, time.monotonic() - begin)
            status.update(text)
            if not errors.is_terminal and time.monotonic() - last_line > LINE_EVERY_S:
                errors.print(text)
                last_line = time.monotonic()

        return convert(options, show)


def progress_line(progress: Progress, seconds: float) -> str:
    speed = progress.done_bytes / max(seconds, 1e-9)
    left = timedelta(seconds=round((progress.total_bytes - progress.done_bytes) / max(speed, 1e-9)))
    share = f"{gigabytes(progress.done_bytes)} of {gigabytes(progress.total_bytes)}"
    files = f"{progress.done_files}/{progress.total_files} files"
    return f"{files}, {share}, {speed / 1e6:.0f} MB/s, ETA {left}, {progress.rejected} rejected"


def show_summary(console: Console, summary: Summary, options: ConvertOptions) -> None:
    table = Table(title=f"{options.source} -> {options.destination}", show_header=False, title_justify="left")
    table.add_row("samples found", f"{summary.found}")
    table.add_row("converted now", f"{summary.converted}")
    table.add_row("stored by an earlier run", f"{summary.already_done}")
    table.add_row("rejected", f"{len(summary.rejected)}")
    if options.verify or options.delete_source:
        table.add_row("compared with the source, bit for bit", f"{summary.compared}")
    if options.delete_source:
        table.add_row("source files deleted", f"{summary.deleted}")
    if summary.converted:
        trained = summary.trained_tokens / max(1, summary.tokens)
        table.add_row("tokens", f"{summary.tokens:,}, {trained:.1%} trained")
        table.add_row("source files", gigabytes(summary.source_bytes))
        table.add_row("hidden states, raw", gigabytes(summary.raw_bytes))
        table.add_row("stored", f"{gigabytes(summary.stored_bytes)}, {1 - summary.stored_bytes / summary.raw_bytes:.1%} saved against raw")
        table.add_row("time", f"{summary.seconds:.1f} s, {summary.raw_bytes / summary.seconds / 1e6:.0f} MB/s of raw hidden states")
    console.print(table)
    if summary.without_training:
        console.print(f"note: {summary.without_training} samples have no trained token; training passes over them")


def show_prediction(console: Console, summary: Summary, prediction: Prediction | None) -> None:
    table = Table(title="dry run, nothing was written", show_header=False, title_justify="left")
    table.add_row("samples found", f"{summary.found}")
    table.add_row("stored by an earlier run", f"{summary.already_done}")
    if prediction is not None:
        saved = 1 - prediction.stored_bytes / max(1, prediction.raw_bytes)
        table.add_row("source files to convert", gigabytes(prediction.source_bytes))
        table.add_row("hidden states, raw", gigabytes(prediction.raw_bytes))
        table.add_row("predicted size", f"{gigabytes(prediction.stored_bytes)}, {saved:.1%} saved against raw")
        table.add_row("predicted time", f"{timedelta(seconds=round(prediction.seconds))} if the disk keeps up")
        if prediction.head_s > 0.1 * prediction.seconds:
            table.add_row("of which the target's head", f"{timedelta(seconds=round(prediction.head_s))} (--skip-head leaves it out)")
    if summary.info is not None:
        info = summary.info
        table.add_row("target, layers", f"{info.target}, {list(info.aux_layer_ids)}")
        table.add_row("hidden size, dtype", f"{info.hidden_size}, {info.dtype}")
    console.print(table)


def show_rejected(console: Console, summary: Summary) -> None:
    from eagle_ds.convert.run import REJECTED_NAME

    if not summary.rejected:
        return
    table = Table("file", "reason", "found and expected", title="rejected", title_justify="left")
    for rejected in summary.rejected[:SHOWN_REJECTS]:
        table.add_row(rejected.path, str(rejected.reason), rejected.detail)
    console.print(table)
    counts = ", ".join(f"{count} {reason}" for reason, count in summary.reasons.most_common())
    console.print(f"{len(summary.rejected)} rejected: {counts}; all of them are listed in {REJECTED_NAME} of the store")


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def exit_code(summary: Summary) -> int:
    from eagle_ds.convert import Reason

    if summary.reasons[Reason.READBACK]:
        return 5
    if summary.rejected:
        return 4 if summary.stopped_early else 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
