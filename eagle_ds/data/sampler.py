"""Decide which packs train in which optimizer step.

The order is a pure function of the seed and the step number. Every rank computes it without communication and
gets the same result. To resume, only the step number is needed; the depth of prefetching and the number of
reading processes do not matter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from eagle_ds.data.packing import Pack, TrainSample, first_fit

PACK_WINDOW = 4096  # samples packed together; they are shuffled first, so packs differ between epochs
MATCH_WINDOW = 64  # micro-batches (of dp packs) in a window in which packs are sorted by cost


@dataclass(frozen=True)
class GlobalBatch:
    """The packs of one optimizer step: ``packs[micro_batch][dp_rank]``."""

    number: int  # of the optimizer step, from 0
    epoch: int
    packs: tuple[tuple[Pack, ...], ...]


class Sampler:
    """Shuffle and pack the samples of each epoch, and group the packs into global batches.

    A global batch takes ``dp * accumulation`` packs. The packs at the end of an epoch that do not fill a
    global batch are skipped; another epoch is shuffled differently and skips others.

    Args:
        samples: the samples that training uses.
        dp: data-parallel size.
        accumulation: micro-batches per optimizer step.
        pack_tokens: token budget of a pack; None: one sample per pack.
        seed: seed of the shuffles.
        ttt_steps: T, for the estimate of a sample's cost.

    Raises:
        ValueError: the samples do not fill one global batch.
    """

    def __init__(
        self, samples: Sequence[TrainSample], *, dp: int, accumulation: int = 1,
        pack_tokens: int | None = None, seed: int = 0, ttt_steps: int = 7,
    ) -> None:
        self.dp, self.accumulation, self.pack_tokens, self.seed = dp, accumulation, pack_tokens, seed
        self.lengths = np.array([s.document.num_tokens for s in samples], dtype=np.int64)
        # A rough cost: K_0/V_0 of every token once, and T passes over the query rows.
        self.costs = self.lengths + ttt_steps * np.array([s.query_rows for s in samples], dtype=np.int64)
        self._packed: tuple[int, list[Pack]] | None = None
        packs, per_step = len(self.epoch_packs(0)), dp * accumulation
        if packs < per_step:
            raise ValueError(
                f"one optimizer step takes dp {dp} * gradient_accumulation {accumulation} = {per_step} "
                f"sequences, but the store yields {packs} per epoch; lower training.gradient_accumulation or "
                "data.pack_tokens, use fewer ranks, or capture more samples")

    def epoch_packs(self, epoch: int) -> list[Pack]:
        """Return all packs of ``epoch`` in training order. The packs of the last epoch asked for are kept."""
        if self._packed is None or self._packed[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            order = rng.permutation(len(self.lengths))
            self._packed = (epoch, self._matched(self._pack(order, rng), rng))
        return self._packed[1]

    def steps_in(self, epoch: int) -> int:
        """Return the number of optimizer steps in ``epoch``."""
        return len(self.epoch_packs(epoch)) // (self.dp * self.accumulation)

    def trained_packs(self, epoch: int) -> int:
        """Return the number of packs of ``epoch`` that train; the others do not fill a global batch."""
        return self.steps_in(epoch) * self.dp * self.accumulation

    def count_steps(self, epochs: int, max_steps: int | None = None) -> int:
        """Return the optimizer steps of ``epochs`` passes over the data, at most ``max_steps``."""
        # With packing each epoch has another number of packs, so pack and count each. Without, all are equal.
        total = 0
        for epoch in range(epochs):
            total += self.steps_in(epoch)
            if (max_steps is not None and total >= max_steps) or self.pack_tokens is None:
                break
        if self.pack_tokens is None:
            total *= epochs
        return total if max_steps is None else min(total, max_steps)

    def global_batches(self, start: int, stop: int) -> Iterator[GlobalBatch]:
        """Yield the global batches from ``start`` to ``stop`` (exclusive), over as many epochs as needed."""
        epoch, first = 0, 0
        while first < stop:
            here = self.steps_in(epoch)
            for number in range(max(start, first), min(stop, first + here)):
                yield self._global_batch(number, epoch, number - first)
            epoch, first = epoch + 1, first + here

    def _global_batch(self, number: int, epoch: int, place: int) -> GlobalBatch:
        packs, per_step = self.epoch_packs(epoch), self.dp * self.accumulation
        own = packs[place * per_step : (place + 1) * per_step]
        by_micro_batch = tuple(tuple(own[i : i + self.dp]) for i in range(0, per_step, self.dp))
        return GlobalBatch(number, epoch, by_micro_batch)

    def _pack(self, order: np.ndarray, rng: np.random.Generator) -> list[Pack]:
        if self.pack_tokens is None:
            return [(number,) for number in order.tolist()]
        packs: list[Pack] = []
        for start in range(0, len(order), PACK_WINDOW):
            window = first_fit(order[start : start + PACK_WINDOW], self.lengths, self.pack_tokens)
            packs += [window[i] for i in rng.permutation(len(window))]
        return packs

    def _matched(self, packs: list[Pack], rng: np.random.Generator) -> list[Pack]:
        """Order packs so that the dp packs of a micro-batch have similar cost.

        The ranks of a step wait for the slowest, so equal costs waste no time. Within a window, packs are
        sorted by cost and split into groups of dp. The groups are shuffled, so that cost does not grow along
        the window.
        """
        if self.dp == 1:
            return packs
        size, matched = MATCH_WINDOW * self.dp, []
        for start in range(0, len(packs), size):
            window = packs[start : start + size]
            whole = len(window) // self.dp * self.dp
            in_order = sorted(window[:whole], key=lambda pack: int(self.costs[list(pack)].sum()))
            groups = [in_order[i : i + self.dp] for i in range(0, whole, self.dp)]
            matched += [pack for i in rng.permutation(len(groups)) for pack in groups[i]] + window[whole:]
        return matched
