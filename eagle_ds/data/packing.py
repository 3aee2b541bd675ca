"""Select the samples that training uses, pack short ones into sequences, and shard a packed sequence.

All of it is integer arithmetic on the manifest; no HDF5 file is opened.

A pack is a tuple of sample numbers. Its samples (documents) are concatenated into one sequence in which each
row attends to its own document only. So packing adds no attention work, and the GPU gets long inputs. A
sample longer than the token budget forms a pack alone.
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
    """A stored sample and the part that training uses: its first ``document.num_tokens`` tokens."""

    entry: SampleEntry
    document: Document
    query_rows: int  # rows trained at one TTT step or more, by the loss mask


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
            parallel.ulysses, parallel.ring, ring_mode, training.ttt_steps, training.mask_alignment,
            parallel.trained_rows_only)

    def shard(self, documents: Sequence[Document]) -> SequenceSharding:
        """Shard ``documents``, packed into one sequence."""
        return shard_sequence(documents, **vars(self))  # the fields have the names of its arguments


@dataclass(frozen=True)
class Screening:
    """How many samples a store holds, and how many of them training uses or skips."""

    stored: int
    kept: int
    truncated: int
    overlong: int
    untrained: int

    def __str__(self) -> str:
        return (
            f"{self.kept} of {self.stored} samples are used ({self.truncated} of them truncated); skipped: "
            f"{self.overlong} too long, {self.untrained} without a trained row")


def screen(
    entries: Sequence[SampleEntry], *, max_length: int, overlong: Literal["truncate", "skip"], ttt_steps: int,
    alignment: Alignment,
) -> tuple[list[TrainSample], Screening]:
    """Select the samples that training can use.

    A sample without a trained row gives no gradient in any pack, so it is left out. Every rank computes the
    same selection from the manifest.

    Args:
        max_length: the most tokens of a sample.
        overlong: whether a longer sample is truncated or skipped.

    Returns:
        The samples in the manifest's order, and the counts.

    Raises:
        ValueError: no sample is left.
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
        fix = "raise data.max_length or capture samples with trained tokens"
        raise ValueError(f"the store holds nothing to train on: {screening}; {fix}")
    return kept, screening


def first_fit(numbers: Sequence[int], lengths: np.ndarray, budget: int) -> list[Pack]:
    """Pack samples into sequences of at most ``budget`` tokens, by first-fit decreasing.

    Samples are placed from the longest to the shortest (equal lengths in the order given), each into the
    first pack that has space for it. This wastes little and is deterministic, so all ranks get the same
    packs.

    Args:
        numbers: the samples to pack.
        lengths: tokens of every sample, int64, indexed by sample number.
    """
    order = np.asarray(numbers, dtype=np.int64)
    order = order[np.argsort(-lengths[order], kind="stable")]
    packs: list[list[int]] = []
    space = np.zeros(len(order), dtype=np.int64)  # tokens that still fit into each pack
    for number in order.tolist():
        length = int(lengths[number])
        fitting = space[: len(packs)] >= length
        # argmax gives the first True. If no pack has space, open a new one. A sample over the budget fills
        # a pack of its own.
        at = int(fitting.argmax()) if fitting.any() else len(packs)
        if at == len(packs):
            packs.append([])
            space[at] = max(budget, length)
        packs[at].append(number)
        space[at] -= length
    return [tuple(pack) for pack in packs]
