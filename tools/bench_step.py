#!/usr/bin/env python
"""Time a training step on random features, through the code that trains: forward, backward, optimizer.

    deepspeed --num_gpus 4 tools/bench_step.py --seq 131072 --ulysses 4
    deepspeed --num_gpus 4 tools/bench_step.py --seq 131072 --trained-fraction 0.1 --turn 512 --ulysses 4
    deepspeed --num_gpus 2 tools/bench_step.py --seq 32768 --ulysses 1 --ring 2 --ring-mode p2p
    deepspeed --num_gpus 1 tools/bench_step.py --seq 4096 --documents 32           (packed: 32 samples of 4096)

Rank 0 prints one JSON line for each run: milliseconds by phase, tokens/s a GPU, trained rows/s, model TFLOP/s, the floor of this shape
from rates measured in the same run, the ratio to it, and the peak memory. --sweep runs several lengths and fractions:
    deepspeed --num_gpus 1 tools/bench_step.py --sweep 16384:1 32768:1 131072:0.1 --json results.jsonl
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eagle_ds.config import Recipe, load_recipe

MODELS = {"llama3_8b": "recipes/llama3_128k.json", "smollm2": "recipes/smollm2_cpu.json"}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama3_8b", help="sizes of the draft and its target")
    parser.add_argument("--seq", type=int, default=32768, help="tokens of each document")
    parser.add_argument("--documents", type=int, default=1, help="documents packed into the sequence")
    parser.add_argument("--trained-fraction", type=float, default=1.0, help="fraction of tokens trained, in turns")
    parser.add_argument("--turn", type=int, default=512, help="trained tokens in a row")
    parser.add_argument("--sweep", nargs="+", metavar="SEQ:FRACTION", help="several shapes in one start")
    parser.add_argument("--ulysses", type=int, default=1)
    parser.add_argument("--ring", type=int, default=1)
    parser.add_argument("--ring-mode", choices=("auto", "gather", "p2p"), default="auto")
    parser.add_argument("--all-rows", action="store_true", help="work on untrained rows too, as trainers without the plan do")
    parser.add_argument("--recompute", choices=("none", "mlp", "full"), default="full")
    parser.add_argument("--deepspeed-config", help="default: the recipe's")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", type=Path, help="append the lines to this file too")
    parser.add_argument("--profile", type=Path, help="write a Chrome trace of one more step here, and print where its time goes")
    parser.add_argument("--local_rank", type=int, default=int(os.environ.get("LOCAL_RANK", 0)), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    os.chdir(Path(__file__).resolve().parents[1])
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29511}.items():
        os.environ.setdefault(name, str(value))
    logging.basicConfig(level=logging.WARNING)
    shapes = [(int(s), float(f)) for s, f in (x.split(":") for x in options.sweep or [])] or [(options.seq, options.trained_fraction)]
    for tokens, fraction in shapes:
        run(options, tokens, fraction)


def make_recipe(options: argparse.Namespace, tokens: int) -> Recipe:
    overrides = {
        "data.max_length": tokens,
        "data.pack_tokens": tokens * options.documents,
        "parallel.ulysses": options.ulysses,
        "parallel.ring": options.ring,
        "parallel.ring_mode": options.ring_mode,
        "parallel.trained_rows_only": json.dumps(not options.all_rows),
        "training.recompute": options.recompute,
    }
    if options.deepspeed_config:
        overrides["deepspeed"] = options.deepspeed_config
    return load_recipe(MODELS[options.model], [word for name, value in overrides.items() for word in (f"--{name}", str(value))])


def run(options: argparse.Namespace, tokens: int, fraction: float) -> None:
    """One shape. A shape that does not fit says so and lets the next one run."""
    import torch

    from eagle_ds.bench.step import StepBench, measure_ceilings, summary
    from eagle_ds.ds_config import deepspeed_config, read_ds_json
    from eagle_ds.engine.world import join_world
    from eagle_ds.planner import in_turns

    recipe = make_recipe(options, tokens)
    world = join_world(recipe.parallel, options.local_rank)
    config = deepspeed_config(recipe, read_ds_json(recipe.deepspeed), world.topology.world_size)
    config.pop("tensorboard", None)
    on_gpu = world.device.type == "cuda"
    bench = StepBench(recipe, config, [in_turns(tokens, fraction, options.turn)] * options.documents, world)
    try:
        line = summary(recipe, bench.plan, bench.run(options.steps), measure_ceilings(world.device) if on_gpu else None)
        if options.profile:
            profile(bench, options.profile, world.is_first)
    except torch.cuda.OutOfMemoryError as error:
        line = {"tokens": tokens, "fraction": fraction, "error": "out of memory", "detail": str(error).split(". ")[0]}
    line = {"model": options.model, "gpus": world.topology.world_size, "fraction": fraction, "turn": options.turn} | line
    if world.is_first:
        print(json.dumps(line), flush=True)
        if options.json:
            with options.json.open("a") as file:
                file.write(json.dumps(line) + "\n")
    del bench
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()


def profile(bench: object, path: Path, is_first: bool) -> None:
    """One step under torch.profiler."""
    import torch
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with torch.profiler.profile(activities=activities) as recorded:
        bench.step()
    if is_first:
        key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        print(recorded.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=70))
        recorded.export_chrome_trace(str(path))


if __name__ == "__main__":
    main()
