"""Evaluation on held-out features: the training's own forward, without gradients, over the whole store."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from eagle_ds.data.dataset import MicroBatch, RankDataset
from eagle_ds.data.packing import Pack, first_fit
from eagle_ds.data.sampler import GlobalBatch
from eagle_ds.model.loss import LossSums, uniform_decay
from eagle_ds.training.feed import Feed
from eagle_ds.training.metrics import Metrics, add, metrics_of, sum_over_ranks
from eagle_ds.training.step import MicroBatchRunner


def evaluation_steps(dataset: RankDataset, dp: int, pack_tokens: int | None) -> list[GlobalBatch]:
    """Every sample once, longest packs first; the last step repeats its first pack for ranks that have none left."""
    lengths = np.array([s.document.num_tokens for s in dataset.samples], dtype=np.int64)
    numbers = range(len(lengths))
    packs: list[Pack] = [(n,) for n in numbers] if pack_tokens is None else first_fit(numbers, lengths, pack_tokens)
    packs.sort(key=lambda pack: -int(lengths[list(pack)].sum()))
    steps = []
    for start in range(0, len(packs), dp):
        own = packs[start : start + dp]
        steps.append(GlobalBatch(start // dp, 0, (tuple(own + own[:1] * (dp - len(own))),)))
    return steps


class Evaluator:
    """Runs the draft over held-out samples. Collective over the world."""

    def __init__(self, runner: MicroBatchRunner, dataset: RankDataset, pack_tokens: int | None, feed_settings: dict[str, Any]) -> None:
        self.runner, self.dataset, self.world, self.training = runner, dataset, runner.world, runner.training
        self.steps = evaluation_steps(dataset, self.world.topology.dp, pack_tokens)
        self.num_packs = sum(len({*step.packs[0]}) for step in self.steps)
        self._feed_settings = feed_settings
        self.decay = uniform_decay(self.training.step_decay, self.training.ttt_steps)

    @torch.no_grad()
    def run(self) -> Metrics:
        """Raises RankFailure on all ranks if any cannot read its data."""
        sums: LossSums | None = None
        tokens = 0
        self.runner.engine.eval()
        with Feed(self.dataset, self.steps, **self._feed_settings) as feed:
            for _ in self.steps:
                item, _ = feed.take(self.world.agreement)
                _, local = self.runner(item.batch, torch.ones(self.training.ttt_steps, dtype=torch.float64))
                feed.go_on()
                repeated = self._is_repeat(item)
                sums = add(sums, LossSums(local.steps * (not repeated), local.lengths * (not repeated)))
                tokens += self._tokens(item)
        self.runner.engine.train()
        assert sums is not None
        positions = tokens if self.training.loss_normalization == "positions" else None
        arrived = sum_over_ranks(sums, self.world.topology.world_size)
        return metrics_of(arrived(), self.decay, positions)

    def _is_repeat(self, item: MicroBatch) -> bool:
        packs = item.step.packs[0]
        return packs.index(packs[self.dataset.dp_rank]) != self.dataset.dp_rank

    def _tokens(self, item: MicroBatch) -> int:
        """Tokens of the step's packs over all dp ranks, each pack once."""
        return sum(self.dataset.samples[n].document.num_tokens for pack in {*item.step.packs[0]} for n in pack)
