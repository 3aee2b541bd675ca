"""What each process of a benchmark's test does."""

from __future__ import annotations

from pathlib import Path

import torch

from eagle_ds.bench.random_store import random_store
from eagle_ds.bench.sources import MemorySource, StoreSource
from eagle_ds.bench.step import StepBench, StepTimes
from eagle_ds.config import Recipe
from eagle_ds.ds_config import deepspeed_config, read_ds_json
from eagle_ds.engine.world import join_world
from eagle_ds.layout import Document
from tests.engine.worker import as_if_new


def time_both(rank: int, world: int, recipe: Recipe, document: Document, folder: Path) -> tuple[list[StepTimes], list[bool]]:
    """Times from memory and from a store, and of the two's first batches whether this and that is the same."""
    as_if_new(world)
    joined = join_world(recipe.parallel, rank)
    config = deepspeed_config(recipe, read_ds_json(recipe.deepspeed), world)
    bench = StepBench(recipe, config, [document] * 2, joined)
    facts = (recipe, bench.plan, joined, bench.dtype)
    bench.use(MemorySource(*facts))
    in_memory, counted = bench.source.take()
    times = [bench.run(2)]
    store = joined.agreement.first_then_all(lambda: random_store(folder, recipe, document, 4, dtype="float32"))
    source = StoreSource(store, *facts)
    bench.use(source)
    from_store, read = source.take()
    same = [
        bool((getattr(in_memory, name) == getattr(from_store, name)).all())
        for name in ("query_positions", "context_positions", "target_index", "trained")
    ]
    same += [in_memory.aux.shape == from_store.aux.shape, in_memory.target_hidden.shape == from_store.target_hidden.shape]
    same += [in_memory.plan == from_store.plan, bool(torch.isfinite(from_store.aux).all())]
    same += [int(read[0]) == int(counted[0])]  # by mask alone every query row counts at step 0
    times.append(bench.run(2))
    bench.use(None)
    return times, same
