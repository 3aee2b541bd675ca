#!/usr/bin/env python3
"""Convert other projects' hidden-state files into a store. Its gzip-filtered HDF5 files take a third less
space, and each rank of a training run reads only its own rows from them.

  reads   SpecForge         rows_*/data_*.ckpt, .ckpt.gz
          Model-Optimizer   *.pt
          speculators       hs_*.safetensors  (--target gives the final norm, --dataset the loss mask)
          other HDF5        with --map
  writes  DST/store.json, DST/manifest.jsonl, DST/samples/...,
          DST/rejected.jsonl (one line for each rejected file),
          DST/rejected_conversations.jsonl (one line for each conversation of --dataset that cannot be used)

Only tensors are read from the files; code in a pickle is never run. You can kill the command and run it
again: samples in the store are not converted twice. A file that cannot be converted is rejected with a reason
and does not stop the others (unless --strict); the next run tries it again.

examples
  # predict size and time, write nothing
  tools/convert_ckpt_to_hdf5.py cache/hidden_states stores/llama3 \\
      --target meta-llama/Llama-3.1-8B-Instruct --dry-run

  # convert without the target's files; delete each source file after its copy was compared bit for bit
  tools/convert_ckpt_to_hdf5.py cache/hidden_states stores/llama3 \\
      --target-name meta-llama/Llama-3.1-8B-Instruct --aux-layer-ids 1,15,28 --vocab-size 128256 \\
      --delete-source

  # speculators: apply the final norm to the last state, and make the loss mask from the conversations
  tools/convert_ckpt_to_hdf5.py hidden_states stores/qwen --target models/Qwen3-8B \\
      --dataset chats.jsonl --max-length 8192

  # another HDF5 schema: each sample is a group, layers are separate datasets, bfloat16 is stored as integers
  tools/convert_ckpt_to_hdf5.py dump.h5 stores/x --target models/X --map \\
      'input_ids=data/*/tokens, loss_mask=data/*/mask, hidden_state=data/*/last@bf16,
       aux_hidden_state=data/*/l1+data/*/l15+data/*/l28@bf16'

exit codes
  0  every file is in the store (converted now or earlier)
  1  wrong flags, no files, or a store with other settings; one sentence says what to change
  2  the command line cannot be parsed
  3  some files were rejected, all others are in the store; DST/rejected.jsonl gives the reasons
  4  --strict: stopped at the first rejected file
  5  a stored file differs from its source (--verify, --delete-source); it is listed among the rejected files
     and its source is kept
  6  the machine failed: disk full or read-only, or target unreadable; converted samples are kept
  130  interrupted; converted samples are kept
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import eagle_ds  # noqa: F401  before any other package: it names the packages that are missing

# isort: split

from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from eagle_ds.store.processes import start_fork_server

if TYPE_CHECKING:
    from eagle_ds.convert.options import ConvertOptions
    from eagle_ds.convert.run import Progress, Summary
    from eagle_ds.convert.survey import Prediction

SHOWN_REJECTS = 20
LINE_EVERY_S = 10.0
CONTINUE = "what was converted is kept; run the same command again to continue"


def main() -> int:
    """Run the command; return its exit code."""
    arguments = parse_arguments()
    if arguments.workers > 1 and not arguments.dry_run:
        # Start the server before this process imports torch, in the next line: both import it in parallel.
        start_fork_server()
    from eagle_ds.convert.run import ConversionStopped, predict_conversion

    console, errors = Console(highlight=False), Console(stderr=True, highlight=False)
    handler = RichHandler(console=errors, show_path=False, show_time=False, markup=False)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])
    try:
        options = make_options(arguments)
        if arguments.dry_run:
            summary, prediction = predict_conversion(options)
            show_prediction(console, summary, prediction)
        else:
            check_destination(options.destination)
            summary = run(options, errors)
            show_summary(console, summary, options)
    except ValueError as error:
        errors.print(f"error: {error}", markup=False, soft_wrap=True)
        return 1
    except ConversionStopped as error:
        errors.print(f"stopped: {error}", markup=False, soft_wrap=True)
        return 6
    except OSError as error:
        errors.print(f"stopped: {error}; {CONTINUE}", markup=False, soft_wrap=True)
        return 6
    except KeyboardInterrupt:
        errors.print(f"interrupted; {CONTINUE}")
        return 130
    show_rejected(console, summary)
    return exit_code(summary)


def check_destination(folder: Path) -> None:
    """Raise ConversionStopped if the store cannot be written, before any source file is read."""
    from eagle_ds.config.outputs import check_output_folder
    from eagle_ds.convert.run import ConversionStopped

    try:
        check_output_folder(folder, "DST")
    except ValueError as error:
        raise ConversionStopped(str(error)) from error


def parse_arguments() -> argparse.Namespace:
    """Parse the command line. Imports nothing heavy, so that --help is fast."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument(
        "source", metavar="SRC", type=Path, help="a file, or a folder of files of known formats"
    )
    parser.add_argument(
        "destination", metavar="DST", type=Path, help="the store: a new folder, or an earlier run's"
    )
    add_info_flags(parser.add_argument_group("properties that the source files lack").add_argument)
    add = parser.add_argument_group("how to convert").add_argument
    workers = min(8, os.cpu_count() or 1)
    add("--workers", type=int, default=workers, help="processes that convert files (default: %(default)s)")
    add("--strict", action="store_true",
        help="stop at the first rejected file, and at the first conversation of --dataset that is bad")
    add("--verify", action="store_true",
        help="read every stored file back and compare it with its source, bit for bit")
    add("--delete-source", action="store_true",
        help="compare as --verify does, then delete the source file; links are kept")
    add("--dry-run", action="store_true",
        help="check flags and a few files, predict size and time, write nothing")
    return parser.parse_args()


def add_info_flags(add: Callable[..., object]) -> None:
    """Declare the flags for properties that the source files lack."""
    add("--target",
        help="folder or Hugging Face id of the target; gives hidden size, aux layers, vocabulary, norm, "
        "head and tokenizer")
    add("--revision", help="revision of the Hugging Face id")
    add("--target-name", help="name of the target to write into the store (default: --target as given)")
    add("--aux-layer-ids", type=layer_ids, metavar="I,J,K",
        help="the layers whose outputs the files hold, 0-based (default: 1,L//2-1,L-4 for L layers)")
    add("--vocab-size", type=int, help="vocabulary size of the target (default: from --target)")
    add("--dataset", type=Path, metavar="JSONL",
        help="the conversations, to make the loss mask of formats that lack one; needs --target")
    add("--template-kwargs", metavar="JSON",
        help="variables of the chat template that the files were captured with, such as "
        "'{\"enable_thinking\": false}'; the store keeps them, and --dataset is rendered with them")
    add("--max-length", type=int, default=1 << 20,
        help="with --dataset: the length in tokens to which the capture truncated (default: %(default)s)")
    add("--map", metavar="OURS=THEIRS,...",
        help="the path of each dataset in another HDF5 schema; see the last example")
    add("--final-norm", choices=("auto", "apply", "skip"), default="auto",
        help="whether to apply the target's final norm to the last state; auto does what the format needs, "
        "and compares the states with the norm's weight")
    add("--skip-head", action="store_true",
        help="do not compute argmax and log-sum-exp of the target's logits (target_token_id, "
        "target_logsumexp); training then computes them")
    add("--head-device", default="auto", metavar="DEVICE",
        help="device that computes them: cpu, cuda, cuda:1 (default: a GPU if there is one)")
    add("--cast", choices=("bfloat16", "float16", "float32"),
        help="convert hidden states of other dtypes to this one, with rounding")


def layer_ids(text: str) -> tuple[int, ...]:
    """Parse "1,15,28"."""
    return tuple(int(part) for part in text.split(","))


def make_options(arguments: argparse.Namespace) -> ConvertOptions:
    """Turn flags into options. Raises ValueError for flags that contradict each other."""
    from eagle_ds.config.settings import json_object
    from eagle_ds.convert import Hdf5Map
    from eagle_ds.convert.options import ConvertOptions

    flags = vars(arguments)
    same_name = {name: flags[name] for name in ConvertOptions.__dataclass_fields__ if name in flags}
    mapping = Hdf5Map.parse(arguments.map) if arguments.map else None
    same_name["template_kwargs"] = json_object(arguments.template_kwargs, "--template-kwargs")
    return ConvertOptions(**same_name, mapping=mapping, token_labels=not arguments.skip_head)


def run(options: ConvertOptions, errors: Console) -> Summary:
    """Convert, and show one line of progress: updated on a terminal, printed every ten seconds elsewhere."""
    from eagle_ds.convert.run import convert

    begin, last_line = time.monotonic(), time.monotonic()
    with errors.status("reading the source") as status:

        def show(progress: Progress) -> None:
            nonlocal last_line
            text = progress_line(progress, time.monotonic() - begin)
            status.update(text)
            if not errors.is_terminal and time.monotonic() - last_line > LINE_EVERY_S:
                errors.print(text)
                last_line = time.monotonic()

        return convert(options, show)


def progress_line(progress: Progress, seconds: float) -> str:
    """Format files, bytes, speed, remaining time and rejected files."""
    speed = progress.done_bytes / max(seconds, 1e-9)
    remaining_s = (progress.total_bytes - progress.done_bytes) / max(speed, 1e-9)
    files = f"{progress.done_files}/{progress.total_files} files"
    share = f"{gigabytes(progress.done_bytes)} of {gigabytes(progress.total_bytes)}"
    eta = timedelta(seconds=round(remaining_s))
    return f"{files}, {share}, {speed / 1e6:.0f} MB/s, ETA {eta}, {progress.rejected} rejected"


def show_summary(console: Console, summary: Summary, options: ConvertOptions) -> None:
    """Print what was done as a table."""
    title = f"{options.source} -> {options.destination}"
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_row("samples found", f"{summary.found}")
    table.add_row("converted now", f"{summary.converted}")
    table.add_row("stored by an earlier run", f"{summary.already_done}")
    table.add_row("rejected", f"{len(summary.rejected)}")
    if summary.conversations.rejected:
        table.add_row("conversations of --dataset", str(summary.conversations))
    if options.verify or options.delete_source:
        table.add_row("compared with the source, bit for bit", f"{summary.compared}")
    if options.delete_source:
        table.add_row("source files deleted", f"{summary.deleted}")
    if summary.converted:
        trained = summary.trained_tokens / max(1, summary.tokens)
        saved = 1 - summary.stored_bytes / summary.raw_bytes
        speed = summary.raw_bytes / summary.seconds / 1e6
        table.add_row("tokens", f"{summary.tokens:,}, {trained:.1%} trained")
        table.add_row("source files", gigabytes(summary.source_bytes))
        table.add_row("hidden states, raw", gigabytes(summary.raw_bytes))
        table.add_row("stored", f"{gigabytes(summary.stored_bytes)}, {saved:.1%} saved against raw")
        table.add_row("time", f"{summary.seconds:.1f} s, {speed:.0f} MB/s of raw hidden states")
    console.print(table)
    if summary.without_training:
        console.print(f"note: {summary.without_training} samples have no trained token; training skips them")


def show_prediction(console: Console, summary: Summary, prediction: Prediction | None) -> None:
    """Print the result of --dry-run as a table."""
    table = Table(title="dry run, nothing was written", show_header=False, title_justify="left")
    table.add_row("samples found", f"{summary.found}")
    table.add_row("stored by an earlier run", f"{summary.already_done}")
    if prediction is not None:
        saved = 1 - prediction.stored_bytes / max(1, prediction.raw_bytes)
        table.add_row("source files to convert", gigabytes(prediction.source_bytes))
        table.add_row("hidden states, raw", gigabytes(prediction.raw_bytes))
        stored = gigabytes(prediction.stored_bytes)
        table.add_row("predicted size", f"{stored}, {saved:.1%} saved against raw")
        seconds = timedelta(seconds=round(prediction.seconds))
        table.add_row("predicted time", f"{seconds} if the disk does not limit it")
        if prediction.head_s > 0.1 * prediction.seconds:
            head = timedelta(seconds=round(prediction.head_s))
            table.add_row("the target's head alone", f"{head} (--skip-head leaves it out)")
    if summary.info is not None:
        info = summary.info
        table.add_row("target, layers", f"{info.target}, {list(info.aux_layer_ids)}")
        table.add_row("hidden size, dtype", f"{info.hidden_size}, {info.dtype}")
    console.print(table)


def show_rejected(console: Console, summary: Summary) -> None:
    """Print the first rejected files as a table, and how many there are for each reason."""
    from eagle_ds.convert.run import REJECTED_NAME

    if not summary.rejected:
        return
    table = Table("file", "reason", "found and expected", title="rejected", title_justify="left")
    for rejected in summary.rejected[:SHOWN_REJECTS]:
        table.add_row(rejected.path, str(rejected.reason), rejected.detail)
    console.print(table)
    counts = ", ".join(f"{count} {reason}" for reason, count in summary.reasons.most_common())
    console.print(
        f"{len(summary.rejected)} rejected: {counts}; DST/{REJECTED_NAME} lists all of them"
    )


def gigabytes(count: int) -> str:
    """Format a number of bytes."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def exit_code(summary: Summary) -> int:
    """Return the exit code of a conversion that ran (see the help)."""
    from eagle_ds.convert import Reason

    if summary.reasons[Reason.READBACK]:
        return 5
    if summary.rejected:
        return 4 if summary.stopped_early else 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
