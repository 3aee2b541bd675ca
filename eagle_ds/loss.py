"""Fused head and loss: T steps of draft logits against soft target labels, never more than a chunk of rows at once.

For one counted row with draft logits z, p = softmax(z), label q over the draft vocabulary, and the full-vocabulary
label q' = exp(target logit - full logsumexp) (so sum q' <= 1):

    soft cross-entropy   c = logsumexp(z) - q.z                    dc/dz = p - q
    acceptance           alpha = sum_v min(q'_v, p_v)              dalpha/dz = p * (m - m.p),  m = [p < q']

The gradients with respect to states and weights are computed in forward, chunk by chunk, and only scaled in backward, so
neither logits nor probabilities outlive their chunk. A chunk of C rows holds about 5 * C * Vd * 4 bytes: target
logits, labels, full labels, draft logits and their gradient. Rows that do not count are skipped before the matmul.
Losses: DESIGN section 2; soft cross-entropy as in EAGLE-3 (arXiv:2503.01840).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = 1 << 30
COLUMNS = ("loss", "cross_entropy", "entropy", "counted", "trained", "correct", "alpha")

LossKind = Literal["kl", "alpha", "lambda"]


@dataclass(frozen=True)
class TargetHead:
    """The target's head, frozen: what labels are made from."""

    full: Tensor | None  # [V, H]; needed only where the store holds no label facts
    draft_rows: Tensor  # [Vd, H], its rows of the draft vocabulary
    t2d: Tensor  # bool [V]
    d2t: Tensor  # int64 [Vd], offsets: target id = i + d2t[i]


@dataclass(frozen=True)
class HeadTargets:
    """Labels of one micro-batch: row p of step k is taught by target row ``index[p, k]``."""

    head: TargetHead
    hidden: Tensor  # [M, H], target hidden states
    logsumexp: Tensor  # float32 [M], over the full vocabulary
    token: Tensor  # int64 [M], argmax over the full vocabulary
    index: Tensor  # int64 [N, T]
    trained: Tensor  # bool [N, T], by mask alone
    counted: Tensor  # bool [N, T], trained and with the target's argmax in the draft vocabulary


@dataclass(frozen=True)
class LossSettings:
    """``weights`` [T] multiply step k's sum over counted rows: decay^k / N_k times what the engine divides by.

    ``alpha_mean`` (for ``lambda`` alone) turns local (sum of alpha, rows), each [T], into the mean over all ranks: collective.
    """

    weights: Tensor
    kind: LossKind = "kl"
    kl_scale: float = 1.0
    kl_decay: float = 3.0
    alpha_mean: Callable[[Tensor, Tensor], Tensor] | None = None
    chunk_bytes: int = CHUNK_BYTES


@dataclass
class StepSums:
    """This rank's sums for the metrics, to be added over ranks and micro-batches: no means here."""

    steps: Tensor  # float64 [T, len(COLUMNS)], one column a name
    lengths: Tensor  # float64 [2]: sum over trained rows of sum_k prod_{j<=k} alpha_j, and their number

    def __getitem__(self, column: str) -> Tensor:
        return self.steps[:, COLUMNS.index(column)]

    def flat(self) -> Tensor:
        """One vector, so that one all-reduce carries everything."""
        return torch.cat([self.steps.reshape(-1), self.lengths])

    @classmethod
    def from_flat(cls, flat: Tensor) -> StepSums:
        """The inverse of ``flat``."""
        return cls(flat[:-2].view(-1, len(COLUMNS)), flat[-2:])


@torch.no_grad()
def label_facts(hidden: Tensor, head: Tensor, chunk_bytes: int = CHUNK_BYTES) -> tuple[Tensor, Tensor]:
    """(argmax int64 [M], logsumexp float32 [M]) of head @ hidden over the full vocabulary; hidden [M, H], head [V, H]."""
    rows = max(chunk_bytes // (8 * head.shape[0]), 1)
    token, logsumexp = [hidden.new_zeros(0, dtype=torch.int64)], [hidden.new_zeros(0, dtype=_wide(hidden))]
    for chunk in hidden.split(rows) if len(hidden) else ():
        logits = _logits(chunk, head)
        token.append(logits.argmax(-1))
        logsumexp.append(torch.logsumexp(logits, -1))
    return torch.cat(token), torch.cat(logsumexp)


def counted_rows(trained: Tensor, token: Tensor, index: Tensor, t2d: Tensor) -> Tensor:
    """bool [N, T]: trained rows whose label's argmax is in the draft vocabulary."""
    return trained & t2d[token[index]] if len(token) else torch.zeros_like(trained)


def head_loss(
    states: list[Tensor], norm_weight: Tensor, weight: Tensor, eps: float, targets: HeadTargets, settings: LossSettings
) -> tuple[Tensor, StepSums]:
    """(sum_k weights[k] * sum of counted rows' losses, metric sums). ``states``: T un-normed outputs [N, D]; weight [Vd, D].

    Differentiable in states, norm_weight and weight. Collective for the ``lambda`` loss alone.
    """
    mix = None
    if settings.kind == "lambda":
        assert settings.alpha_mean is not None
        first = _Pass([s.detach() for s in states], norm_weight.detach(), weight.detach(), eps, targets, settings, None)
        sums = first.run(gradients=False)
        mean = settings.alpha_mean(sums["alpha"], sums["counted"])
        mix = settings.kl_scale * torch.exp(-settings.kl_decay * mean)
    sums_out: list[StepSums] = []
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
        sums_out: list[StepSums],
        norm_weight: Tensor,
        weight: Tensor,
        *states: Tensor,
    ) -> Tensor:
        work = _Pass(list(states), norm_weight, weight, eps, targets, settings, mix)
        sums_out.append(work.run(gradients=any(ctx.needs_input_grad)))
        ctx.gradients = work.gradients
        return (sums_out[0]["loss"] * settings.weights.to(torch.float64)).sum().to(_wide(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, None, None, None, *(g.mul_(grad.to(g.dtype)) for g in gradients)


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
    ) -> None:
        self.states, self.norm_weight, self.weight, self.eps = states, norm_weight, weight, eps
        self.targets, self.settings, self.mix = targets, settings, mix
        self.alpha = torch.zeros(targets.index.shape, dtype=torch.float64, device=weight.device)
        self.sums = torch.zeros(len(states), len(COLUMNS), dtype=torch.float64, device=weight.device)
        self.d_norm: Tensor | None = None
        self.d_weight: Tensor | None = None
        self.d_states: list[Tensor] = []

    @property
    def gradients(self) -> list[Tensor]:
        """Gradients of norm_weight, weight and the states, in their types."""
        if self.d_norm is None or self.d_weight is None:
            return []
        return [self.d_norm.to(self.norm_weight.dtype), self.d_weight.to(self.weight.dtype), *self.d_states]

    def run(self, *, gradients: bool) -> StepSums:
        """Visit every chunk of rows."""
        if gradients:
            wide = _wide(self.weight)
            self.d_norm = torch.zeros_like(self.norm_weight, dtype=wide)
            self.d_weight = torch.zeros_like(self.weight, dtype=wide)
            self.d_states = [torch.zeros_like(s) for s in self.states]
        rows = max(self.settings.chunk_bytes // (20 * self.weight.shape[0]), 16)
        for start in range(0, self.targets.index.shape[0], rows):
            self._chunk(start, min(start + rows, self.targets.index.shape[0]))
        trained = self.targets.trained
        self.sums[:, COLUMNS.index("counted")] = self.targets.counted.sum(0)
        self.sums[:, COLUMNS.index("trained")] = trained.sum(0)
        self.sums[:, COLUMNS.index("alpha")] = self.alpha.sum(0)
        rows_trained = trained.any(1).sum().to(torch.float64)
        return StepSums(self.sums, torch.stack([self.alpha.cumprod(1).sum(), rows_trained]))

    def _chunk(self, start: int, stop: int) -> None:
        """Labels of the chunk's target rows once, then every step against them."""
        index, counted = self.targets.index[start:stop], self.targets.counted[start:stop]
        used = index[counted]
        if not len(used):
            return
        low, high = int(used.min()), int(used.max()) + 1
        target_logits = _logits(self.targets.hidden[low:high], self.targets.head.draft_rows)
        log_q = F.log_softmax(target_logits, -1)
        labels = _Labels(
            q=log_q.exp(),
            entropy=-(log_q.exp() * log_q).sum(-1),
            q_full=torch.exp(target_logits - self.targets.logsumexp[low:high, None].to(target_logits.dtype)),
            token=self.targets.token[low:high],
        )
        for step in range(len(self.states)):
            rows = counted[:, step].nonzero().squeeze(-1)
            if len(rows):
                self._step(step, start + rows, labels.rows(index[rows, step] - low))

    def _step(self, step: int, rows: Tensor, labels: _Labels) -> None:
        wide = _wide(self.weight)
        x = self.states[step][rows].to(wide)
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        normed = ((x * scale).to(self.weight.dtype) * self.norm_weight).contiguous()
        logits = _logits(normed, self.weight)
        logsumexp = torch.logsumexp(logits, -1)
        p = torch.exp(logits - logsumexp[:, None])
        cross_entropy = logsumexp - (labels.q * logits).sum(-1)
        alpha = torch.minimum(labels.q_full, p).sum(-1)
        loss = self._loss(step, cross_entropy, labels.entropy, alpha)
        correct = self._draft_to_target(logits.argmax(-1)) == labels.token
        self.alpha[rows, step] = alpha.to(torch.float64)
        for column, value in (("loss", loss), ("cross_entropy", cross_entropy), ("entropy", labels.entropy), ("correct", correct)):
            self.sums[step, COLUMNS.index(column)] += value.sum(dtype=torch.float64)
        if self.d_weight is None or self.d_norm is None:
            return
        d_logits = (self._d_logits(step, p, labels, alpha) * self.settings.weights[step]).to(self.weight.dtype)
        self.d_weight += d_logits.t() @ normed
        d_normed = (d_logits @ self.weight).to(wide)
        x_hat = x * scale
        self.d_norm += (d_normed * x_hat).sum(0)
        d_x_hat = d_normed * self.norm_weight
        self.d_states[step][rows] = (scale * (d_x_hat - x_hat * (d_x_hat * x_hat).mean(-1, keepdim=True))).to(self.d_states[step].dtype)

    def _loss(self, step: int, cross_entropy: Tensor, entropy: Tensor, alpha: Tensor) -> Tensor:
        """Loss of each row, by the recipe's kind."""
        if self.settings.kind == "kl":
            return cross_entropy
        if self.settings.kind == "alpha":
            return -torch.log(alpha)
        w = self.mix[step] if self.mix is not None else 1.0
        return w * (cross_entropy - entropy) + (1 - w) * (1 - alpha)

    def _d_logits(self, step: int, p: Tensor, labels: _Labels, alpha: Tensor) -> Tensor:
        """Its gradient with respect to the logits."""
        if self.settings.kind == "kl":
            return p - labels.q
        below = (p < labels.q_full).to(p.dtype)
        d_alpha = p * (below - (below * p).sum(-1, keepdim=True))
        if self.settings.kind == "alpha":
            return -d_alpha / alpha[:, None]
        w = self.mix[step] if self.mix is not None else 1.0
        return w * (p - labels.q) - (1 - w) * d_alpha

    def _draft_to_target(self, draft_id: Tensor) -> Tensor:
        return draft_id + self.targets.head.d2t[draft_id]


@dataclass
class _Labels:
    """Label probabilities of some target rows."""

    q: Tensor  # [M, Vd], softmax over the draft vocabulary
    entropy: Tensor  # [M], of q
    q_full: Tensor  # [M, Vd], softmax over the full vocabulary, draft tokens' part
    token: Tensor  # int64 [M]

    def rows(self, index: Tensor) -> _Labels:
        return _Labels(self.q[index], self.entropy[index], self.q_full[index], self.token[index])


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _logits(x: Tensor, weight: Tensor) -> Tensor:
    """x [n, D] @ weight [V, D].T with float32 results (float64 for float64)."""
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    return F.linear(x, weight.to(x.dtype)).to(_wide(x))


def uniform_decay(decay: float, ttt_steps: int) -> Tensor:
    """decay^k, float64 [T]."""
    return torch.tensor([math.pow(decay, k) for k in range(ttt_steps)], dtype=torch.float64)
