"""Fused head and loss: T steps of draft logits against soft target labels, never more than a chunk of rows at once.

For one counted row with draft logits z, p = softmax(z), label q over the draft vocabulary, and the full-vocabulary
label q' = exp(target logit - full logsumexp) (so sum q' <= 1):

    soft cross-entropy   c = logsumexp(z) - q.z                    dc/dz = p - q
    acceptance           alpha = sum_v min(q'_v, p_v)              dalpha/dz = p * (m - m.p),  m = [p < q']

The gradients with respect to states and weights are computed in forward, chunk by chunk, and only scaled in backward, so
neither logits nor probabilities outlive their chunk. All T steps of a chunk's C rows go through each matmul together:
C * T pairs of (row, step), less those that do not count, each with its logits in float32 and their gradient in the weight's
type, and C + T label rows in float32: C * Vd * (6T + 12) bytes in bf16. Pairs stand row by row, so that the steps that one
label teaches are neighbours and find it in the cache. Losses: DESIGN section 2; soft cross-entropy as in EAGLE-3
(arXiv:2503.01840).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eagle_ds.kernels.attention import wide
from eagle_ds.kernels.fused import is_half_on_gpu
from eagle_ds.kernels.linear import add_product
from eagle_ds.kernels.loss import LossKernels, LossKind, PlainKernels
from eagle_ds.kernels.norm import rms_norm
from eagle_ds.parallel.copies import copy_rows, to_host
from eagle_ds.sharding.tiles import LOSS_CHUNK_BYTES, loss_chunk_rows
from eagle_ds.target.head import TargetHead, head_logits

COLUMNS = ("loss", "cross_entropy", "entropy", "counted", "trained", "correct", "alpha")


@dataclass
class HeadTargets:
    """Labels of one micro-batch: row p of step k is taught by target row ``index[p, k]``.

    Make it before the draft's forward: what the host must know of the rows is on its way to it from here on, so that the loss need
    not wait for the device.
    """

    head: TargetHead
    hidden: Tensor  # [M, H], target hidden states
    logsumexp: Tensor  # float32 [M], over the full vocabulary
    token: Tensor  # int64 [M], argmax over the full vocabulary
    index: Tensor  # int64 [N, T]
    trained: Tensor  # bool [N, T], by mask alone
    counted: Tensor  # bool [N, T], trained and with the target's argmax in the draft vocabulary
    on_host: Callable[[], Tensor] = field(init=False, repr=False)  # int64 [3, N]: counted pairs up to each row, its first and last label

    def __post_init__(self) -> None:
        pairs = self.counted.sum(1).cumsum(0)
        self.on_host = to_host(torch.stack([pairs, self.index[:, 0], self.index[:, -1]]))


@dataclass(frozen=True)
class LossSettings:
    """``weights`` [T] multiply step k's sum over counted rows: decay^k / N_k times what the engine divides by.

    ``alpha_mean`` (for ``lambda`` alone) turns local (sum of alpha, rows), each [T], into the mean over all ranks: collective. It
    is that of one micro-batch; the global batch's, accumulation included, is known only after a forward over all of it.
    """

    weights: Tensor
    kind: LossKind = "kl"
    kl_scale: float = 1.0
    kl_decay: float = 3.0
    alpha_mean: Callable[[Tensor, Tensor], Tensor] | None = None
    chunk_bytes: int | None = None  # by default LOSS_CHUNK_BYTES of the device


@dataclass
class LossSums:
    """This rank's sums for the metrics, to be added over ranks and micro-batches: no means here."""

    steps: Tensor  # float64 [T, len(COLUMNS)], one column a name
    lengths: Tensor  # float64 [2]: sum over trained rows of sum_k prod_{j<=k} alpha_j, and their number

    def __getitem__(self, column: str) -> Tensor:
        return self.steps[:, COLUMNS.index(column)]

    def flat(self) -> Tensor:
        """One vector, so that one all-reduce carries everything."""
        return torch.cat([self.steps.reshape(-1), self.lengths])

    @classmethod
    def from_flat(cls, flat: Tensor) -> LossSums:
        """The inverse of ``flat``."""
        return cls(flat[:-2].view(-1, len(COLUMNS)), flat[-2:])


def head_loss(
    states: list[Tensor], norm_weight: Tensor, weight: Tensor, eps: float, targets: HeadTargets, settings: LossSettings
) -> tuple[Tensor, LossSums]:
    """(sum_k weights[k] * sum of counted rows' losses, metric sums). ``states``: T un-normed outputs [N, D]; weight [Vd, D].

    Differentiable in states, norm_weight and weight. Collective for the ``lambda`` loss alone.
    """
    if not torch.is_grad_enabled():  # a Function still sees parameters as wanting gradients
        norm_weight, weight = norm_weight.detach(), weight.detach()
    mix = None
    if settings.kind == "lambda":
        assert settings.alpha_mean is not None
        with torch.no_grad():
            sums = _Pass(states, norm_weight, weight, eps, targets, settings, None, gradients=False).run()
        mean = settings.alpha_mean(sums["alpha"], sums["counted"])
        mix = settings.kl_scale * torch.exp(-settings.kl_decay * mean)
    sums_out: list[LossSums] = []
    loss = _HeadLoss.apply(eps, targets, settings, mix, sums_out, norm_weight, weight, *states)
    return loss, sums_out[0]


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        eps: float,
        targets: HeadTargets,
        settings: LossSettings,
        mix: Tensor | None,
        sums_out: list[LossSums],
        norm_weight: Tensor,
        weight: Tensor,
        *states: Tensor,
    ) -> Tensor:
        work = _Pass(list(states), norm_weight, weight, eps, targets, settings, mix, gradients=any(ctx.needs_input_grad))
        sums_out.append(work.run())
        ctx.gradients = work.gradients()
        return (sums_out[0]["loss"] * settings.weights.to(torch.float64)).sum().to(wide(weight.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for gradient in gradients:
            by_type.setdefault(gradient.dtype, []).append(gradient)
        for dtype, alike in by_type.items():
            torch._foreach_mul_(alike, grad.to(dtype))
        return None, None, None, None, None, *gradients


class _Pass:
    """One walk over the rows: losses, metric sums and, if asked for, the gradients of the weighted loss."""

    def __init__(
        self,
        states: list[Tensor],
        norm_weight: Tensor,
        weight: Tensor,
        eps: float,
        targets: HeadTargets,
        settings: LossSettings,
        mix: Tensor | None,
        *,
        gradients: bool,
    ) -> None:
        self.states, self.norm_weight, self.weight, self.eps = states, norm_weight, weight, eps
        self.targets, self.settings, self.mix = targets, settings, mix
        self.kernels = _kernels_for(weight)
        self.scales = settings.weights.to(weight.device, wide(weight.dtype))
        rows, steps = targets.counted.shape
        blank = torch.zeros(rows, steps, dtype=wide(weight.dtype), device=weight.device)
        self.cross_entropy, self.entropy, self.alpha, self.correct = blank, blank.clone(), blank.clone(), blank.clone()
        self.pairs_to, self.first_label, self.last_label = targets.on_host()
        size = int(self.pairs_to[-1]) if rows else 0
        self.pairs = torch.nonzero_static(targets.counted.reshape(-1), size=size).squeeze(1)  # row * T + step
        self.d_norm: Tensor | None = None
        if gradients:
            self.d_norm = torch.zeros_like(norm_weight, dtype=wide(norm_weight.dtype))
            self.d_weight = torch.zeros_like(weight, dtype=wide(weight.dtype))
            self.d_states = [torch.empty_like(s) for s in states]

    def gradients(self) -> list[Tensor]:
        """Gradients of norm_weight, weight and the states, in their types."""
        if self.d_norm is None:
            return []
        return [self.d_norm.to(self.norm_weight.dtype), self.d_weight.to(self.weight.dtype), *self.d_states]

    def run(self) -> LossSums:
        """Visit every chunk of rows."""
        for chunk in self._chunks():
            self._chunk(chunk)
        trained, counted = self.targets.trained, self.targets.counted
        columns = (self._losses(), self.cross_entropy, self.entropy, counted, trained, self.correct, self.alpha)
        sums = torch.stack([column.sum(0, dtype=torch.float64) for column in columns], dim=1)
        lengths = torch.stack([self.alpha.to(torch.float64).cumprod(1).sum(), trained.any(1).sum().to(torch.float64)])
        return LossSums(sums, lengths)

    def _chunks(self) -> Iterator[_Chunk]:
        budget = self.settings.chunk_bytes or LOSS_CHUNK_BYTES[self.weight.device.type]
        rows = loss_chunk_rows(self.weight.shape[0], len(self.states), self.weight.element_size(), budget)
        size, done = len(self.pairs_to), 0
        for start in range(0, size, rows):
            stop = min(start + rows, size)
            pairs, labels = int(self.pairs_to[stop - 1]), (int(self.first_label[start]), int(self.last_label[stop - 1]) + 1)
            yield _Chunk(start, stop, done, pairs, *labels)
            done = pairs

    def _chunk(self, chunk: _Chunk) -> None:
        """Labels of the chunk's target rows once, all steps' logits against them, and the gradients of both matmuls."""
        if chunk.first_pair == chunk.last_pair:
            if self.d_norm is not None:
                for gradient in self.d_states:
                    gradient[chunk.start : chunk.stop] = 0
            return
        pairs = self.pairs[chunk.first_pair : chunk.last_pair]
        labels = self._labels(chunk.first_label, chunk.last_label)
        states = torch.stack([s[chunk.start : chunk.stop] for s in self.states], 1).flatten(0, 1)
        every = len(pairs) == len(states)
        local = pairs - chunk.start * len(self.states)
        x = states if every else states[local]
        if self.d_norm is None:
            self._losses_of(pairs, self._normed(x, self.norm_weight), labels, None)
            return
        with torch.enable_grad():
            x, norm_weight = x.detach().requires_grad_(), self.norm_weight.detach().requires_grad_()
            normed = self._normed(x, norm_weight)
        d_logits = self.weight.new_empty(len(pairs), self.weight.shape[0])
        self._losses_of(pairs, normed.detach(), labels, d_logits)
        add_product(self.d_weight, d_logits.t(), normed.detach())
        d_x, d_norm = torch.autograd.grad(normed, [x, norm_weight], d_logits @ self.weight)
        self.d_norm += d_norm
        d_states = d_x if every else torch.zeros_like(states).index_copy_(0, local, d_x)
        for gradient, part in zip(self.d_states, d_states.unflatten(0, (-1, len(self.states))).unbind(1), strict=True):
            copy_rows(gradient[chunk.start : chunk.stop], part)

    def _normed(self, x: Tensor, norm_weight: Tensor) -> Tensor:
        return rms_norm(x, norm_weight, self.eps)

    def _labels(self, low: int, high: int) -> _Labels:
        logits = head_logits(self.targets.hidden[low:high], self.targets.head.draft_rows, widen=False)
        lse_draft, entropy = self.kernels.label_sums(logits)
        return _Labels(low, logits, lse_draft, self.targets.logsumexp[low:high].to(logits.dtype), entropy, self.targets.token[low:high])

    def _losses_of(self, pairs: Tensor, normed: Tensor, labels: _Labels, d_logits: Tensor | None) -> None:
        """Losses of ``pairs``; their weighted gradient with respect to the logits into ``d_logits``."""
        step = pairs % len(self.states)
        label_row = self.targets.index.reshape(-1)[pairs] - labels.first
        mix = None if self.mix is None else self.mix[step]
        cross_entropy, alpha, best = self.kernels.row_losses(
            head_logits(normed, self.weight, widen=False), labels.logits, label_row, labels.lse_draft, labels.lse_full,
            self.settings.kind, mix, self.scales[step], d_logits,
        )  # fmt: skip
        self.cross_entropy.view(-1)[pairs] = cross_entropy
        self.alpha.view(-1)[pairs] = alpha
        self.entropy.view(-1)[pairs] = labels.entropy[label_row]
        self.correct.view(-1)[pairs] = (best + self.targets.head.d2t[best] == labels.token[label_row]).to(alpha.dtype)

    def _losses(self) -> Tensor:
        """[N, T] losses by the recipe's kind, 0 where a row does not count."""
        counted = self.targets.counted
        if self.settings.kind == "kl":
            return self.cross_entropy
        if self.settings.kind == "alpha":
            return -torch.log(torch.where(counted, self.alpha, 1.0))
        w = 1.0 if self.mix is None else self.mix
        return torch.where(counted, w * (self.cross_entropy - self.entropy) + (1 - w) * (1 - self.alpha), 0.0)


class _Chunk(NamedTuple):
    """Rows [start, stop), their counted pairs, and the target rows that teach them."""

    start: int
    stop: int
    first_pair: int
    last_pair: int
    first_label: int
    last_label: int


@dataclass
class _Labels:
    """Labels of the target rows from number ``first`` on."""

    first: int
    logits: Tensor  # [M, Vd], wide
    lse_draft: Tensor  # [M], over the draft vocabulary
    lse_full: Tensor  # [M], over the full vocabulary
    entropy: Tensor  # [M], of the label over the draft vocabulary
    token: Tensor  # int64 [M]


def _kernels_for(weight: Tensor) -> type[LossKernels]:
    """The Triton twin for half precision on a GPU, else the plain one."""
    if is_half_on_gpu(weight):
        from eagle_ds.kernels.loss_triton import TritonKernels

        return TritonKernels
    return PlainKernels


def uniform_decay(decay: float, ttt_steps: int) -> Tensor:
    """decay^k, float64 [T]."""
    return torch.tensor([math.pow(decay, k) for k in range(ttt_steps)], dtype=torch.float64)
