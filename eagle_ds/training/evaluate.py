"""Evaluation on held-out features: the forward of training, without gradients, over a whole store."""

from __future__ import annotations

import numpy as np
import torch

from eagle_ds.data.dataset import MicroBatch, RankDataset
from eagle_ds.data.packing import Pack, first_fit
from eagle_ds.data.sampler import GlobalBatch
from eagle_ds.model.loss import LossSums, step_decays
from eagle_ds.training.feed import Feed, FeedSettings
from eagle_ds.training.metrics import Metrics, add, metrics_of, sum_over_ranks
from eagle_ds.training.step import MicroBatchRunner


def evaluation_steps(dataset: RankDataset, dp: int, pack_tokens: int | None) -> list[GlobalBatch]:
    """Return global batches that hold every sample once, longest packs first.

    Each batch has one pack for each dp rank. Where the last batch lacks packs, its first pack is repeated,
    because every rank must take part in the forward; `Evaluator` does not count repeated packs.
    """
    lengths = np.array([s.document.num_tokens for s in dataset.samples], dtype=np.int64)
    numbers = range(len(lengths))
    packs: list[Pack] = [(n,) for n in numbers]
    if pack_tokens is not None:
        packs = first_fit(numbers, lengths, pack_tokens)
    packs.sort(key=lambda pack: -int(lengths[list(pack)].sum()))
    steps = []
    for start in range(0, len(packs), dp):
        own = packs[start : start + dp]
        steps.append(GlobalBatch(start // dp, 0, (tuple(own + own[:1] * (dp - len(own))),)))
    return steps


class Evaluator:
    """Runs the draft over held-out samples."""

    def __init__(
        self, runner: MicroBatchRunner, dataset: RankDataset, pack_tokens: int | None, feed: FeedSettings
    ) -> None:
        self.runner, self.dataset = runner, dataset
        self.feed_settings = feed
        self.world, self.training = runner.world, runner.training
        self.steps = evaluation_steps(dataset, self.world.topology.dp, pack_tokens)
        self.decay = step_decays(self.training.step_decay, self.training.ttt_steps)

    @torch.no_grad()
    def run(self) -> Metrics:
        """Evaluate every held-out sample. Collective. Raises RankFailure if any rank cannot read its data."""
        sums: LossSums | None = None
        tokens = 0
        # The weights scale only the loss that is returned, which is not used: the metrics come from the sums.
        ones = torch.ones(self.training.ttt_steps, dtype=torch.float64)
        self.runner.engine.eval()
        with Feed(self.dataset, self.steps, self.feed_settings) as feed:
            for _ in self.steps:
                item, _ = feed.take(self.world.agreement)
                _, local = self.runner(item.batch, ones)
                feed.advance()
                counts = not self._is_repeat(item)
                sums = add(sums, LossSums(local.steps * counts, local.lengths * counts))
                tokens += self._tokens(item)
        self.runner.engine.train()
        assert sums is not None
        arrived = sum_over_ranks(sums, self.world.topology.world_size)
        return metrics_of(arrived(), self.decay, self.runner.positions(tokens))

    def _is_repeat(self, item: MicroBatch) -> bool:
        """Whether an earlier dp rank has this rank's pack too."""
        packs, own = item.global_batch.packs[0], self.dataset.dp_rank
        return packs.index(packs[own]) != own

    def _tokens(self, item: MicroBatch) -> int:
        """Return the tokens of the batch over all dp ranks, each pack counted once."""
        numbers = [n for pack in {*item.global_batch.packs[0]} for n in pack]
        return sum(self.dataset.samples[n].document.num_tokens for n in numbers)
