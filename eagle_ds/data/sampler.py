"""Which packs train in which step: a function of seed and step number alone, the same on every rank.

So the resume state is the step number, whatever the prefetching and the number of workers, and no rank has to ask
another what comes next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from eagle_ds.data.packing import Pack, TrainSample, first_fit

PACK_WINDOW = 4096  # samples shuffled together before they are packed: packs differ from epoch to epoch
MATCH_WINDOW = 64  # global micro-batches within which data-parallel ranks are given packs of like cost


@dataclass(frozen=True)
class GlobalBatch:
    """One optimizer step: ``packs[micro_batch][dp_rank]``."""

    number: int
    epoch: int
    packs: tuple[tuple[Pack, ...], ...]


class Sampler:
    """Shuffles, packs and deals out the samples of every epoch.

    An epoch's last packs that do not fill a step (``dp * accumulation`` packs) are left out of it; another epoch's
    shuffle leaves out others. Raises ValueError if an epoch has no full step.
    """

    def __init__(
        self,
        samples: Sequence[TrainSample],
        *,
        dp: int,
        accumulation: int = 1,
        pack_tokens: int | None = None,
        seed: int = 0,
        ttt_steps: int = 7,
    ) -> None:
        self.dp, self.accumulation, self.pack_tokens, self.seed = dp, accumulation, pack_tokens, seed
        self.lengths = np.array([s.document.num_tokens for s in samples], dtype=np.int64)
        self.costs = self.lengths + ttt_steps * np.array([s.query_rows for s in samples], dtype=np.int64)
        self._packed: tuple[int, list[Pack]] | None = None
        packs, per_step = len(self.epoch_packs(0)), dp * accumulation
        if packs < per_step:
            raise ValueError(
                f"one optimizer step takes dp {dp} * gradient_accumulation {accumulation} = {per_step} sequences, but the store yields "
                f"{packs} an epoch; lower training.gradient_accumulation or data.pack_tokens, use fewer ranks, or capture more samples"
            )

    def epoch_packs(self, epoch: int) -> list[Pack]:
        """All packs of ``epoch`` in training order."""
        if self._packed is None or self._packed[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            order = rng.permutation(len(self.lengths))
            self._packed = (epoch, self._matched(self._pack(order, rng), rng))
        return self._packed[1]

    def steps_in(self, epoch: int) -> int:
        """Full steps of ``epoch``."""
        return len(self.epoch_packs(epoch)) // (self.dp * self.accumulation)

    def trained_packs(self, epoch: int) -> int:
        """Packs of ``epoch`` that its full steps take."""
        return self.steps_in(epoch) * self.dp * self.accumulation

    def count_steps(self, epochs: int, max_steps: int | None = None) -> int:
        """Optimizer steps of ``epochs`` passes, or ``max_steps`` if that is less."""
        total = 0
        for epoch in range(epochs):
            total += self.steps_in(epoch)
            if (max_steps is not None and total >= max_steps) or self.pack_tokens is None:
                break
        if self.pack_tokens is None:
            total *= epochs
        return total if max_steps is None else min(total, max_steps)

    def global_batches(self, start: int, stop: int) -> Iterator[GlobalBatch]:
        """Steps number ``start`` to ``stop`` (exclusive), over as many epochs as that takes."""
        epoch, first = 0, 0
        while first < stop:
            here = self.steps_in(epoch)
            for number in range(max(start, first), min(stop, first + here)):
                yield self._step(number, epoch, number - first)
            epoch, first = epoch + 1, first + here

    def _step(self, number: int, epoch: int, place: int) -> GlobalBatch:
        packs, per_step = self.epoch_packs(epoch), self.dp * self.accumulation
        own = packs[place * per_step : (place + 1) * per_step]
        return GlobalBatch(number, epoch, tuple(tuple(own[i : i + self.dp]) for i in range(0, per_step, self.dp)))

    def _pack(self, order: np.ndarray, rng: np.random.Generator) -> list[Pack]:
        if self.pack_tokens is None:
            return [(number,) for number in order.tolist()]
        packs: list[Pack] = []
        for at in range(0, len(order), PACK_WINDOW):
            window = first_fit(order[at : at + PACK_WINDOW], self.lengths, self.pack_tokens)
            packs += [window[i] for i in rng.permutation(len(window))]
        return packs

    def _matched(self, packs: list[Pack], rng: np.random.Generator) -> list[Pack]:
        """Packs of like cost side by side, in groups of dp, so that ranks do not wait for one another; groups in random order."""
        if self.dp == 1:
            return packs
        size, matched = MATCH_WINDOW * self.dp, []
        for at in range(0, len(packs), size):
            window = packs[at : at + size]
            whole = len(window) // self.dp * self.dp
            window, rest = sorted(window[:whole], key=lambda pack: int(self.costs[list(pack)].sum())), window[whole:]
            groups = [window[i : i + self.dp] for i in range(0, whole, self.dp)]
            matched += [pack for i in rng.permutation(len(groups)) for pack in groups[i]] + rest
        return matched
