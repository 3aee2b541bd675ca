#!/usr/bin/env python3
"""Capture the target's hidden states for a file of conversations into a store that training reads.

examples
  # both stores that the recipe names
  tools/prepare_hidden_states.py --recipe recipes/smollm2_cpu.json

  # predict bytes and hours, write nothing
  tools/prepare_hidden_states.py --recipe recipes/llama3_128k.json --dry-run

  # on every GPU of this machine
  tools/prepare_hidden_states.py --recipe recipes/llama3_128k.json --device all

  # without a recipe
  tools/prepare_hidden_states.py --target Qwen/Qwen3-8B --conversations chats.jsonl --store stores/qwen3 \\
      --max-length 32768

Conversations are a file (JSONL, a JSON array, either of them in gzip or zstd, or Parquet), or the id of a
data set on the Hugging Face hub (owner/name or owner/name:split). Records are {"id", "messages": [{"role",
"content"}, ...], "tools": [...]}, ShareGPT's {"conversations": [{"from", "value"}, ...]}, {"instruction",
"input", "output"}, {"prompt", "completion"} or {"text"}; docs/quickstart.md lists every shape. They are
rendered with the tokenizer's own chat template. The loss mask selects the tokens that the target generates,
end-of-turn tokens included. What the template ignores is counted and logged once.

A record that cannot be used is rejected: rejected.jsonl in the store lists line, id and reason. With
--strict, the first one ends the command.

You can stop the command at any moment; run it again to capture what is missing. A store of another target, of
other layers or of other template variables is refused. Options such as --data.max_length 16384
--target.dtype float32 after --recipe override the recipe's settings.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if TYPE_CHECKING:
    from eagle_ds.capture.job import CaptureJob, PreparedCapture
    from eagle_ds.config.recipe import Recipe


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Parse the command line. Returns the flags, and the arguments that may be overrides of the recipe."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain, allow_abbrev=False)
    add = parser.add_argument_group("what to capture, from a recipe").add_argument
    add("--recipe", type=Path, help="recipes/NAME.json; dotted overrides may follow")
    add("--split", choices=["train", "eval", "both"], default="both",
        help="which of the recipe's stores to fill (default: %(default)s)")
    add = parser.add_argument_group("what to capture, without a recipe").add_argument
    add("--target", help="Hugging Face id or local folder of the target")
    add("--conversations", type=Path, help="file of conversations, or the id of a data set on the hub")
    add("--store", type=Path, help="folder of the store: a new one, or one to continue")
    add("--max-length", type=int, help="longest sample in tokens")
    add("--overlong", choices=["truncate", "skip"], default="truncate",
        help="what to do with a longer conversation (default: %(default)s)")
    add("--template-kwargs", metavar="JSON",
        help="variables of the chat template, such as '{\"enable_thinking\": false}'; with a recipe: "
        "--target.template_kwargs")
    add("--duplicates", choices=["reject", "suffix"], default="reject",
        help="what to do with a record whose id an earlier, other one has: reject it, or append a suffix to "
        "its id (default: %(default)s)")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16",
        help="dtype that the target computes in (default: %(default)s)")
    add("--aux-layer-ids", type=int, nargs="+",
        help="layers whose outputs are captured, 0-based (default: 1, L//2-1, L-4 for L layers)")
    add = parser.add_argument_group("how to capture").add_argument
    add("--device", default="auto",
        help="cuda, cuda:1 or cpu; all: one process per GPU, each with its own copy of the target; split: "
        "one copy of the target, its layers spread over all GPUs (default: a GPU if there is one)")
    add("--attention", default="sdpa",
        help="attention of transformers: sdpa, eager, flash_attention_2 (default: %(default)s)")
    add("--batch-tokens", type=int,
        help="tokens per batch of short samples, padding included (default: 16384 on a GPU, 2048 on a CPU)")
    add("--chunk-tokens", type=int,
        help="tokens of a long sample that one pass computes (default: 8192 on a GPU, 2048 on a CPU)")
    add("--limit", type=int, help="capture only this many samples of each file")
    add("--limit-eval", type=int, help="the same for the evaluation file (default: --limit)")
    add("--strict", action="store_true", help="stop at the first record that cannot be used")
    add("--dry-run", action="store_true", help="print samples, bytes and hours, write nothing")
    return parser.parse_known_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code: 0, 1 for an error, 130 if interrupted."""
    args, overrides = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        run(args, overrides)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; run the same command again to continue", file=sys.stderr)
        return 130
    return 0


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    """Prepare all captures, then run them: an error in the last one must not appear only hours later."""
    from eagle_ds.capture.job import prepare_capture, require_space
    from eagle_ds.config.outputs import check_output_folder
    from eagle_ds.launch import enter_repository

    enter_repository(args)
    recipe = read_recipe(args, overrides)
    devices = parse_devices(args.device)
    jobs = make_jobs(args, recipe)
    if not args.dry_run:
        for job in jobs:
            check_output_folder(Path(job.store), "store")
    captures = [prepare_capture(job) for job in jobs]
    for prepared in captures:
        counts = f"{prepared.num_stored} samples stored already, {len(prepared.pending)} to do"
        paths = f"{prepared.job.conversations} -> {prepared.job.store}"
        # What was rejected, skipped or ignored is logged.
        print(f"{paths}: {prepared.stats.parts()[0]}; {counts}", flush=True)
        if not args.dry_run:
            require_space(prepared)
    for prepared in captures:
        if args.dry_run:
            print_prediction(prepared, len(devices))
        else:
            capture_with_progress(prepared, devices)
    if recipe and not args.dry_run and args.split != "eval":
        choose_vocabulary(recipe)


def read_recipe(args: argparse.Namespace, overrides: list[str]) -> Recipe | None:
    """Read the recipe and check its sizes against the target; None if the capture is described by flags."""
    if not args.recipe:
        if overrides:
            raise ValueError(f"unknown arguments {' '.join(overrides)}; dotted overrides need --recipe")
        return None
    from eagle_ds.capture.job import check_recipe_target
    from eagle_ds.config.recipe import load_own_recipe

    recipe = load_own_recipe(args.recipe, overrides)
    check_recipe_target(recipe)
    return recipe


def parse_devices(device: str) -> list[str]:
    """Turn --device into a list of devices, one per process. Raises ValueError if a device is missing."""
    import torch

    if device == "all":
        if not torch.cuda.is_available():
            raise ValueError("--device all needs GPUs and there are none; leave it out, or use --device cpu")
        return [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    devices = device.split(",")
    for one in devices:
        kind = one.partition(":")[0]
        if kind not in ("auto", "cpu", "cuda", "split"):
            raise ValueError(f"--device {one} is unknown; use auto, cpu, cuda, cuda:N, all or split")
        if kind in ("cuda", "split") and not torch.cuda.is_available():
            advice = "leave it out, or use --device cpu"
            raise ValueError(f"--device {one} needs a GPU and none can be seen; {advice}")
    return devices


def make_jobs(args: argparse.Namespace, recipe: Recipe | None) -> list[CaptureJob]:
    """Make the captures that the recipe and the flags describe, one for each store."""
    import torch

    from eagle_ds.capture.hf import ForwardLimits
    from eagle_ds.capture.job import CaptureJob
    from eagle_ds.config.settings import json_object

    on_gpu = torch.cuda.is_available() and not args.device.startswith("cpu")
    default = ForwardLimits.for_device(torch.device("cuda" if on_gpu else "cpu"))
    batch_tokens = args.batch_tokens or default.batch_tokens
    limits = ForwardLimits(batch_tokens, args.chunk_tokens or default.chunk_tokens)
    how = {"device": parse_devices(args.device)[0], "attention": args.attention, "limits": limits}
    how["strict"] = args.strict
    limit_eval = args.limit if args.limit_eval is None else args.limit_eval
    limits_of = {"train": args.limit, "eval": limit_eval}
    if recipe:
        if args.template_kwargs:
            given = f"--template-kwargs {args.template_kwargs}"
            raise ValueError(f"{given} needs a capture without a recipe; give --target.template_kwargs")
        both = ["train", "eval"] if recipe.data.eval_store else ["train"]
        splits = both if args.split == "both" else [args.split]
        return [CaptureJob.from_recipe(recipe, one, limit_samples=limits_of[one], **how) for one in splits]
    needed = ("target", "conversations", "store", "max_length")
    if missing := [f"--{name.replace('_', '-')}" for name in needed if getattr(args, name) is None]:
        raise ValueError(f"give --recipe, or {', '.join(missing)} as well")
    layers = tuple(args.aux_layer_ids) if args.aux_layer_ids else None
    flags = {name: getattr(args, name) for name in (*needed, "overlong", "duplicates", "dtype")}
    flags["template_kwargs"] = json_object(args.template_kwargs, "--template-kwargs")
    return [CaptureJob(**flags, aux_layer_ids=layers, limit_samples=args.limit, **how)]


def choose_vocabulary(recipe: Recipe) -> None:
    """Count the trained tokens and save the draft vocabulary into the store, where training looks for it."""
    from eagle_ds.data.vocab import load_or_build, vocab_path
    from eagle_ds.store.store import Store

    size = recipe.draft.vocab_size
    load_or_build(Store(recipe.data.store), size)
    print(f"{vocab_path(recipe.data.store, size)}: draft vocabulary of {size} tokens")


def print_prediction(prepared: PreparedCapture, processes: int) -> None:
    """Print the predicted disk space and time. The time comes from two timed passes of the target."""
    from eagle_ds.capture.run import predict_seconds

    estimate, store = prepared.estimate(), prepared.job.store
    sizes = (estimate.store_bytes, estimate.raw_bytes, estimate.free_bytes)
    stored, raw, free = (size / 1e9 for size in sizes)
    print(f"{store}: to write {stored:.2f} GB ({raw:.2f} GB of states before encoding); free: {free:.1f} GB")
    if prepared.pending:
        seconds = predict_seconds(prepared) / processes
        rate = estimate.tokens / seconds
        duration = f"about {seconds / 3600:.2f} hours at {rate:.0f} tokens/s on this machine"
        print(f"{store}: to compute {estimate.tokens} tokens in {duration}")


def capture_with_progress(prepared: PreparedCapture, devices: list[str]) -> None:
    """Capture on the devices, with a progress bar in tokens."""
    from tqdm import tqdm

    from eagle_ds.capture.devices import capture_on_devices
    from eagle_ds.capture.run import capture

    with tqdm(total=prepared.tokens, unit="tokens", unit_scale=True, smoothing=0.1) as bar:
        if len(devices) == 1:
            count = capture(prepared, bar.update)
        else:
            count = capture_on_devices(prepared, devices, bar.update)
        rate = bar.n / max(bar.format_dict["elapsed"], 1e-9)
    present = f"{prepared.num_stored} were there already"
    print(f"{prepared.job.store}: {count} samples written, {present}, {rate:.0f} tokens/s")


if __name__ == "__main__":
    sys.exit(main())
