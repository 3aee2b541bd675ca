"""Functions that each process of the benchmark tests runs."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from eagle_ds.bench.simulated_world import alone_world
from eagle_ds.bench.sources import MemorySource, StoreSource
from eagle_ds.bench.step import StepBench, StepTimes, forget_benches
from eagle_ds.bench.synthetic_data import random_store
from eagle_ds.config.deepspeed import deepspeed_config, read_ds_json
from eagle_ds.config.recipe import Recipe
from eagle_ds.sharding import ranges as rg
from eagle_ds.sharding.sequence import Document
from eagle_ds.training.world import World, join_world
from tests.training.training_ranks import reset_process


def time_both(rank: int, world: int, recipe: Recipe, document: Document, folder: Path) -> tuple[
    list[StepTimes], list[bool]
]:
    """Time steps from memory and from a store; return the times, and whether their first batches agree."""
    reset_process(world)
    joined = join_world(recipe.parallel, rank)
    config = deepspeed_config(recipe, read_ds_json(recipe.deepspeed), world)
    bench = StepBench(recipe, config, [document] * 2, joined)
    info = (recipe, bench.sharding, joined, bench.dtype)
    bench.use(MemorySource(*info))
    in_memory, counted = bench.source.take()
    times = [bench.run(2)]
    store = joined.agreement.first_then_all(
        lambda: random_store(folder, recipe, document, 4, dtype="float32")
    )
    source = StoreSource(store, *info)
    bench.use(source)
    from_store, read = source.take()
    same = [
        bool((getattr(in_memory, name) == getattr(from_store, name)).all())
        for name in ("query_positions", "context_positions", "target_index", "trained")
    ]
    same += [
        in_memory.aux.shape == from_store.aux.shape,
        in_memory.target_hidden.shape == from_store.target_hidden.shape
    ]
    same += [in_memory.sharding == from_store.sharding, bool(torch.isfinite(from_store.aux).all())]
    same += [int(read[0]) == int(counted[0])]  # by mask alone every query row counts at step 0
    times.append(bench.run(2))
    bench.use(None)
    return times, same


@dataclass(frozen=True)
class Alone:
    """What a rank did alone."""

    rank: int
    times: StepTimes
    finite: bool
    moved: bool
    rows: tuple[int, int]  # query and context rows of its batch
    planned: tuple[int, int]  # the same of the sharding


def alone_steps(rank: int, world: int, recipe: Recipe, document: Document, alone_rank: int | None) -> Alone:
    """Run three optimizer steps of one rank of four."""
    reset_process(world)
    joined = alone_world(recipe, [document], rank, 4, alone_rank)
    bench = StepBench(recipe, deepspeed_config(recipe, read_ds_json(recipe.deepspeed), 4), [document], joined)
    before, losses = _held_weights(bench), []
    bench.use(MemorySource(recipe, bench.sharding, joined, bench.dtype))
    backward = bench.engine.backward
    with mock.patch.object(
        bench.engine, "backward", lambda loss: (losses.append(loss.detach()), backward(loss))
    ):
        times = bench.run(2)
    after, (batch, _) = _held_weights(bench), bench.source.take()
    at = joined.topology.sp_rank
    joined.agreement.same({"steps": len(losses)})  # must hold, because all four answers are this rank's
    return Alone(
        rank=joined.topology.rank,
        times=times,
        finite=all(torch.isfinite(x).all() for x in (*losses, *after)),
        moved=any(not torch.equal(old, new) for old, new in zip(before, after, strict=True)),
        rows=(len(batch.query_positions), len(batch.context_positions)),
        planned=(rg.count(bench.sharding.queries[at]), rg.count(bench.sharding.context[at])),
    )


def step_without_waiting(recipe: Recipe, document: Document) -> None:
    """Run forward and backward of one rank of four on a GPU; raises if the host waits for the GPU."""
    joined = alone_world(recipe, [document], 0, 4, None)
    bench = StepBench(recipe, deepspeed_config(recipe, read_ds_json(recipe.deepspeed), 4), [document], joined)
    bench.use(MemorySource(recipe, bench.sharding, joined, bench.dtype))
    bench.run(1)  # compiles and loads kernels, and pins memory
    # Covers waits inside PyTorch. DeepSpeed's timers call torch.cuda.synchronize by name.
    torch.cuda.set_sync_debug_mode("error")
    with mock.patch("torch.cuda.synchronize", side_effect=AssertionError("waits")):
        bench._take()
        bench._forward()
        bench._backward()
    torch.cuda.set_sync_debug_mode("default")
    bench.use(None)


def outlived(rank: int, world: int, recipe: Recipe, document: Document) -> list[str]:
    """Return which weights, gradients and optimizer buffers still exist after the bench has been dropped."""
    reset_process(world)
    joined = alone_world(recipe, [document], rank, 4, None)
    gc.disable()  # an automatic collection would hide a leak
    try:
        held = _one_step(recipe, document, joined)
        forget_benches(joined.device)
        return [name for name, storage in held.items() if not storage.expired()]
    finally:
        gc.enable()


def _one_step(recipe: Recipe, document: Document, joined: World) -> dict[str, StorageWeakRef]:
    bench = StepBench(recipe, deepspeed_config(recipe, read_ds_json(recipe.deepspeed), 4), [document], joined)
    bench.use(MemorySource(recipe, bench.sharding, joined, bench.dtype))
    bench.run(1)
    bench.use(None)
    optimizer = bench.engine.optimizer
    tensors = {
        "weights": optimizer.bf16_groups_flat[0],
        "gradients": optimizer.fp32_groups_gradients_flat[0],
        "masters": optimizer.fp32_groups_flat_partition[0],
    }
    return {name: StorageWeakRef(tensor.untyped_storage()) for name, tensor in tensors.items()}


def _held_weights(bench: StepBench) -> list[torch.Tensor]:
    """Return the weights that this rank holds: all of them, or its part under ZeRO-3."""
    return [
        getattr(weight, "ds_tensor", weight).detach().clone() for weight in bench.engine.module.parameters()
    ]
