"""Where the batches of a timed step come from: one random batch that stays in GPU memory, or HDF5 files through the trainer's feed."""

from __future__ import annotations

from statistics import mean
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from eagle_ds.config.recipe import Recipe
from eagle_ds.data.batch import Batch, TokenLabels, assemble
from eagle_ds.data.dataset import RankDataset
from eagle_ds.data.packing import screen
from eagle_ds.data.sampler import Sampler
from eagle_ds.model.arch import DraftArch
from eagle_ds.sharding import ranges as rg
from eagle_ds.sharding.sequence import SequenceSharding
from eagle_ds.store.store import Store
from eagle_ds.training.feed import Feed, read_pool
from eagle_ds.training.sizing import sharding_settings
from eagle_ds.training.world import World

FOREVER = 1 << 40  # steps


class Source(Protocol):
    """Hands out this rank's share of sequences of one shape."""

    name: str

    def take(self) -> tuple[Batch, Tensor]:
        """The next batch on the device, and the step's counted rows of all ranks, int64 [T]. May be collective."""
        ...

    def go_on(self) -> None:
        """The forward is launched: what comes next may be read."""
        ...

    def close(self) -> None:
        """End threads and processes, let go of memory."""
        ...


class MemorySource:
    """The same random batch each time."""

    name = "memory"

    def __init__(self, recipe: Recipe, sharding: SequenceSharding, world: World, dtype: torch.dtype) -> None:
        training, rows = recipe.training, max(sharding.num_queries * world.topology.dp, 1)
        self._batch: Batch | None = _random_batch(recipe, sharding, world, dtype)
        self._counted = torch.full((training.ttt_steps,), rows)

    def take(self) -> tuple[Batch, Tensor]:
        """Costs nothing."""
        assert self._batch is not None, "take after close"
        return self._batch, self._counted

    def go_on(self) -> None:
        """Nothing is read."""

    def close(self) -> None:
        """Free the batch."""
        self._batch = None


class StoreSource:
    """Sequences of ``plan``'s shape from a store, again and again, read and copied ahead as in training.

    Raises ValueError if the store cannot fill a step of ``plan``'s documents.
    """

    name = "store"

    def __init__(self, store: Store, recipe: Recipe, sharding: SequenceSharding, world: World, dtype: torch.dtype) -> None:
        topology, data, training = world.topology, recipe.data, recipe.training
        self._pool = read_pool(data, world.device)
        per_step = len(sharding.documents) * topology.dp
        samples, _ = screen(
            store.entries, max_length=data.max_length, overlong="skip", ttt_steps=training.ttt_steps, alignment=training.mask_alignment
        )
        samples = samples[: len(samples) // per_step * per_step]
        if not samples:
            raise ValueError(f"{store.root} holds {len(store)} samples and one step takes {per_step}; make it with more")
        dataset = RankDataset(
            store,
            samples,
            sharding_settings(recipe, samples, dtype.itemsize, world),
            t2d=torch.ones(recipe.target.vocab_size, dtype=torch.bool),
            dp_rank=topology.dp_rank,
            sp_rank=topology.sp_rank,
            pool=self._pool,
            pin=world.device.type == "cuda",
        )
        sampler = Sampler(samples, dp=topology.dp, pack_tokens=data.pack_tokens, seed=training.seed, ttt_steps=training.ttt_steps)
        self._digest, self._agreement = sharding.digest, world.agreement
        self._feed = Feed(dataset, sampler.steps(0, FOREVER), depth=data.prefetch, device=world.device, dtype=dtype)
        self._read_s: list[float] = []

    def take(self) -> tuple[Batch, Tensor]:
        """Waits for what reads, then agrees with the other ranks. Collective."""
        item, counted = self._feed.take(self._agreement)
        assert item.batch.sharding.digest == self._digest, "a timed sequence has another plan than the one in memory"
        self._read_s.append(item.read_s)
        return item.batch, counted

    def go_on(self) -> None:
        """Read and copy ahead."""
        self._feed.go_on()

    @property
    def read_s(self) -> float:
        """Seconds that the reading thread spent on a sequence, mean over the last half of those taken."""
        return mean(self._read_s[len(self._read_s) // 2 :]) if self._read_s else 0.0

    def close(self) -> None:
        """End threads and processes."""
        self._feed.close()
        if self._pool is not None:
            self._pool.close()


def _random_batch(recipe: Recipe, sharding: SequenceSharding, world: World, dtype: torch.dtype) -> Batch:
    arch, device, rank, rng = DraftArch.from_recipe(recipe), world.device, world.topology.sp_rank, np.random.default_rng(0)
    info = []
    for document in sharding.documents:
        size, mask = document.num_tokens, np.zeros(document.num_tokens, dtype=np.uint8)
        mask[rg.rows(document.trained_spans)] = 1
        ids = rng.integers(0, arch.target_vocab_size, (2, size), dtype=np.int32)
        info.append(TokenLabels(ids[0], mask, ids[1], np.full(size, 10.0, dtype=np.float32)))
    generator = torch.Generator(device).manual_seed(rank)

    def random(rows: rg.Ranges, width: int) -> Tensor:
        return torch.randn(rg.count(rows), width, device=device, dtype=dtype, generator=generator)

    aux = random(sharding.aux_rows(rank), arch.num_aux * arch.target_hidden_size)
    hidden = random(sharding.target_rows(rank), arch.target_hidden_size)
    return assemble(sharding, rank, info, aux, hidden, alignment=recipe.training.mask_alignment).to(device)
