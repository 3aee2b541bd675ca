"""One micro-batch through draft and loss, and one optimizer step of several, under any ZeRO stage.

DeepSpeed divides a loss by the accumulation steps and averages gradients over all ranks. The loss given to it is
therefore world_size * accumulation * sum_k decay^k * (this rank's sum of step k) / N_k, with N_k counted over the whole
step: then every stage and layout arrives at the gradient of the true global loss.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from torch import Tensor

from eagle_ds.config.recipe import TrainingConfig
from eagle_ds.data.batch import Batch
from eagle_ds.data.dataset import MicroBatch
from eagle_ds.data.sampler import GlobalBatch
from eagle_ds.kernels.attention import BlockAttention
from eagle_ds.model.arch import DraftArch
from eagle_ds.model.loss import HeadTargets, LossSettings, LossSums, counted_rows, head_loss, uniform_decay
from eagle_ds.model.offload import ActivationOffload
from eagle_ds.model.ttt import PrefixAttention
from eagle_ds.parallel.transfer import to_device, to_host
from eagle_ds.sharding.sequence import SequenceSharding
from eagle_ds.store.store import ReadStats
from eagle_ds.target.head import TargetHead
from eagle_ds.training.feed import Feed
from eagle_ds.training.metrics import add, step_weights
from eagle_ds.training.world import World


class MicroBatchRunner:
    """Runs the draft on one batch. Holds what does not change from batch to batch, and the plan that it worked on last."""

    def __init__(
        self, engine: DeepSpeedEngine, arch: DraftArch, head: TargetHead, kernel: BlockAttention, training: TrainingConfig, world: World
    ) -> None:
        self.engine, self.arch, self.head, self.kernel = engine, arch, head, kernel
        self.training, self.world = training, world
        self.sharding: SequenceSharding | None = None
        self.offload = ActivationOffload(world.device) if training.offload_activations else None

    def __call__(self, batch: Batch, weights: Tensor) -> tuple[Tensor, LossSums]:
        """(sum_k weights[k] * sum of this rank's row losses, metric sums). Collective over the sequence-parallel group."""
        arch, training, self.sharding = self.arch, self.training, batch.sharding
        prefix = PrefixAttention(
            batch.sharding,
            self.world.groups,
            self.kernel,
            query_heads=arch.num_attention_heads,
            kv_heads=arch.num_key_value_heads,
            head_dim=arch.head_dim,
            sliding_window=arch.sliding_window,
            resend_queries=training.recompute == "full",
            device=self.world.device,
        )
        targets = self._targets(batch)
        settings = LossSettings(
            to_device(weights, self.world.device), training.loss, training.kl_scale, training.kl_decay, alpha_mean=self._alpha_mean
        )
        return self.engine(batch, prefix, lambda *states: head_loss(*states, targets, settings), training.recompute, self.offload)

    def _targets(self, batch: Batch) -> HeadTargets:
        token, logsumexp = batch.target_token, batch.target_logsumexp
        assert token is not None and logsumexp is not None, "the dataset makes label facts where the store has none"
        counted = counted_rows(batch.trained, token, batch.target_index, self.head.t2d)
        return HeadTargets(self.head, batch.target_hidden, logsumexp, token, batch.target_index, batch.trained, counted)

    def _alpha_mean(self, alpha: Tensor, rows: Tensor) -> Tensor:
        """Mean over the counted rows that all ranks hold in this micro-batch, float32 [T]. Collective over the world."""
        both = torch.stack([alpha, rows])
        if self.world.topology.world_size > 1:
            dist.all_reduce(both)
        return (both[0] / both[1].clamp(min=1)).float()


@dataclass
class StepOutcome:
    """What one optimizer step did on this rank; ``sums`` are not yet added over ranks."""

    step: GlobalBatch
    sums: LossSums
    norm: Callable[[], Tensor]  # of the gradients of all ranks, before clipping: see ``transfer.to_host``
    applied: bool  # whether that was finite and the weights were updated
    culprits: tuple[str, ...]  # samples of this rank's micro-batches whose loss was not finite
    tokens: int  # of all ranks
    positions: int | None
    stats: ReadStats
    wait_s: float
    read_s: float

    @property
    def grad_norm(self) -> float:
        """Waits until the device is through with the step."""
        return float(self.norm())


class OptimizerStep:
    """Takes the micro-batches of one step from the feed, accumulates their gradients and updates the weights."""

    def __init__(self, runner: MicroBatchRunner) -> None:
        self.runner, self.engine, self.world, self.training = runner, runner.engine, runner.world, runner.training
        self.decay = uniform_decay(self.training.step_decay, self.training.ttt_steps)
        self._plain = self.engine.zero_optimization_stage() == 0 and not self.engine.bfloat16_enabled()

    def run(self, feed: Feed, learning_rate: float, meanwhile: Callable[[], None] = lambda: None) -> StepOutcome:
        """Collective over the world. Raises RankFailure on all ranks if any could not read its data or reads other data.

        With a loss or gradient that is not finite the weights are left alone (``applied`` False). ``meanwhile`` is called behind the
        first forward: the device is through with the step before and has this forward to do, and the host has yet to wait for it,
        which ZeRO-1 does in its optimizer, ZeRO-2 and 3 in the backward too. Other ranks may wait for this one then: it must not raise.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        sums, losses, names, stats, wait_s, read_s = None, [], [], ReadStats(), 0.0, 0.0
        weights = torch.zeros(0)
        while True:
            started = time.perf_counter()
            item, counted = feed.take(self.world.agreement)
            wait_s += time.perf_counter() - started
            if item.index == 0:
                weights = self._weights(item, counted)
            loss, local = self.runner(item.batch, weights)
            feed.go_on()
            if item.index == 0:
                meanwhile()
            losses.append(loss.detach())
            names.append(item.batch.names)
            self.engine.backward(loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan))
            sums, stats, read_s = add(sums, local), stats + item.stats, read_s + item.read_s
            if item.is_last:
                break
            self.engine.step()  # counts the micro-batch; DeepSpeed updates at the last one
        step, tokens = item.step, item.global_tokens
        del item, loss  # while the device still has the backward to do: once the optimizer has waited, the next sequence takes their place
        norm, applied = self._update()
        culprits = () if applied else tuple(n for loss, ns in zip(losses, names, strict=True) if not torch.isfinite(loss) for n in ns)
        return StepOutcome(step, sums, norm, applied, culprits, tokens, self.positions(tokens), stats, wait_s, read_s)

    def positions(self, tokens: int) -> int | None:
        """B * S where the loss is normalised by positions, else None."""
        return tokens if self.training.loss_normalization == "positions" else None

    def _weights(self, item: MicroBatch, counted: Tensor) -> Tensor:
        scale = self.world.topology.world_size * len(item.step.packs)
        return scale * step_weights(counted, self.decay, self.positions(item.global_tokens))

    def _update(self) -> tuple[Callable[[], Tensor], bool]:
        """``norm`` and ``applied`` of the outcome."""
        if not self._plain:
            self.engine.step()  # every ZeRO stage, and bf16 without ZeRO, skips by itself where the norm is not finite
            norm = to_host(torch.as_tensor(self.engine.get_global_grad_norm()))
            return norm, bool(self.engine.was_step_applied())
        gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        norm = to_host(torch.nn.utils.get_total_norm(gradients))
        if norm() < float("inf"):
            self.engine.step()
            return norm, True
        self.engine.zero_grad()
        self.engine.micro_steps += 1  # what else engine.step() does: the next micro-batch is the first of a step
        self.engine.global_steps += 1
        return norm, False
