#!/usr/bin/env python3
"""Time a training step on random hidden states, through the code that trains: forward, backward, optimizer.

    deepspeed --num_gpus 4 tools/bench_step.py --seq 131072 --ulysses 4
    deepspeed --num_gpus 4 tools/bench_step.py --seq 131072 --trained-fraction 0.1 --turn 512 --ulysses 4
    deepspeed --num_gpus 2 tools/bench_step.py --seq 32768 --ulysses 1 --ring 2 --ring-mode p2p
    deepspeed --num_gpus 1 tools/bench_step.py --seq 4096 --documents 32    (a pack of 32 documents)

WHAT IT PRINTS. Rank 0 prints one JSON line per run; other messages go to the error stream.
    step_ms                  mean milliseconds of the slowest rank; forward_ms etc. are its phases
    peak_gib                 peak memory of the fullest GPU; includes resident_gib and kept_gib
    floor_ms                 time of this shape's floating-point work at rates measured in the same run
    ratio_to_floor           step_ms / floor_ms; 1 is ideal
    tflops_per_gpu           operations per second; the backward of flash attention counts as 2.5 forwards
    mfu                      the model's operations (backward: 2 forwards) / the data sheet's bfloat16 peak

FROM DISK. --from-store times the same steps twice: first from memory, then from HDF5 files through the
trainer's reader, prefetch and copies. If there is no store of this shape below FOLDER, it is made. Its states
are random, so a draft learns nothing from it, but its size and compression are about those of real states
(before compression 1 GB for 32K tokens, 4.3 GB for 128K). The second line adds data_wait_ms, read_ms (time to
read one sequence in the background; a step waits only if this is longer than the step) and
slower_than_memory.
    deepspeed --num_gpus 4 tools/bench_step.py --seq 131072 --ulysses 4 --from-store /data/bench

SEVERAL SHAPES. --sweep runs several shapes in one start. --out DIR appends the lines to DIR/steps.jsonl and
makes tables and pictures of all lines in it. If runs on 1, 2 and 4 GPUs write into one DIR, you also get the
picture of strong scaling, and memory.md, which compares each rank's memory with 1/P of one GPU's. On one GPU,
a shape that does not fit gets a line with an error, and the next shape runs. On several GPUs it ends the run
and says what would fit; earlier lines are kept. --plot draws the pictures from such files, on any machine.
    deepspeed --num_gpus 1 tools/bench_step.py --sweep 16384:1 32768:1 131072:0.1 --out results
    tools/bench_step.py --plot results/steps.jsonl more.jsonl --out results

RANKS THAT SHARE A GPU. --share-gpu measures the memory of a layout if there are too few GPUs for it. NCCL
refuses two ranks on one GPU, so the ranks exchange tensors through host memory. peak_gib is right for each
rank. The line has the key shared_gpu: its times mean nothing, and no table or picture uses them.
    torchrun --nproc_per_node 4 tools/bench_step.py --share-gpu --seq 32768 --ulysses 4 --out results

ONE RANK ALONE. --alone-of N measures on one GPU what a layout costs on each of N GPUs. The process does the
work of one rank of N in that rank's memory; by default that of the busiest rank of the first shape. Data from
other ranks are replaced by synthetic data, so there is no communication and the losses mean nothing. Tables
and pictures say "one rank alone", and the scaling picture leaves such lines out.
    tools/bench_step.py --alone-of 4 --ulysses 4 --seq 131072 --out results

WHERE THE TIME GOES. --profile trace.json writes a Chrome trace of two steps (chrome://tracing,
ui.perfetto.dev) and a table of the second step's GPU time by category and phase. The table also shows which
share of the communication overlaps with computation.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eagle_ds.bench.plots import write_results
from eagle_ds.bench.results import read_results
from eagle_ds.config.outputs import check_output_file, check_output_folder
from eagle_ds.config.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from eagle_ds.bench.step import StepBench
    from eagle_ds.sharding.sequence import Document
    from eagle_ds.store.store import Store
    from eagle_ds.training.world import World

ROOT = Path(__file__).resolve().parents[1]
MODELS = {"llama3_8b": "recipes/llama3_128k.json", "smollm2": "recipes/smollm2_cpu.json"}
OFFLOAD = "--offload-activations"
# The recipe's settings in messages about memory -> this tool's options.
FLAGS = {
    "--training.offload_activations true": OFFLOAD,
    "--training.": "--",
    "--parallel.": "--",
    "data.max_length": "--seq",
}
# Time more steps from a store: the first batches were read in advance, while the engine warmed up.
STEPS, STEPS_FROM_STORE = 3, 8


def sweep_shape(text: str) -> tuple[int, float]:
    """Parse 131072:0.1 as (131072, 0.1). Without a fraction every row is trained."""
    tokens, _, fraction = text.partition(":")
    try:
        return int(tokens), float(fraction or 1)
    except ValueError as error:
        message = f"{text!r} is not SEQ:FRACTION; write 131072:0.1, or 131072 for all rows"
        raise argparse.ArgumentTypeError(message) from error


def parse() -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add_shape(parser)
    add_layout(parser)
    add_run(parser)
    options = parser.parse_args()
    check(parser, options)
    return options


def add_shape(parser: argparse.ArgumentParser) -> None:
    shape = parser.add_argument_group("shape")
    shape.add_argument("--model", choices=MODELS, default="llama3_8b", help="sizes of draft and target")
    shape.add_argument("--recipe", type=Path, help="take the sizes from this recipe JSON instead")
    shape.add_argument("--seq", type=int, default=32768, help="tokens of each document")
    shape.add_argument("--documents", type=int, default=1, help="documents packed into the sequence")
    shape.add_argument(
        "--trained-fraction", type=float, default=1.0, help="fraction of tokens trained, in turns"
    )
    shape.add_argument("--turn", type=int, default=512, help="length of a turn: consecutive trained tokens")
    shape.add_argument(
        "--sweep", nargs="+", type=sweep_shape, metavar="SEQ:FRACTION", help="several shapes in one start"
    )
    shape.add_argument("--ttt-steps", type=int, help="T; default: the recipe's, 7")


def add_layout(parser: argparse.ArgumentParser) -> None:
    layout = parser.add_argument_group("layout and settings")
    layout.add_argument("--ulysses", type=int, default=1)
    layout.add_argument("--ring", type=int, default=1)
    layout.add_argument("--ring-mode", choices=("auto", "gather", "p2p"), default="auto")
    layout.add_argument("--share-gpu", action="store_true", help="let ranks share GPUs; times mean nothing")
    layout.add_argument("--alone-of", type=int, metavar="N", help="do the work of one rank of N, alone")
    layout.add_argument("--alone-rank", type=int, metavar="RANK", help="which rank; default: the busiest")
    layout.add_argument(
        "--all-rows", action="store_true", help="compute untrained rows too, as other trainers do"
    )
    recompute = ("none", "selective", "mlp", "full")
    full = "default: full, which needs the least memory"
    layout.add_argument("--recompute", choices=recompute, default="full", help=full)
    offload = "keep the activations of the TTT steps in pinned host memory"
    layout.add_argument(OFFLOAD, action="store_true", help=offload)
    layout.add_argument("--deepspeed-config", help="default: the recipe's")


def add_run(parser: argparse.ArgumentParser) -> None:
    store = parser.add_argument_group("from disk")
    store.add_argument(
        "--from-store", type=Path, metavar="FOLDER", help="also time steps from HDF5 files; made if missing"
    )
    samples = "samples of that store; default: 4 (2 beyond 64K tokens), but enough for two steps"
    store.add_argument("--store-samples", type=int, help=samples)
    processes = "reading processes per rank; 0 means a thread; default: the recipe's"
    store.add_argument("--read-processes", type=int, help=processes)
    store.add_argument("--prefetch", type=int, help="sequences read ahead; default: the recipe's")
    run = parser.add_argument_group("run and results")
    steps = f"timed steps; default: {STEPS}, with --from-store {STEPS_FROM_STORE}"
    run.add_argument("--steps", type=int, help=steps)
    warmup = "steps before the timed ones; default: 1; with 0 the times include compilation"
    run.add_argument("--warmup", type=int, default=1, help=warmup)
    run.add_argument("--json", type=Path, help="append the lines here; with --out default DIR/steps.jsonl")
    run.add_argument(
        "--out", type=Path, metavar="DIR", help="write tables and pictures of all lines in that file"
    )
    run.add_argument(
        "--plot", type=Path, nargs="+", metavar="JSONL", help="measure nothing; draw these results into --out"
    )
    run.add_argument(
        "--profile", type=Path, help="write a Chrome trace (.json or .json.gz) and a table of it"
    )
    run.add_argument(
        "--sample-memory", action="store_true", help="run one more step; report each phase's peak memory"
    )
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    parser.add_argument("--local_rank", type=int, default=local_rank, help=argparse.SUPPRESS)


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with a usage error for options that contradict each other."""
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps {options.steps}: give 1 or more")
    if options.warmup < 0:
        parser.error(f"--warmup {options.warmup}: give 0 or more steps")
    if options.plot and not options.out:
        parser.error("--plot needs --out DIR for its files")
    launched = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if options.alone_of and (options.share_gpu or options.from_store or launched):
        wrong = "the launcher, --share-gpu and --from-store"
        parser.error(f"--alone-of runs a single process that reads no store; leave out {wrong}")
    if options.alone_rank is not None and not options.alone_of:
        parser.error("--alone-rank chooses one of the ranks that --alone-of N sets; give both")


def main() -> None:
    options = parse()
    for name in ("recipe", "from_store", "json", "out", "profile"):
        setattr(options, name, getattr(options, name) and getattr(options, name).resolve())
    try:
        for name in ("json", "profile"):
            if path := getattr(options, name):
                check_output_file(path, f"--{name}")
        if options.out:
            check_output_folder(options.out, "--out")
        if options.from_store and not options.from_store.is_dir():
            check_output_folder(options.from_store, "--from-store")
        if options.plot:
            draw(options.plot, options.out)
        else:
            measure(options)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def draw(files: list[Path], folder: Path) -> None:
    for path in write_results(read_results(files), folder):
        print(f"wrote {path}", file=sys.stderr)


def measure(options: argparse.Namespace) -> None:
    """Measure every shape; record the lines, and draw them with --out."""
    os.chdir(ROOT)
    # Without a launcher, set the variables that a launcher sets.
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    for name, value in alone.items():
        os.environ.setdefault(name, str(value))
    is_first = os.environ["RANK"] == "0"
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("eagle_ds.bench").setLevel(logging.INFO if is_first else logging.WARNING)
    shapes = options.sweep or [(options.seq, options.trained_fraction)]
    file = file_of(options)
    for tokens, fraction in shapes:
        lines = run(options, tokens, fraction)
        if is_first:
            record(lines, file)
    if is_first and options.out:
        draw([file], options.out)


def file_of(options: argparse.Namespace) -> Path | None:
    """Return the file to which lines are appended, if any."""
    return options.json or (options.out / "steps.jsonl" if options.out else None)


def record(lines: list[dict[str, Any]], file: Path | None) -> None:
    texts = [json.dumps(line) for line in lines]
    print("\n".join(texts), flush=True)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as stream:
            stream.writelines(f"{text}\n" for text in texts)


def make_recipe(options: argparse.Namespace, tokens: int) -> Recipe:
    overrides = {
        "data.max_length": tokens,
        "data.pack_tokens": tokens * options.documents,
        "data.read_processes": options.read_processes,
        "data.prefetch": options.prefetch,
        "parallel.ulysses": options.ulysses,
        "parallel.ring": options.ring,
        "parallel.ring_mode": options.ring_mode,
        "parallel.trained_rows_only": json.dumps(not options.all_rows),
        "training.recompute": options.recompute,
        "training.offload_activations": "true" if options.offload_activations else None,
        "training.ttt_steps": options.ttt_steps,
        "deepspeed": options.deepspeed_config,
    }
    words = []
    for name, value in overrides.items():
        if value is not None:
            words += [f"--{name}", str(value)]
    return load_recipe(options.recipe or MODELS[options.model], words)


def run(options: argparse.Namespace, tokens: int, fraction: float) -> list[dict[str, Any]]:
    """Measure one shape; return its lines.

    On one GPU, a shape that does not fit gives a line that says so. With several ranks, the rank that runs
    out of memory leaves at once: the others wait for it in a collective, and the launcher ends them.
    """
    from eagle_ds.bench.step import forget_benches
    from eagle_ds.bench.synthetic_data import document_in_exact_turns
    from eagle_ds.training.sizing import is_out_of_memory
    from eagle_ds.training.stopping import leave_at_once

    recipe, document = make_recipe(options, tokens), document_in_exact_turns(tokens, fraction, options.turn)
    world = join(options, recipe, [document] * options.documents)
    topology = world.topology
    alone = {"alone_of": topology.world_size, "alone_rank": topology.rank}
    shape = {
        "model": options.recipe.stem if options.recipe else options.model,
        "gpus": world.topology.world_size,
        "fraction": fraction,
        "turn": options.turn,
        **({"offload_activations": True} if options.offload_activations else {}),
        **({"shared_gpu": True} if options.share_gpu else {}),
        **(alone if options.alone_of else {}),
    }
    try:
        return [shape | line for line in time_shape(options, recipe, world, document, fraction)]
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        if world.topology.world_size > 1 and not options.alone_of:
            message = does_not_fit(options, recipe, world, document, error)
            leave_at_once(f"error (rank {world.topology.rank}): {message}", 1)
        layout = {"layout": f"U{options.ulysses} R{options.ring}", "recompute": options.recompute}
        layout["ttt_steps"] = recipe.training.ttt_steps
        size = {"tokens": tokens * options.documents, "documents": options.documents}
        failure = {"error": "out of memory", "detail": str(error).split(". ")[0]}
        return [shape | size | layout | failure]
    finally:
        forget_benches(world.device)


def join(options: argparse.Namespace, recipe: Recipe, documents: list[Document]) -> World:
    """Join the ranks that the launcher started, or be one rank of a simulated world."""
    from eagle_ds.bench.simulated_world import alone_world, join_shared_gpu
    from eagle_ds.training.world import join_world

    if options.alone_of:
        size, rank = options.alone_of, options.alone_rank
        return alone_world(recipe, documents, options.local_rank, size, rank)
    return (join_shared_gpu if options.share_gpu else join_world)(recipe.parallel, options.local_rank)


def does_not_fit(
    options: argparse.Namespace, recipe: Recipe, world: World, document: Document, error: RuntimeError
) -> str:
    """Return a message: what ran out of memory, which options would fit, and where earlier lines are."""
    from eagle_ds.config.deepspeed import bf16_enabled, deepspeed_config, read_ds_json
    from eagle_ds.estimate.fit import choose_ring_mode
    from eagle_ds.estimate.sequences import sharding_for
    from eagle_ds.training.sizing import after_out_of_memory, setup_of

    config = deepspeed_config(recipe, read_ds_json(recipe.deepspeed), world.topology.world_size)
    documents = [document] * options.documents
    tokens, element = len(documents) * document.num_tokens, 2 if bf16_enabled(config) else 4
    mode = choose_ring_mode(recipe, tokens, element, world.memory_bytes)
    sharding = sharding_for(recipe, documents, mode)
    advice = after_out_of_memory(setup_of(recipe, config, world), sharding)
    for name, flag in FLAGS.items():
        advice = advice.replace(name, flag)
    file = file_of(options)
    kept = f"; the lines of earlier shapes are in {file}" if file else ""
    return f"out of memory ({str(error).splitlines()[0]}): {advice}{kept}; the launcher ends the other ranks"


def time_shape(
    options: argparse.Namespace, recipe: Recipe, world: World, document: Document, fraction: float
) -> list[dict[str, Any]]:
    """Return a line for batches in memory and, with --from-store, one for batches from a store."""
    from eagle_ds.bench.flops import measure_ceilings
    from eagle_ds.bench.sources import MemorySource, StoreSource
    from eagle_ds.bench.step import StepBench, summary
    from eagle_ds.config.deepspeed import deepspeed_config, read_ds_json

    config = deepspeed_config(recipe, read_ds_json(recipe.deepspeed), world.topology.world_size)
    config.pop("tensorboard", None)
    bench = StepBench(recipe, config, [document] * options.documents, world)
    steps = options.steps or (STEPS_FROM_STORE if options.from_store else STEPS)
    described = (recipe, bench.sharding, world, bench.dtype)
    try:
        bench.use(MemorySource(*described))
        lines = [{"source": "memory", "warmup": options.warmup}]
        measured = [bench.run(steps, options.warmup)]
        if options.from_store:
            source = StoreSource(open_store(options, bench, document, fraction), *described)
            bench.use(source)
            measured.append(bench.run(steps, warmup=2))
            slower = measured[1].step_ms / measured[0].step_ms - 1
            speed = {"read_ms": round(1e3 * source.read_s, 1), "slower_than_memory": round(slower, 4)}
            lines.append({"source": "store", **speed})
        if options.sample_memory:
            lines[-1] |= bench.memory_by_phase()
        if options.profile:
            path, writes = options.profile, world.is_first or bool(options.alone_of)
            if options.sweep:
                path = path.with_name(f"{document.num_tokens}-{fraction:g}-{path.name}")
            profile(bench, path, writes)
    finally:
        bench.use(None)
    on_own_gpu = world.device.type == "cuda" and not options.share_gpu
    device = measure_ceilings(world.device) if on_own_gpu else None
    rows = zip(lines, measured, strict=True)
    return [summary(recipe, bench.sharding, times, device) | line for line, times in rows]


def open_store(
    options: argparse.Namespace, bench: StepBench, document: Document, fraction: float
) -> Store:
    """Open the store of this shape; rank 0 makes it if it is missing. Collective."""
    from eagle_ds.bench.synthetic_data import default_samples, random_store

    topology, agreement = bench.world.topology, bench.world.agreement
    dtype = str(bench.dtype).removeprefix("torch.")
    trained = "all" if fraction >= 1 else f"{fraction:g}-in-{options.turn}"
    name = f"{bench.recipe.name}-{document.num_tokens}-{trained}-{dtype}"
    folder = options.from_store / name
    count = options.store_samples or default_samples(document.num_tokens, options.documents * topology.dp)
    recipe = bench.recipe
    store = agreement.first_then_all(lambda: random_store(folder, recipe, document, count, dtype=dtype))
    agreement.same({"random store": store.manifest_hash})
    return store


def profile(bench: StepBench, path: Path, writes: bool) -> None:
    """Run two steps under torch.profiler; write a trace, and a table of the second step.

    The second step follows another one, as in training; so the table leaves out the first. On a CPU the table
    is torch's own, and includes both steps.
    """
    import torch
    from torch.profiler import ProfilerActivity

    from eagle_ds.bench.profile import read_trace, summarize, table
    from eagle_ds.bench.step import LOSS_REGION, PHASES

    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=activities) as recorded:
        bench.step()
        bench.step()
    if not writes:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    recorded.export_chrome_trace(str(path))
    if on_gpu:
        text = table(summarize(read_trace(path, PHASES, LOSS_REGION)), PHASES)
    else:
        averages = recorded.key_averages()
        text = averages.table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=70)
    table_name = path.name.removesuffix(".gz").removesuffix(".json") + ".md"
    path.with_name(table_name).write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
