#!/usr/bin/env python
"""Time a training step on random features, through the code that trains: forward, backward, optimizer.

    deepspeed --num_gpus 4 tools/bench_step.py --seq 131072 --ulysses 4
    deepspeed --num_gpus 4 tools/bench_step.py --seq 131072 --trained-fraction 0.1 --turn 512 --ulysses 4
    deepspeed --num_gpus 2 tools/bench_step.py --seq 32768 --ulysses 1 --ring 2 --ring-mode p2p
    deepspeed --num_gpus 1 tools/bench_step.py --seq 4096 --documents 32           (packed: 32 samples of 4096)

Rank 0 prints one JSON line for each run: milliseconds by phase, tokens/s a GPU, trained rows/s, model TFLOP/s, the floor of this shape
from rates measured in the same run, the ratio to it, and the peak memory. Two utilisations: tflops_per_gpu counts what flash attention
must do (its backward is 2.5 forwards); mfu counts the model's own work alone (2 forwards, nothing computed again) against the dense
bfloat16 peak of the GPU's data sheet.

From disk: the same steps, first from memory and then from real HDF5 files through the trainer's reader, prefetch and copies. The
store of this shape is made below FOLDER if it is not there: random states, so nothing can be learned from it, but of the size and
about the compression of real ones (1 GB for 32K tokens, 4.3 GB for 128K, before compression). The second line adds data_wait_ms, read_ms
(what reading one sequence takes in its thread; it hides behind a step while it is shorter) and slower_than_memory:
    deepspeed --num_gpus 4 tools/bench_step.py --seq 131072 --ulysses 4 --from-store /data/bench

Several shapes in one start, and with --out a table and pictures. A shape that does not fit gets a line that says so and the next
one runs; on several GPUs it ends the run and says what would fit, and the lines before it stay. The lines gather in DIR/steps.jsonl,
so that runs on 1, 2 and 4 GPUs into one DIR make the strong scaling picture too, and memory.md: what of a rank's memory falls as 1/P,
and how near to it.
--plot draws from such files alone, on any machine:
    deepspeed --num_gpus 1 tools/bench_step.py --sweep 16384:1 32768:1 131072:0.1 --out results
    tools/bench_step.py --plot results/steps.jsonl more.jsonl --out results

Several ranks on one GPU, to see a layout's memory where there are too few GPUs (NCCL refuses it, so they talk through host
memory). peak_gib is each rank's own and holds; the line says shared_gpu, its times mean nothing and no table or picture uses them:
    torchrun --nproc_per_node 4 tools/bench_step.py --share-gpu --seq 32768 --ulysses 4 --out results

One rank alone, for what a layout costs on each GPU where there is but one: this process does the work of one rank of N, by default
the one that the plan (of the first shape) loads most, in that rank's memory. What others would have sent is made up on the spot, so
there is no communication, and the losses mean nothing. Tables and pictures say "one rank alone", and the scaling picture leaves it out:
    tools/bench_step.py --alone-of 4 --ulysses 4 --seq 131072 --out results

Where the time goes: --profile trace.json writes a Chrome trace (chrome://tracing, ui.perfetto.dev) of two steps, and a table of the
second's GPU time by category and phase with the share of communication that runs beside computing.
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
from eagle_ds.estimate.sequences import document_in_exact_turns

if TYPE_CHECKING:
    from eagle_ds.bench.step import StepBench
    from eagle_ds.sharding.sequence import Document
    from eagle_ds.store.store import Store
    from eagle_ds.training.world import World

ROOT = Path(__file__).resolve().parents[1]
MODELS = {"llama3_8b": "recipes/llama3_128k.json", "smollm2": "recipes/smollm2_cpu.json"}
OFFLOAD = "--offload-activations"
FLAGS = {"--training.offload_activations true": OFFLOAD, "--training.": "--", "--parallel.": "--", "data.max_length": "--seq"}
STEPS, STEPS_FROM_STORE = 3, 8  # from a store more, because the first ones find their data read ahead while the engine warmed up


def sweep_shape(text: str) -> tuple[int, float]:
    """131072:0.1 -> (131072, 0.1); every row is trained where no fraction is given."""
    tokens, _, fraction = text.partition(":")
    try:
        return int(tokens), float(fraction or 1)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no SEQ:FRACTION; write 131072:0.1, or 131072 for all rows") from error


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = parser.add_argument_group("shape")
    shape.add_argument("--model", choices=MODELS, default="llama3_8b", help="sizes of the draft and its target")
    shape.add_argument("--recipe", type=Path, help="take the sizes from this recipe JSON instead")
    shape.add_argument("--seq", type=int, default=32768, help="tokens of each document")
    shape.add_argument("--documents", type=int, default=1, help="documents packed into the sequence")
    shape.add_argument("--trained-fraction", type=float, default=1.0, help="fraction of tokens trained, in turns")
    shape.add_argument("--turn", type=int, default=512, help="trained tokens in a row")
    shape.add_argument("--sweep", nargs="+", type=sweep_shape, metavar="SEQ:FRACTION", help="several shapes in one start")
    shape.add_argument("--ttt-steps", type=int, help="T; default: the recipe's, 7")
    layout = parser.add_argument_group("layout and settings")
    layout.add_argument("--ulysses", type=int, default=1)
    layout.add_argument("--ring", type=int, default=1)
    layout.add_argument("--ring-mode", choices=("auto", "gather", "p2p"), default="auto")
    layout.add_argument("--share-gpu", action="store_true", help="ranks share GPUs and talk through host memory; times mean nothing")
    layout.add_argument("--alone-of", type=int, metavar="N", help="do one rank's work of a world of N, without communication")
    layout.add_argument("--alone-rank", type=int, metavar="RANK", help="that rank; default: the one that the plan loads most")
    layout.add_argument("--all-rows", action="store_true", help="work on untrained rows too, as trainers without the plan do")
    layout.add_argument("--recompute", choices=("none", "selective", "mlp", "full"), default="full", help="default: full, the least memory")
    layout.add_argument("--offload-activations", action="store_true", help="keep activations of the unroll in pinned CPU memory")
    layout.add_argument("--deepspeed-config", help="default: the recipe's")
    store = parser.add_argument_group("from disk")
    store.add_argument("--from-store", type=Path, metavar="FOLDER", help="time steps from HDF5 files too; made if missing (random)")
    store.add_argument("--store-samples", type=int, help="samples of that store; default: 4, or 2 beyond 64K tokens, or two steps' worth")
    store.add_argument("--read-processes", type=int, help="processes that inflate, a rank; 0: a thread; default: the recipe's")
    store.add_argument("--prefetch", type=int, help="sequences read ahead; default: the recipe's")
    run = parser.add_argument_group("run and results")
    run.add_argument("--steps", type=int, help=f"timed steps; default: {STEPS}, with --from-store {STEPS_FROM_STORE}")
    run.add_argument("--warmup", type=int, default=1, help="steps before the timed ones; default: 1; with 0 their time holds compilation")
    run.add_argument("--json", type=Path, help="append the lines to this file (default with --out: DIR/steps.jsonl)")
    run.add_argument("--out", type=Path, metavar="DIR", help="write steps.md and pictures of all lines in that file")
    run.add_argument("--plot", type=Path, nargs="+", metavar="JSONL", help="run nothing: draw these results into --out")
    run.add_argument("--profile", type=Path, help="write a Chrome trace of two more steps here (.json or .json.gz), a table beside it")
    run.add_argument("--sample-memory", action="store_true", help="one more step: add the peak memory of each phase")
    parser.add_argument("--local_rank", type=int, default=int(os.environ.get("LOCAL_RANK", 0)), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps {options.steps}: give 1 or more")
    if options.warmup < 0:
        parser.error(f"--warmup {options.warmup}: give 0 or more steps")
    if options.plot and not options.out:
        parser.error("--plot needs --out DIR to write to")
    if options.alone_of and (options.share_gpu or options.from_store or int(os.environ.get("WORLD_SIZE", 1)) > 1):
        parser.error("--alone-of is one process, timed from memory: start it without a launcher, --share-gpu and --from-store")
    if options.alone_rank is not None and not options.alone_of:
        parser.error("--alone-rank is a rank of the world that --alone-of sizes; give both")
    return options


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
    """Every shape, and what is made of the lines."""
    os.chdir(ROOT)
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}.items():
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
    """Where the lines gather."""
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
    words = [word for name, value in overrides.items() if value is not None for word in (f"--{name}", str(value))]
    return load_recipe(options.recipe or MODELS[options.model], words)


def run(options: argparse.Namespace, tokens: int, fraction: float) -> list[dict[str, Any]]:
    """One shape's lines. On one GPU a shape that does not fit says so and lets the next one run; of several ranks the one that it
    befalls leaves, because the others wait for it, and the launcher ends them."""
    from eagle_ds.bench.step import forget_benches
    from eagle_ds.training.sizing import is_out_of_memory
    from eagle_ds.training.stopping import leave_at_once

    recipe, document = make_recipe(options, tokens), document_in_exact_turns(tokens, fraction, options.turn)
    world = join(options, recipe, [document] * options.documents)
    shape = {
        "model": options.recipe.stem if options.recipe else options.model,
        "gpus": world.topology.world_size,
        "fraction": fraction,
        "turn": options.turn,
        **({"offload_activations": True} if options.offload_activations else {}),
        **({"shared_gpu": True} if options.share_gpu else {}),
        **({"alone_of": world.topology.world_size, "alone_rank": world.topology.rank} if options.alone_of else {}),
    }
    try:
        return [shape | line for line in time_shape(options, recipe, world, document, fraction)]
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        if world.topology.world_size > 1 and not options.alone_of:
            leave_at_once(f"error (rank {world.topology.rank}): {does_not_fit(options, recipe, world, document, error)}", 1)
        layout = {"layout": f"U{options.ulysses} R{options.ring}", "recompute": options.recompute, "ttt_steps": recipe.training.ttt_steps}
        size = {"tokens": tokens * options.documents, "documents": options.documents}
        return [shape | size | layout | {"error": "out of memory", "detail": str(error).split(". ")[0]}]
    finally:
        forget_benches(world.device)


def join(options: argparse.Namespace, recipe: Recipe, documents: list[Document]) -> World:
    """The world that the launcher started, or one rank of a larger one."""
    from eagle_ds.bench.simulated_world import alone_world, join_shared_gpu
    from eagle_ds.training.world import join_world

    if options.alone_of:
        return alone_world(recipe, documents, options.local_rank, options.alone_of, options.alone_rank)
    return (join_shared_gpu if options.share_gpu else join_world)(recipe.parallel, options.local_rank)


def does_not_fit(options: argparse.Namespace, recipe: Recipe, world: World, document: Document, error: RuntimeError) -> str:
    """What ran out of memory, what would fit, in this tool's own flags, and where the lines before it are."""
    from eagle_ds.config.deepspeed import bf16_enabled, deepspeed_config, read_ds_json
    from eagle_ds.estimate.fit import choose_ring_mode
    from eagle_ds.estimate.sequences import sharding_for
    from eagle_ds.training.sizing import after_out_of_memory

    config = deepspeed_config(recipe, read_ds_json(recipe.deepspeed), world.topology.world_size)
    documents = [document] * options.documents
    mode = choose_ring_mode(recipe, len(documents) * document.num_tokens, 2 if bf16_enabled(config) else 4, world.memory_bytes)
    plan = sharding_for(recipe, documents, mode)
    told = after_out_of_memory(recipe, config, world, plan)
    for name, flag in FLAGS.items():
        told = told.replace(name, flag)
    file = file_of(options)
    kept = f"; lines of shapes before it are in {file}" if file else ""
    return f"out of memory ({str(error).splitlines()[0]}): {told}{kept}; the launcher ends the other ranks"


def time_shape(options: argparse.Namespace, recipe: Recipe, world: World, document: Document, fraction: float) -> list[dict[str, Any]]:
    """A line for batches in memory and, if asked for, one for the same from a store."""
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
        lines, measured = [{"source": "memory", "warmup": options.warmup}], [bench.run(steps, options.warmup)]
        if options.from_store:
            source = StoreSource(open_store(options, bench, document, fraction), *described)
            bench.use(source)
            measured.append(bench.run(steps, warmup=2))
            slower = measured[1].step_ms / measured[0].step_ms - 1
            lines.append({"source": "store", "read_ms": round(1e3 * source.read_s, 1), "slower_than_memory": round(slower, 4)})
        if options.sample_memory:
            lines[-1] |= bench.memory_by_phase()
        if options.profile:
            path, writes = options.profile, world.is_first or bool(options.alone_of)
            profile(bench, path.with_name(f"{document.num_tokens}-{fraction:g}-{path.name}") if options.sweep else path, writes)
    finally:
        bench.use(None)
    device = measure_ceilings(world.device) if world.device.type == "cuda" and not options.share_gpu else None
    return [summary(recipe, bench.sharding, times, device) | line for line, times in zip(lines, measured, strict=True)]


def open_store(options: argparse.Namespace, bench: StepBench, document: Document, fraction: float) -> Store:
    """The store of this shape; rank 0 makes it if it is not there."""
    from eagle_ds.bench.synthetic_data import default_samples, random_store

    topology, agreement = bench.world.topology, bench.world.agreement
    dtype = str(bench.dtype).removeprefix("torch.")
    trained = "all" if fraction >= 1 else f"{fraction:g}-in-{options.turn}"
    folder = options.from_store / f"{bench.recipe.name}-{document.num_tokens}-{trained}-{dtype}"
    count = options.store_samples or default_samples(document.num_tokens, options.documents * topology.dp)
    store = agreement.first_then_all(lambda: random_store(folder, bench.recipe, document, count, dtype=dtype))
    agreement.same({"random store": store.manifest_hash})
    return store


def profile(bench: StepBench, path: Path, writes: bool) -> None:
    """Two steps under torch.profiler, so that the second follows another as in training: a trace, and a table of the second (on CPU
    torch's own, of both)."""
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
        text = recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=70)
    path.with_name(path.name.removesuffix(".gz").removesuffix(".json") + ".md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
