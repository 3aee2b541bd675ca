"""Samples as they are trained on, and how several short ones make one sequence. Integers from the manifest alone.

A pack is a tuple of sample numbers, laid end to end; each row sees its own sample only, so a pack costs what its samples
cost. A sample longer than the token budget goes alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from eagle_ds.config.recipe import Recipe
from eagle_ds.sharding import ranges as rg
from eagle_ds.sharding.sequence import Alignment, Document, RingMode, SequenceSharding, shard_sequence
from eagle_ds.store.manifest import SampleEntry

Pack = tuple[int, ...]


@dataclass(frozen=True)
class TrainSample:
    """A stored sample and the part of it that is trained on: its first ``document.num_tokens`` tokens."""

    entry: SampleEntry
    document: Document
    query_rows: int  # rows that count at some step, by mask alone


@dataclass(frozen=True)
class ShardingSettings:
    """What the sharding of a sequence depends on, other than its documents."""

    ulysses: int = 1
    ring: int = 1
    ring_mode: RingMode = "gather"
    ttt_steps: int = 7
    alignment: Alignment = "serving"
    trained_rows_only: bool = True

    @classmethod
    def from_recipe(cls, recipe: Recipe, ring_mode: RingMode) -> ShardingSettings:
        """Take the recipe's settings; ``ring_mode`` is given because the recipe may say "auto"."""
        parallel, training = recipe.parallel, recipe.training
        return cls(
            parallel.ulysses, parallel.ring, ring_mode,
            training.ttt_steps, training.mask_alignment, parallel.trained_rows_only,
        )  # fmt: skip

    def shard(self, documents: Sequence[Document]) -> SequenceSharding:
        """Shard ``documents``, packed into one sequence."""
        return shard_sequence(
            documents, ulysses=self.ulysses, ring=self.ring, ring_mode=self.ring_mode, ttt_steps=self.ttt_steps,
            alignment=self.alignment, trained_rows_only=self.trained_rows_only,
        )  # fmt: skip


@dataclass(frozen=True)
class Screening:
    """How many samples a store holds and what became of them."""

    stored: int
    kept: int
    truncated: int
    overlong: int
    untrained: int

    def __str__(self) -> str:
        return (
            f"{self.kept} of {self.stored} samples are trained on ({self.truncated} of them truncated); skipped: "
            f"{self.overlong} too long, {self.untrained} without a trained row"
        )


def screen(
    entries: Sequence[SampleEntry],
    *,
    max_length: int,
    overlong: Literal["truncate", "skip"],
    ttt_steps: int,
    alignment: Alignment,
) -> tuple[list[TrainSample], Screening]:
    """The samples that training can use, in the manifest's order, and the count of those it cannot.

    A sample without a trained row teaches nothing, whatever it is packed with, so it is left out here, on all ranks alike.
    Raises ValueError if nothing is left.
    """
    kept: list[TrainSample] = []
    truncated = too_long = 0
    for entry in entries:
        is_long = entry.num_tokens > max_length
        if is_long and overlong == "skip":
            too_long += 1
            continue
        size = min(entry.num_tokens, max_length)
        document = Document(size, rg.clip(entry.trained_spans, 0, size))
        if rows := rg.count(document.trained_rows(ttt_steps, alignment)):
            kept.append(TrainSample(entry, document, rows))
            truncated += is_long
    screening = Screening(len(entries), len(kept), truncated, too_long, len(entries) - len(kept) - too_long)
    if not kept:
        raise ValueError(f"the store holds nothing to train on: {screening}; raise data.max_length or capture samples with trained tokens")
    return kept, screening


def first_fit(numbers: Sequence[int], lengths: np.ndarray, budget: int) -> list[Pack]:
    """``numbers`` in packs of at most ``budget`` tokens: longest first, ties as given, each into the first pack with room."""
    order = np.asarray(numbers, dtype=np.int64)
    order = order[np.argsort(-lengths[order], kind="stable")]
    packs: list[list[int]] = []
    room = np.zeros(len(order), dtype=np.int64)
    for number in order.tolist():
        length = int(lengths[number])
        fitting = room[: len(packs)] >= length
        at = int(fitting.argmax()) if fitting.any() else len(packs)
        if at == len(packs):
            packs.append([])
            room[at] = max(budget, length)
        packs[at].append(number)
        room[at] -= length
    return [tuple(pack) for pack in packs]
