"""Fused head and loss: T steps of draft logits against soft target labels, never more than a chunk of rows at once.

For one counted row with draft logits z, p = softmax(z), label q over the draft vocabulary, and the full-vocabulary
label q' = exp(target logit - full logsumexp) (so sum q' <= 1):

    soft cross-entropy   c = logsumexp(z) - q.z                    dc/dz = p - q
    acceptance           alpha = sum_v min(q'_v, p_v)              dalpha/dz = p * (m - m.p),  m = [p < q']

The gradients with respect to states and weights are computed in forward, chunk by chunk, and only scaled in backward, so
neither logits nor probabilities outlive their chunk. A chunk of C rows holds the gradients of all T steps' logits in the
weight's type (so that one matmul serves all steps) and three float32 copies of one step's: C * Vd * (2T + 12) bytes in
bf16. Rows that do not count are skipped before the matmul. Losses: DESIGN section 2; soft cross-entropy as in EAGLE-3
(arXiv:2503.01840).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from eagle_ds.model.attention import wide
from eagle_ds.model.elementwise import rms_norm

CHUNK_BYTES = {"cuda": 2 << 30, "cpu": 1 << 28}  # a GPU's matmuls want rows, a CPU's caches want few
COLUMNS = ("loss", "cross_entropy", "entropy", "counted", "trained", "correct", "alpha")

LossKind = Literal["kl", "alpha", "lambda"]
Rows = slice | Tensor


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
    chunk_bytes: int | None = None  # by default CHUNK_BYTES of the device


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
def label_facts(hidden: Tensor, head: Tensor, chunk_bytes: int = 1 << 28) -> tuple[Tensor, Tensor]:
    """(argmax int64 [M], logsumexp float32 [M]) of head @ hidden over the full vocabulary; hidden [M, H], head [V, H]."""
    rows = max(chunk_bytes // (8 * head.shape[0]), 1)
    token, logsumexp = [hidden.new_zeros(0, dtype=torch.int64)], [hidden.new_zeros(0, dtype=wide(hidden.dtype))]
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
    if not torch.is_grad_enabled():  # a Function still sees parameters as wanting gradients
        norm_weight, weight = norm_weight.detach(), weight.detach()
    mix = None
    if settings.kind == "lambda":
        assert settings.alpha_mean is not None
        with torch.no_grad():
            sums = _Pass(states, norm_weight, weight, eps, targets, settings, None, gradients=False).run()
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
        work = _Pass(list(states), norm_weight, weight, eps, targets, settings, mix, gradients=any(ctx.needs_input_grad))
        sums_out.append(work.run())
        ctx.gradients = work.gradients()
        return (sums_out[0]["loss"] * settings.weights.to(torch.float64)).sum().to(wide(weight.dtype))

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
        *,
        gradients: bool,
    ) -> None:
        self.states, self.norm_weight, self.weight, self.eps = states, norm_weight, weight, eps
        self.targets, self.settings, self.mix = targets, settings, mix
        self.row_losses = _row_losses_for(weight)
        self.scales = settings.weights.tolist()
        by_step = targets.counted.t()
        blank = torch.zeros(by_step.shape, dtype=wide(weight.dtype), device=weight.device)
        self.cross_entropy, self.entropy, self.alpha, self.correct = blank, blank.clone(), blank.clone(), blank.clone()
        # what Python must know of the rows comes to the host at once: no waiting for the device between chunks
        self.rows = list(by_step.nonzero()[:, 1].split(by_step.sum(1).tolist()))
        self.before = F.pad(by_step.cpu().cumsum(1), (1, 0)).tolist()
        self.label_span = (targets.index[:, 0].tolist(), targets.index[:, -1].tolist()) if len(targets.index) else ([], [])
        self.d_norm: Tensor | None = None
        if gradients:
            self.d_norm = torch.zeros_like(norm_weight, dtype=wide(norm_weight.dtype))
            self.d_weight = torch.zeros_like(weight, dtype=wide(weight.dtype))
            self.d_states = [torch.zeros_like(s) for s in states]

    def gradients(self) -> list[Tensor]:
        """Gradients of norm_weight, weight and the states, in their types."""
        if self.d_norm is None:
            return []
        return [self.d_norm.to(self.norm_weight.dtype), self.d_weight.to(self.weight.dtype), *self.d_states]

    def run(self) -> StepSums:
        """Visit every chunk of rows."""
        size, chunk = self.targets.index.shape[0], self._chunk_rows()
        for start in range(0, size, chunk):
            self._chunk(start, min(start + chunk, size))
        trained = self.targets.trained
        columns = (self._losses(), self.cross_entropy, self.entropy, self.targets.counted.t(), trained.t(), self.correct, self.alpha)
        sums = torch.stack([column.sum(1, dtype=torch.float64) for column in columns], dim=1)
        lengths = torch.stack([self.alpha.to(torch.float64).cumprod(0).sum(), trained.any(1).sum().to(torch.float64)])
        return StepSums(sums, lengths)

    def _chunk_rows(self) -> int:
        """Rows whose logits fit the budget: gradients of all T steps in the weight's type, and three wide copies of one."""
        vocab, size = self.weight.shape[0], self.weight.element_size()
        budget = self.settings.chunk_bytes or CHUNK_BYTES[self.weight.device.type]
        return max(budget // (vocab * (len(self.states) * size + 3 * max(size, 4))), 16)

    def _chunk(self, start: int, stop: int) -> None:
        """Labels of the chunk's target rows once, every step's logits against them, then one backward for all steps."""
        spans = [(self.before[k][start], self.before[k][stop]) for k in range(len(self.states))]
        total = sum(b - a for a, b in spans)
        if not total:
            return
        labels = self._labels(self.label_span[0][start], self.label_span[1][stop - 1] + 1)
        d_logits = self.weight.new_empty(total, self.weight.shape[0]) if self.d_norm is not None else None
        done, inputs = 0, []
        for step, (a, b) in enumerate(spans):
            if a == b:
                continue
            rows = slice(start, stop) if b - a == stop - start else self.rows[step][a:b]
            x = self.states[step][rows]
            normed = rms_norm(x, self.norm_weight, self.eps)
            self._step(step, rows, normed, labels, None if d_logits is None else d_logits[done : done + b - a])
            inputs.append((step, rows, x, normed))
            done += b - a
        if d_logits is not None:
            self._backward(d_logits, inputs)

    def _labels(self, low: int, high: int) -> _Labels:
        logits = _logits(self.targets.hidden[low:high], self.targets.head.draft_rows)
        lse_draft = torch.logsumexp(logits, -1)
        entropy = lse_draft - (torch.softmax(logits, -1) * logits).sum(-1)
        return _Labels(low, logits, lse_draft, self.targets.logsumexp[low:high].to(logits.dtype), entropy, self.targets.token[low:high])

    def _step(self, step: int, rows: Rows, normed: Tensor, labels: _Labels, d_logits: Tensor | None) -> None:
        """Losses of ``rows`` at ``step``; their gradient with respect to the logits into ``d_logits``."""
        label_row = self.targets.index[rows, step] - labels.first
        mix = None if self.mix is None else self.mix[step]
        cross_entropy, alpha, best = self.row_losses(
            _logits(normed, self.weight), labels.logits, label_row, labels.lse_draft, labels.lse_full,
            self.settings.kind, mix, self.scales[step], d_logits,
        )  # fmt: skip
        self.cross_entropy[step, rows] = cross_entropy
        self.alpha[step, rows] = alpha
        self.entropy[step, rows] = labels.entropy[label_row]
        self.correct[step, rows] = (best + self.targets.head.d2t[best] == labels.token[label_row]).to(alpha.dtype)

    def _losses(self) -> Tensor:
        """[T, N] losses by the recipe's kind, 0 where a row does not count."""
        if self.settings.kind == "kl":
            return self.cross_entropy
        counted = self.targets.counted.t()
        if self.settings.kind == "alpha":
            return -torch.log(torch.where(counted, self.alpha, 1.0))
        w = 1.0 if self.mix is None else self.mix[:, None]
        return torch.where(counted, w * (self.cross_entropy - self.entropy) + (1 - w) * (1 - self.alpha), 0.0)

    def _backward(self, d_logits: Tensor, inputs: list[tuple[int, Rows, Tensor, Tensor]]) -> None:
        """Gradients of the head's matrix, of the norm, and of the states of one chunk."""
        self.d_weight += d_logits.t() @ torch.cat([normed for *_, normed in inputs])
        d_normed = d_logits @ self.weight
        done = 0
        for step, rows, x, normed in inputs:
            grad = d_normed[done : done + len(normed)].to(self.d_norm.dtype)
            done += len(normed)
            scale = torch.rsqrt(x.to(grad.dtype).square().mean(-1, keepdim=True) + self.eps)
            x_hat = x * scale
            self.d_norm += (grad * x_hat).sum(0)
            grad *= self.norm_weight
            self.d_states[step][rows] = (scale * (grad - x_hat * (grad * x_hat).mean(-1, keepdim=True))).to(x.dtype)


@dataclass
class _Labels:
    """Labels of the target rows from number ``first`` on."""

    first: int
    logits: Tensor  # [M, Vd], wide
    lse_draft: Tensor  # [M], over the draft vocabulary
    lse_full: Tensor  # [M], over the full vocabulary
    entropy: Tensor  # [M], of the label over the draft vocabulary
    token: Tensor  # int64 [M]


def row_losses(
    logits: Tensor, target_logits: Tensor, target_row: Tensor, lse_draft: Tensor, lse_full: Tensor, kind: LossKind, mix: Tensor | None,
    weight: float, d_logits: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(cross-entropy, alpha, argmax) of each row, each [n]; ``d_logits`` [n, Vd], if given, receives weight * d loss / d logits.

    logits [n, Vd]; target_logits [M, Vd], of which row i is taught by ``target_row[i]``; lse_draft and lse_full [M], of the
    target logits over the draft and the full vocabulary. The reference for, and twin of, ``loss_triton.row_losses``.
    """
    t = target_logits[target_row]
    q, q_full = torch.exp(t - lse_draft[target_row, None]), torch.exp(t - lse_full[target_row, None])
    lse = torch.logsumexp(logits, -1)
    p = torch.exp(logits - lse[:, None])
    alpha = torch.minimum(q_full, p).sum(-1)
    if d_logits is not None:
        below = (p < q_full).to(p.dtype)
        d_alpha = p * (below - (below * p).sum(-1, keepdim=True)) if kind != "kl" else p
        if kind == "kl":
            gradient = p - q
        elif kind == "alpha":
            gradient = -d_alpha / alpha[:, None]
        else:
            w = 1.0 if mix is None else mix
            gradient = w * (p - q) - (1 - w) * d_alpha
        d_logits.copy_(gradient * weight)
    return lse - (q * logits).sum(-1), alpha, logits.argmax(-1)


def _row_losses_for(weight: Tensor) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The Triton twin for half precision on a GPU, else the plain one."""
    if weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16):
        from eagle_ds import loss_triton

        return loss_triton.row_losses
    return row_losses


def _logits(x: Tensor, weight: Tensor) -> Tensor:
    """x [n, D] @ weight [V, D].T with float32 results (float64 for float64)."""
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    return F.linear(x, weight.to(x.dtype)).to(wide(x.dtype))


def uniform_decay(decay: float, ttt_steps: int) -> Tensor:
    """decay^k, float64 [T]."""
    return torch.tensor([math.pow(decay, k) for k in range(ttt_steps)], dtype=torch.float64)
