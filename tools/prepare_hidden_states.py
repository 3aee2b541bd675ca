#!/usr/bin/env python3
"""Capture the target's hidden states for a file of conversations into a store that training reads.

    tools/prepare_hidden_states.py --recipe recipes/smollm2_cpu.json             # both stores that the recipe names
    tools/prepare_hidden_states.py --recipe recipes/llama3_128k.json --dry-run   # bytes and hours first
    tools/prepare_hidden_states.py --recipe recipes/llama3_128k.json --device all   # on every GPU of this machine
    tools/prepare_hidden_states.py --target Qwen/Qwen3-8B --conversations chats.jsonl --store stores/qwen3 --max-length 32768

Conversations are JSONL: {"id", "conversations": [{"role", "content"}, ...]}, {"messages": [...]} or {"text": ...}. The
tokenizer's own chat template is used; what the target generates is trained, its end-of-turn token included.

Stopped at any moment, the same command goes on with what is missing. A store of another target or of other layers is
refused. Settings after --recipe override the recipe: --data.max_length 16384 --target.dtype float32
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    source = parser.add_argument_group("what to capture, from a recipe")
    source.add_argument("--recipe", type=Path, help="recipes/NAME.json; takes dotted overrides")
    source.add_argument("--split", choices=["train", "eval", "both"], default="both", help="which of the recipe's stores (default: both)")
    flags = parser.add_argument_group("what to capture, by flags")
    flags.add_argument("--target", help="Hugging Face id or local folder")
    flags.add_argument("--conversations", type=Path, help="JSONL file")
    flags.add_argument("--store", type=Path, help="folder of the store, made or gone on with")
    flags.add_argument("--max-length", type=int, help="longest sample in tokens")
    flags.add_argument("--overlong", choices=["truncate", "skip"], default="truncate", help="what to do with longer ones")
    flags.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16", help="of the target's arithmetic")
    flags.add_argument("--aux-layer-ids", type=int, nargs="+", help="layer outputs to capture (default: 1, L//2-1, L-4)")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--device",
        default="auto",
        help="cuda, cuda:1, cpu; all: a process with its own copy of the target on every GPU; split: one target over all GPUs "
        "(default: a GPU if there is one)",
    )
    how.add_argument("--attention", default="sdpa", help="transformers' attention: sdpa, eager, flash_attention_2 (default: %(default)s)")
    how.add_argument("--batch-tokens", type=int, help="tokens of short samples computed together")
    how.add_argument("--chunk-tokens", type=int, help="longest piece of a sample computed at once")
    how.add_argument("--limit", type=int, help="only the first so many samples of each file")
    how.add_argument("--limit-eval", type=int, help="another limit for the held-out file")
    how.add_argument("--dry-run", action="store_true", help="print samples, bytes and hours, write nothing")
    return parser.parse_known_args(argv)


def main(argv: list[str] | None = None) -> int:
    args, overrides = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        run(args, overrides)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    from eagle_ds.capture.job import prepare_capture, require_space
    from eagle_ds.config.outputs import check_output_folder
    from eagle_ds.launch import enter_repository

    enter_repository(args)
    recipe = read_recipe(args, overrides)
    devices = devices_of(args.device)
    captures = jobs(args, recipe)
    if not args.dry_run:
        for job in captures:
            check_output_folder(Path(job.store), "store")
    plans = [prepare_capture(job) for job in captures]  # what is wrong with the last one is said before the first takes hours
    for plan in plans:
        job = plan.job
        print(f"{job.conversations} -> {job.store}: {plan.stats}; {plan.num_stored} samples stored already, {len(plan.pending)} to do", flush=True)
        if not args.dry_run:
            require_space(plan)
    for plan in plans:
        if args.dry_run:
            forecast(plan, len(devices))
        else:
            execute(plan, devices)
    if recipe and not args.dry_run and args.split != "eval":
        choose_vocabulary(recipe)


def read_recipe(args: argparse.Namespace, overrides: list[str]):
    """The recipe, its sizes checked against the target; None where the capture is described by flags."""
    if not args.recipe:
        if overrides:
            raise ValueError(f"unknown arguments {' '.join(overrides)}; dotted overrides need --recipe")
        return None
    from eagle_ds.capture.job import check_recipe_target
    from eagle_ds.config.recipe import load_recipe

    recipe = load_recipe(args.recipe, overrides)
    check_recipe_target(recipe)
    return recipe


def devices_of(device: str) -> list[str]:
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
            raise ValueError(f"--device {one} needs a GPU and none can be seen; leave it out, or use --device cpu")
    return devices


def jobs(args: argparse.Namespace, recipe) -> list:
    """The captures asked for."""
    import torch

    from eagle_ds.capture.hf import ForwardLimits
    from eagle_ds.capture.job import CaptureJob

    on_gpu = torch.cuda.is_available() and not args.device.startswith("cpu")
    usual = ForwardLimits.for_device(torch.device("cuda" if on_gpu else "cpu"))
    limits = ForwardLimits(args.batch_tokens or usual.batch_tokens, args.chunk_tokens or usual.chunk_tokens)
    how = {"device": devices_of(args.device)[0], "attention": args.attention, "limits": limits}
    limit = {"train": args.limit, "eval": args.limit if args.limit_eval is None else args.limit_eval}
    if recipe:
        splits = [args.split] if args.split != "both" else ["train", "eval"] if recipe.data.eval_store else ["train"]
        return [CaptureJob.from_recipe(recipe, split, limit_samples=limit[split], **how) for split in splits]
    needed = ("target", "conversations", "store", "max_length")
    if missing := [f"--{name.replace('_', '-')}" for name in needed if getattr(args, name) is None]:
        raise ValueError(f"give --recipe, or {', '.join(missing)} as well")
    layers = tuple(args.aux_layer_ids) if args.aux_layer_ids else None
    chosen = {name: getattr(args, name) for name in (*needed, "overlong", "dtype")}
    return [CaptureJob(**chosen, aux_layer_ids=layers, limit_samples=args.limit, **how)]


def choose_vocabulary(recipe) -> None:
    """Count the trained tokens and save the draft vocabulary beside them, so that training finds it there."""
    from eagle_ds.data.vocab import load_or_build, vocab_path
    from eagle_ds.store.store import Store

    load_or_build(Store(recipe.data.store), recipe.draft.vocab_size)
    print(f"{vocab_path(recipe.data.store, recipe.draft.vocab_size)}: draft vocabulary of {recipe.draft.vocab_size} tokens")


def forecast(plan, processes: int) -> None:
    """What the capture will take on disk and in time, the latter from two timed passes of the target."""
    from eagle_ds.capture.run import predict_seconds

    stored, raw, free = (size / 1e9 for size in (plan.estimate().store_bytes, plan.estimate().raw_bytes, plan.estimate().free_bytes))
    print(f"{plan.job.store}: to write {stored:.2f} GB ({raw:.2f} GB of states before encoding); free: {free:.1f} GB")
    if plan.pending:
        seconds = predict_seconds(plan) / processes
        rate = plan.tokens / seconds
        print(
            f"{plan.job.store}: to compute {plan.tokens} tokens in about {seconds / 3600:.2f} hours at {rate:.0f} tokens/s on this machine"
        )


def execute(plan, devices: list[str]) -> None:
    from tqdm import tqdm

    from eagle_ds.capture.devices import capture_on_devices
    from eagle_ds.capture.run import capture

    with tqdm(total=plan.tokens, unit="tokens", unit_scale=True, smoothing=0.1) as bar:
        count = capture(plan, bar.update) if len(devices) == 1 else capture_on_devices(plan, devices, bar.update)
        rate = bar.n / max(bar.format_dict["elapsed"], 1e-9)
    print(f"{plan.job.store}: {count} samples written, {plan.num_stored} were there, {rate:.0f} tokens/s")


if __name__ == "__main__":
    sys.exit(main())
