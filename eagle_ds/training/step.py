"""One micro-batch through draft and loss, and one optimizer step of several, under any ZeRO stage.

The true loss of one optimizer step is sum_k decay^k * (sum of the row losses of TTT step k) / N_k, where N_k
counts rows over the whole global batch. DeepSpeed divides a loss by the accumulation steps and averages
gradients over all ranks, so each rank gives it

    world_size * accumulation * sum_k decay^k * (this rank's sum of TTT step k) / N_k

and both factors cancel. Every ZeRO stage and every layout then computes the gradient of the true loss.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from torch import Tensor

from eagle_ds.config.sections import TrainingConfig
from eagle_ds.data.batch import Batch, counted_rows
from eagle_ds.data.dataset import MicroBatch
from eagle_ds.data.sampler import GlobalBatch
from eagle_ds.kernels.attention import ReferenceAttention
from eagle_ds.model.arch import DraftArch
from eagle_ds.model.loss import HeadTargets, LossSettings, LossSums, head_loss, step_decays
from eagle_ds.model.offload import ActivationOffload
from eagle_ds.model.ttt import PrefixAttention
from eagle_ds.parallel.copies import to_device, to_host
from eagle_ds.parallel.exchange import SequenceExchange
from eagle_ds.sharding.sequence import SequenceSharding
from eagle_ds.store.store import ReadStats
from eagle_ds.target.head import TargetHead
from eagle_ds.training.feed import Feed
from eagle_ds.training.metrics import add, step_weights
from eagle_ds.training.world import World


def learning_rate(step: int, total_steps: int, training: TrainingConfig) -> float:
    """Return the rate of optimizer step ``step`` (from 0) of ``total_steps``.

    It rises linearly over the first ``warmup_ratio`` of all steps and then follows ``schedule`` towards
    ``min_learning_rate``, which step ``total_steps`` would have. It depends on the step number alone, so a
    resumed run restores no scheduler state.
    """
    peak, least = training.learning_rate, training.min_learning_rate
    warmup = round(training.warmup_ratio * total_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if training.schedule == "constant":
        return peak
    progress = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
    remaining = 1 - progress if training.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return least + (peak - least) * remaining


class MicroBatchRunner:
    """Runs draft and loss on one micro-batch. Holds what does not change between micro-batches."""

    def __init__(
        self, engine: DeepSpeedEngine, arch: DraftArch, head: TargetHead, kernel: ReferenceAttention,
        training: TrainingConfig, world: World,
    ) -> None:  # fmt: skip
        self.engine, self.arch = engine, arch
        self.head, self.kernel = head, kernel
        self.training, self.world = training, world
        self.sharding: SequenceSharding | None = None  # of the last micro-batch, for an out-of-memory message
        self.offload = ActivationOffload(world.device) if training.offload_activations else None

    def __call__(self, batch: Batch, weights: Tensor) -> tuple[Tensor, LossSums]:
        """Run draft and loss. Collective over the sequence-parallel group.

        Args:
            weights: [T], what multiplies the sum of row losses of each TTT step.

        Returns:
            The scalar loss of this rank's rows, and the sums that the metrics are computed from.
        """
        arch, training = self.arch, self.training
        self.sharding = batch.sharding
        exchange = SequenceExchange(
            batch.sharding, self.world.groups, arch.num_attention_heads, arch.num_key_value_heads
        )
        prefix = PrefixAttention(
            exchange, self.kernel, head_dim=arch.head_dim, sliding_window=arch.sliding_window,
            resend_queries=training.recompute == "full", device=self.world.device,
        )
        targets = self._targets(batch)
        weights = to_device(weights, self.world.device)
        kl = (training.kl_scale, training.kl_decay)
        settings = LossSettings(weights, training.loss, *kl, alpha_mean=self._alpha_mean)

        # The loss runs inside the engine's forward: ZeRO-3 has the head's parameters gathered only there.
        def loss_of(*states: Tensor) -> tuple[Tensor, LossSums]:
            return head_loss(*states, targets, settings)

        return self.engine(batch, prefix, loss_of, training.recompute, self.offload)

    def positions(self, tokens: int) -> int | None:
        """Return ``tokens`` (B * S) if the loss is normalised by positions, else None."""
        return tokens if self.training.loss_normalization == "positions" else None

    def _targets(self, batch: Batch) -> HeadTargets:
        token, logsumexp = batch.target_token, batch.target_logsumexp
        assert token is not None and logsumexp is not None, "the dataset computes missing token labels"
        counted = counted_rows(batch.trained, token, batch.target_index, self.head.t2d)
        rows = batch.target_index, batch.trained, counted
        return HeadTargets(self.head, batch.target_hidden, logsumexp, token, *rows)

    def _alpha_mean(self, alpha: Tensor, rows: Tensor) -> Tensor:
        """Return the mean acceptance over the counted rows of all ranks, float32 [T]. Collective.

        Args:
            alpha: [T], sum of the acceptance over this rank's counted rows.
            rows: [T], their number.
        """
        both = torch.stack([alpha, rows])
        if self.world.topology.world_size > 1:
            dist.all_reduce(both)
        return (both[0] / both[1].clamp(min=1)).float()


@dataclass
class StepOutcome:
    """What one optimizer step did. Metric sums are those of this rank, not yet added over ranks."""

    global_batch: GlobalBatch
    sums: LossSums
    norm: Callable[[], Tensor]  # gradient norm over all ranks before clipping; the call waits for the device
    applied: bool  # whether the norm was finite and the weights were updated
    culprits: tuple[str, ...]  # samples of this rank's micro-batches whose loss was not finite
    tokens: int  # of all ranks
    positions: int | None  # divisor of the loss if it is normalised by positions
    stats: ReadStats
    wait_s: float  # seconds that the loop waited for data
    read_s: float  # seconds that reading the data took, in the background

    @property
    def grad_norm(self) -> float:
        """The gradient norm as a number. Waits until the device has finished the step."""
        return float(self.norm())


class OptimizerStep:
    """Runs one optimizer step: takes micro-batches, accumulates gradients, updates the weights."""

    def __init__(self, runner: MicroBatchRunner) -> None:
        self.runner, self.engine = runner, runner.engine
        self.world, self.training = runner.world, runner.training
        self.decay = step_decays(self.training.step_decay, self.training.ttt_steps)
        # Plain float32 without ZeRO is the one mode in which DeepSpeed does not check for overflow.
        self._checks_overflow = self.engine.zero_optimization_stage() > 0 or self.engine.bfloat16_enabled()

    def run(self, feed: Feed, rate: float, while_busy: Callable[[], None] = lambda: None) -> StepOutcome:
        """Run one optimizer step. Collective over the world.

        If a loss or gradient is not finite, the weights are left unchanged and ``applied`` is False.

        Args:
            rate: the learning rate.
            while_busy: called once the first forward is queued. At this point the previous step has finished
                on the device, the device is busy, and the host has not yet had to wait for it (ZeRO-1 waits
                in the optimizer, ZeRO-2 and 3 already in the backward). Must not raise: other ranks may be
                waiting for this one.

        Raises:
            RankFailure: on all ranks, if any rank could not read its data or holds other data than the rest.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        losses, names = [], []
        sums, stats = None, ReadStats()
        wait_s = read_s = 0.0
        weights = torch.zeros(0)
        while True:
            started = time.perf_counter()
            item, counted = feed.take(self.world.agreement)
            wait_s += time.perf_counter() - started
            if item.index == 0:
                weights = self._weights(item, counted)
            loss, local = self.runner(item.batch, weights)
            # The forward is queued. Only now does the host do what can overlap with it.
            feed.advance()
            if item.index == 0:
                while_busy()
            losses.append(loss.detach())
            names.append(item.batch.names)
            # A loss that is not finite may still have finite gradients. Multiplied by NaN it always reaches
            # the gradient norm, which all ranks share, so no rank needs to copy its loss to the host here.
            self.engine.backward(loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan))
            sums, stats, read_s = add(sums, local), stats + item.stats, read_s + item.read_s
            if item.is_last:
                break
            self.engine.step()  # counts the micro-batch; DeepSpeed updates the weights at the last one only
        batch, tokens = item.global_batch, item.global_tokens
        # Release the batch while the device still has the backward to do: the next one is copied into its
        # memory as soon as the optimizer has waited for the device.
        del item, loss
        norm, applied = self._update()
        culprits = () if applied else _not_finite(losses, names)
        positions = self.runner.positions(tokens)
        return StepOutcome(batch, sums, norm, applied, culprits, tokens, positions, stats, wait_s, read_s)

    def _weights(self, item: MicroBatch, counted: Tensor) -> Tensor:
        scale = self.world.topology.world_size * len(item.global_batch.packs)
        return scale * step_weights(counted, self.decay, self.runner.positions(item.global_tokens))

    def _update(self) -> tuple[Callable[[], Tensor], bool]:
        """Update the weights if the gradient norm is finite. Returns (norm, whether they were updated)."""
        if self._checks_overflow:
            self.engine.step()
            norm = to_host(torch.as_tensor(self.engine.get_global_grad_norm()))
            return norm, bool(self.engine.was_step_applied())
        gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        norm = to_host(torch.nn.utils.get_total_norm(gradients))
        if norm() < float("inf"):  # false for NaN too
            self.engine.step()
            return norm, True
        # Skip the update, but advance the counters as engine.step() does: the next micro-batch begins a new
        # step.
        self.engine.zero_grad()
        self.engine.micro_steps += 1
        self.engine.global_steps += 1
        return norm, False


def _not_finite(losses: list[Tensor], names: list[tuple[str, ...]]) -> tuple[str, ...]:
    """Return the samples of the micro-batches whose loss is not finite."""
    bad = [batch for loss, batch in zip(losses, names, strict=True) if not torch.isfinite(loss)]
    return tuple(name for batch in bad for name in batch)
