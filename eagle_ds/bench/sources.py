"""Sources of the batches of timed steps: one random batch in GPU memory, or HDF5 files read as in training.
"""

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
from eagle_ds.training.feed import Feed, FeedSettings, read_pool
from eagle_ds.training.sizing import sharding_settings
from eagle_ds.training.world import World

FOREVER = 1 << 40  # steps that the sampler provides; more than a benchmark runs


class Source(Protocol):
    """Provides this rank's share of sequences of one shape."""

    name: str

    def take(self) -> tuple[Batch, Tensor]:
        """Return the next batch on the device and all ranks' counted rows, int64 [T]. May be collective."""
        ...

    def advance(self) -> None:
        """Allow the source to read the next batch. Called once the forward is queued."""
        ...

    def close(self) -> None:
        """End threads and processes, and free memory."""
        ...


class MemorySource:
    """The same random batch for every step."""

    name = "memory"

    def __init__(self, recipe: Recipe, sharding: SequenceSharding, world: World, dtype: torch.dtype) -> None:
        training, rows = recipe.training, max(sharding.num_queries * world.topology.dp, 1)
        self._batch: Batch | None = _random_batch(recipe, sharding, world, dtype)
        self._counted = torch.full((training.ttt_steps,), rows)

    def take(self) -> tuple[Batch, Tensor]:
        """Return the batch; takes no time."""
        assert self._batch is not None, "take after close"
        return self._batch, self._counted

    def advance(self) -> None:
        """Do nothing: the batch is in memory."""

    def close(self) -> None:
        """Free the batch."""
        self._batch = None


class StoreSource:
    """Sequences of the sharding's shape from a store, repeated forever, read and copied ahead as in training.

    Raises ValueError if the store has too few samples for one step.
    """

    name = "store"

    def __init__(
        self, store: Store, recipe: Recipe, sharding: SequenceSharding, world: World, dtype: torch.dtype
    ) -> None:
        topology, data, training = world.topology, recipe.data, recipe.training
        self._pool = read_pool(data, world.device)
        per_step = len(sharding.documents) * topology.dp
        samples, _ = screen(
            store.entries,
            max_length=data.max_length,
            overlong="skip",
            ttt_steps=training.ttt_steps,
            alignment=training.mask_alignment,
        )
        samples = samples[: len(samples) // per_step * per_step]
        if not samples:
            found = f"{store.root} holds {len(store)} samples, but one step takes {per_step}"
            raise ValueError(f"{found}; make a store with more samples")
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
        sampler = Sampler(
            samples,
            dp=topology.dp,
            pack_tokens=data.pack_tokens,
            seed=training.seed,
            ttt_steps=training.ttt_steps,
        )
        self._digest, self._agreement = sharding.digest, world.agreement
        settings = FeedSettings(data.prefetch, world.device, dtype)
        self._feed = Feed(dataset, sampler.global_batches(0, FOREVER), settings)
        self._read_s: list[float] = []

    def take(self) -> tuple[Batch, Tensor]:
        """Wait for the reading thread, then check that all ranks have a batch. Collective."""
        item, counted = self._feed.take(self._agreement)
        same = item.batch.sharding.digest == self._digest
        assert same, "the store's sequence is sharded in another way than the benchmark's"
        self._read_s.append(item.read_s)
        return item.batch, counted

    def advance(self) -> None:
        """Let the background threads read the next batch and copy it to the device."""
        self._feed.advance()

    @property
    def read_s(self) -> float:
        """Mean seconds in which the reading thread reads a sequence, over the last half of the batches taken.
        """
        return mean(self._read_s[len(self._read_s) // 2 :]) if self._read_s else 0.0

    def close(self) -> None:
        """End threads and processes."""
        self._feed.close()
        if self._pool is not None:
            self._pool.close()


def _random_batch(recipe: Recipe, sharding: SequenceSharding, world: World, dtype: torch.dtype) -> Batch:
    arch, device, rank = DraftArch.from_recipe(recipe), world.device, world.topology.sp_rank
    # Token ids and labels must be the same on all ranks, so they have one seed. Hidden states differ by rank.
    rng = np.random.default_rng(0)
    labels = []
    for document in sharding.documents:
        size, mask = document.num_tokens, np.zeros(document.num_tokens, dtype=np.uint8)
        mask[rg.rows(document.trained_spans)] = 1
        ids, argmax = rng.integers(0, arch.target_vocab_size, (2, size), dtype=np.int32)
        labels.append(TokenLabels(ids, mask, argmax, np.full(size, 10.0, dtype=np.float32)))
    generator = torch.Generator(device).manual_seed(rank)

    def random(rows: rg.Ranges, width: int) -> Tensor:
        return torch.randn(rg.count(rows), width, device=device, dtype=dtype, generator=generator)

    aux = random(sharding.aux_rows(rank), arch.num_aux * arch.target_hidden_size)
    hidden = random(sharding.target_rows(rank), arch.target_hidden_size)
    batch = assemble(sharding, rank, labels, aux, hidden, alignment=recipe.training.mask_alignment)
    return batch.to(device)
