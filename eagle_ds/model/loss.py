"""Compute head and loss together, for all TTT steps, one chunk of query rows at a time.

The maths. For one counted pair (query row, TTT step) with

    z    draft logits [Vd],  p = softmax(z)
    t    target logits of the draft's tokens [Vd], of the target row that is the pair's label
    q    = softmax(t), the label over the draft vocabulary
    q'   = exp(t - log-sum-exp of the target's logits over the FULL vocabulary), so sum q' <= 1

the loss needs

    soft cross-entropy   c = logsumexp(z) - q.z                    dc/dz     = p - q
    acceptance           alpha = sum_v min(q'_v, p_v)              dalpha/dz = p * (b - b.p),  b = [p < q']

Soft cross-entropy is the loss of EAGLE-3 (arXiv:2503.01840); alpha is the probability that speculative
decoding accepts the draft's token. docs/maths.md, section 7, lists the losses (`LossSettings.kind`).

Memory. The logits of all pairs, [N * T, Vd], would take more than 100 GB at 128K tokens. So rows are
processed in chunks, and the gradients with respect to states and weights are computed in the forward, while a
chunk's logits exist. The backward only multiplies them by the incoming gradient.

One chunk of C rows goes through these steps; each pair takes one line of the matrices below:

    states g_1 .. g_T [C, D]  --stack-->  [C * T, D]  --keep counted pairs-->  x [n, D]
    x  --final norm-->  [n, D]  --head-->  z [n, Vd]                              the first matmul
    target hidden states [M, H]  --target head-->  t [M, Vd]                      label logits
    z, t  --row kernels-->  losses [n] and dloss/dz [n, Vd]
    dloss/dz  -->  gradient of the head [Vd, D], gradient of x [n, D]             two more matmuls

Pairs are ordered row by row, (row 0, step 0), (row 0, step 1), ... At step k, the label of the row at
position x of the sequence is the target row at position x + 1 + k. So C consecutive rows need only M = C + T
- 1 label rows, and each gap between rows adds up to T - 1 more. Pairs with the same label are near each
other, and find it in the GPU's cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eagle_ds.kernels.attention import wide
from eagle_ds.kernels.backend import operations_for
from eagle_ds.kernels.loss import LossKind
from eagle_ds.parallel.copies import copy_rows, to_host
from eagle_ds.sharding.tiles import LOSS_CHUNK_BYTES, loss_chunk_rows
from eagle_ds.target.head import TargetHead, head_logits

COLUMNS = ("loss", "cross_entropy", "entropy", "counted", "trained", "correct", "alpha")


@dataclass
class HeadTargets:
    """Labels of one micro-batch. Query row r at TTT step k has the label of target row ``index[r, k]``.

    Create it before the draft's forward: it starts to copy the few numbers that the host needs to divide
    rows into chunks. They have arrived when the loss runs, after the forward, so the host need not wait
    for the GPU.
    """

    head: TargetHead
    hidden: Tensor  # [M, H], target hidden states
    logsumexp: Tensor  # float32 [M], of the target's logits over the full vocabulary
    token: Tensor  # int64 [M], argmax of the target's logits over the full vocabulary
    index: Tensor  # int64 [N, T], into the M target rows; ascends along rows and along steps
    trained: Tensor  # bool [N, T], by the loss mask alone
    counted: Tensor  # bool [N, T], trained and the label's argmax is in the draft vocabulary
    # Returns int64 [3, N] on the host. Column r: the number of counted pairs in rows 0 to r, then the target
    # rows of row r at steps 0 and T - 1.
    on_host: Callable[[], Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        pairs = self.counted.sum(1).cumsum(0)
        self.on_host = to_host(torch.stack([pairs, self.index[:, 0], self.index[:, -1]]))


@dataclass(frozen=True)
class LossSettings:
    """How the losses of pairs become one number.

    Attributes:
        weights: [T], multiplies the sum of the losses of the pairs counted at step k. It holds decay^k / N_k,
            times what the engine will divide the loss by.
        kind: kl (soft cross-entropy), alpha (-log alpha), or lambda (a mix of KL and 1 - alpha).
        kl_scale, kl_decay: for the lambda loss: w = kl_scale * exp(-kl_decay * mean alpha) weights its KL.
        alpha_mean: for the lambda loss. Maps this rank's (sum of alpha, counted rows), each [T], to the mean
            over all ranks. Collective. It is the mean of one micro-batch, because the mean of the global
            batch would need a forward over all its micro-batches first.
        chunk_bytes: memory of one chunk's logits; LOSS_CHUNK_BYTES of the device by default.
    """

    weights: Tensor
    kind: LossKind = "kl"
    kl_scale: float = 1.0
    kl_decay: float = 3.0
    alpha_mean: Callable[[Tensor, Tensor], Tensor] | None = None
    chunk_bytes: int | None = None


@dataclass
class LossSums:
    """This rank's sums for the metrics. Add them over ranks and micro-batches; means are taken after that."""

    steps: Tensor  # float64 [T, len(COLUMNS)], sums over rows
    lengths: Tensor  # float64 [2]: sum over trained rows of sum_k prod_{j<=k} alpha_j, and how many they are

    def __getitem__(self, column: str) -> Tensor:
        """Return the sums [T] of the named column."""
        return self.steps[:, COLUMNS.index(column)]

    def flat(self) -> Tensor:
        """Return all sums as one vector, for one all-reduce."""
        return torch.cat([self.steps.reshape(-1), self.lengths])

    @classmethod
    def from_flat(cls, flat: Tensor) -> LossSums:
        """Undo ``flat``."""
        return cls(flat[:-2].view(-1, len(COLUMNS)), flat[-2:])


def head_loss(
    states: list[Tensor], norm_weight: Tensor, weight: Tensor, eps: float, targets: HeadTargets,
    settings: LossSettings,
) -> tuple[Tensor, LossSums]:
    """Return sum_k weights[k] * (sum of TTT step k's losses over its counted rows), and the metric sums.

    Differentiable with respect to states, norm_weight and weight. Collective for the ``lambda`` loss only.

    Args:
        states: g_1 .. g_T, each [N, D], before the final norm.
        norm_weight: [D], of the draft's final norm.
        weight: [Vd, D], the draft's head.
        eps: of the final norm.
    """
    if not torch.is_grad_enabled():
        # A Function's ``needs_input_grad`` is true for parameters even here. Detach them, so that no
        # gradient is computed.
        norm_weight, weight = norm_weight.detach(), weight.detach()
    mix = None
    if settings.kind == "lambda":
        # The weight w of the KL term depends on the mean alpha, so a first pass computes alpha without
        # gradients.
        assert settings.alpha_mean is not None
        with torch.no_grad():
            sums = _Pass(states, norm_weight, weight, eps, targets, settings, None, gradients=False).run()
        mean = settings.alpha_mean(sums["alpha"], sums["counted"])
        mix = settings.kl_scale * torch.exp(-settings.kl_decay * mean)
    sums_out: list[LossSums] = []
    loss = _HeadLoss.apply(eps, targets, settings, mix, sums_out, norm_weight, weight, *states)
    return loss, sums_out[0]


class _HeadLoss(torch.autograd.Function):
    """The loss with its gradients computed in the forward. ``sums_out`` receives the metric sums."""

    @staticmethod
    def forward(
        ctx: Any, eps: float, targets: HeadTargets, settings: LossSettings, mix: Tensor | None,
        sums_out: list[LossSums], norm_weight: Tensor, weight: Tensor, *states: Tensor,
    ) -> Tensor:
        wanted = any(ctx.needs_input_grad)
        work = _Pass(list(states), norm_weight, weight, eps, targets, settings, mix, gradients=wanted)
        sums_out.append(work.run())
        ctx.gradients = work.gradients()
        return (sums_out[0]["loss"] * settings.weights.to(torch.float64)).sum().to(wide(weight.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # The gradients exist already; multiply them in place by that of the loss, one launch for each dtype.
        gradients, ctx.gradients = ctx.gradients, None
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for gradient in gradients:
            by_type.setdefault(gradient.dtype, []).append(gradient)
        for dtype, alike in by_type.items():
            torch._foreach_mul_(alike, grad.to(dtype))
        return None, None, None, None, None, *gradients


class _Pass:
    """One pass over all query rows: losses, metric sums and, if wanted, the gradients of the weighted loss.

    ``mix`` [T] is the weight w of the lambda loss; None takes w = 1.
    """

    def __init__(
        self, states: list[Tensor], norm_weight: Tensor, weight: Tensor, eps: float, targets: HeadTargets,
        settings: LossSettings, mix: Tensor | None, *, gradients: bool,
    ) -> None:
        self.states, self.norm_weight = states, norm_weight
        self.weight, self.eps = weight, eps
        self.targets, self.settings = targets, settings
        self.mix = mix
        self.kernels = operations_for(weight).loss
        self.scales = settings.weights.to(weight.device, wide(weight.dtype))  # [T]
        # Results of every pair [N, T], filled chunk by chunk; pairs that do not count keep their 0.
        blank = torch.zeros(targets.counted.shape, dtype=wide(weight.dtype), device=weight.device)
        self.cross_entropy, self.entropy = blank, blank.clone()
        self.alpha, self.correct = blank.clone(), blank.clone()
        # Each int64 [N], on the host. ``pair_stop[r]`` is the number of counted pairs in rows 0 to r.
        self.pair_stop, self.first_label, self.last_label = targets.on_host()
        # Numbers of the counted pairs, row * T + step, ascending. The host knows how many there are, so
        # nonzero_static can allocate its result without waiting for the GPU, as nonzero would.
        size = int(self.pair_stop[-1]) if len(targets.counted) else 0
        self.pairs = torch.nonzero_static(targets.counted.reshape(-1), size=size).squeeze(1)
        self.d_norm: Tensor | None = None
        if gradients:
            # Gradients of weights are summed over all chunks, so in float32. Each row of a state is in
            # one chunk only.
            self.d_norm = torch.zeros_like(norm_weight, dtype=wide(norm_weight.dtype))
            self.d_weight = torch.zeros_like(weight, dtype=wide(weight.dtype))
            self.d_states = [torch.empty_like(s) for s in states]

    def gradients(self) -> list[Tensor]:
        """Return the gradients of norm_weight, weight and the states, in their types."""
        if self.d_norm is None:
            return []
        return [self.d_norm.to(self.norm_weight.dtype), self.d_weight.to(self.weight.dtype), *self.d_states]

    def run(self) -> LossSums:
        """Process every chunk and return the sums over rows."""
        for chunk in self._chunks():
            self._process(chunk)
        trained, counted = self.targets.trained, self.targets.counted
        # In the order of COLUMNS, each [N, T].
        entropies = self.cross_entropy, self.entropy
        columns = (self._losses(), *entropies, counted, trained, self.correct, self.alpha)
        sums = torch.stack([column.sum(0, dtype=torch.float64) for column in columns], dim=1)
        # Token k is accepted only if tokens 0 .. k-1 were too: with probability alpha_0 * ... * alpha_k. A
        # pair that does not count has alpha 0 and ends the product.
        accepted = self.alpha.to(torch.float64).cumprod(1).sum()
        return LossSums(sums, torch.stack([accepted, trained.any(1).sum().to(torch.float64)]))

    def _chunks(self) -> Iterator[_Chunk]:
        """Split the rows. All arithmetic is on the host, so no chunk waits for the GPU."""
        budget = self.settings.chunk_bytes or LOSS_CHUNK_BYTES[self.weight.device.type]
        rows = loss_chunk_rows(self.weight.shape[0], len(self.states), self.weight.element_size(), budget)
        size, first_pair = len(self.pair_stop), 0
        for start in range(0, size, rows):
            stop = min(start + rows, size)
            pair_stop = int(self.pair_stop[stop - 1])
            # Labels ascend along rows and TTT steps, so those of the chunk lie between that of its first row
            # at step 0 and that of its last row at step T - 1. Pairs that do not count may widen the range.
            first, last = int(self.first_label[start]), int(self.last_label[stop - 1])
            yield _Chunk(start, stop, first_pair, pair_stop, first, last + 1)
            first_pair = pair_stop

    def _process(self, chunk: _Chunk) -> None:
        """Compute the losses of a chunk's counted pairs and, if wanted, the gradients that they give."""
        if chunk.first_pair == chunk.pair_stop:  # no pair counts
            if self.d_norm is not None:
                for gradient in self.d_states:
                    gradient[chunk.start : chunk.stop] = 0
            return
        pairs = self.pairs[chunk.first_pair : chunk.pair_stop]  # [n]
        labels = self._labels(chunk.first_label, chunk.label_stop)
        # [C, T, D] -> [C * T, D]. Row c * T + k is the state of query row c at step k, as pairs are numbered.
        states = torch.stack([s[chunk.start : chunk.stop] for s in self.states], 1).flatten(0, 1)
        every = len(pairs) == len(states)
        local = pairs - chunk.start * len(self.states)  # pair number -> row of ``states``
        x = states if every else states[local]
        if self.d_norm is None:
            self._losses_of(pairs, operations_for(x).rms_norm(x, self.norm_weight, self.eps), labels, None)
            return
        # Autograd differentiates the final norm only. The gradients of head and loss are computed directly.
        with torch.enable_grad():
            x, norm_weight = x.detach().requires_grad_(), self.norm_weight.detach().requires_grad_()
            normed = operations_for(x).rms_norm(x, norm_weight, self.eps)
        d_logits = self.weight.new_empty(len(pairs), self.weight.shape[0])
        self._losses_of(pairs, normed.detach(), labels, d_logits)
        # logits = normed @ weight.T, so d_weight += d_logits.T @ normed, and d_normed = d_logits @ weight.
        operations_for(self.weight).add_product(self.d_weight, d_logits.t(), normed.detach())
        d_x, d_norm = torch.autograd.grad(normed, [x, norm_weight], d_logits @ self.weight)
        self.d_norm += d_norm
        # Put d_x [n, D] back at its rows of [C * T, D], with zeros for pairs that do not count. (Each pair
        # occurs once.) Then copy the rows to the gradient of each TTT step.
        d_states = d_x if every else torch.zeros_like(states).index_copy_(0, local, d_x)
        by_step = d_states.unflatten(0, (-1, len(self.states))).unbind(1)
        for gradient, part in zip(self.d_states, by_step, strict=True):
            copy_rows(gradient[chunk.start : chunk.stop], part)

    def _labels(self, first: int, stop: int) -> _Labels:
        """Compute the labels made from target rows [first, stop), once for all pairs that read them."""
        # ``widen=False`` here and for the draft's logits, so both are computed alike: a CPU rounds them to
        # the dtype of the operands, a GPU keeps them in float32.
        logits = head_logits(self.targets.hidden[first:stop], self.targets.head.draft_rows, widen=False)
        lse_draft, entropy = self.kernels.label_sums(logits)
        lse_full = self.targets.logsumexp[first:stop].to(logits.dtype)
        return _Labels(first, logits, lse_draft, lse_full, entropy, self.targets.token[first:stop])

    def _losses_of(self, pairs: Tensor, normed: Tensor, labels: _Labels, d_logits: Tensor | None) -> None:
        """Store the results of ``pairs``; write weighted dloss/dz into ``d_logits`` [n, Vd] if given."""
        step = pairs % len(self.states)
        label_row = self.targets.index.reshape(-1)[pairs] - labels.first  # each pair's row of ``labels``
        mix = None if self.mix is None else self.mix[step]
        cross_entropy, alpha, best = self.kernels.row_losses(
            head_logits(normed, self.weight, widen=False), labels.logits, label_row,
            labels.lse_draft, labels.lse_full, self.settings.kind, mix, self.scales[step], d_logits,
        )
        self.cross_entropy.view(-1)[pairs] = cross_entropy
        self.alpha.view(-1)[pairs] = alpha
        self.entropy.view(-1)[pairs] = labels.entropy[label_row]
        # ``best`` is a draft token. d2t holds offsets, so best + d2t[best] is its id in the target's
        # vocabulary, as the label's argmax is.
        correct = best + self.targets.head.d2t[best] == labels.token[label_row]
        self.correct.view(-1)[pairs] = correct.to(alpha.dtype)

    def _losses(self) -> Tensor:
        """Return the losses of all pairs [N, T] by ``settings.kind``, 0 where a pair does not count."""
        counted = self.targets.counted
        if self.settings.kind == "kl":
            return self.cross_entropy
        if self.settings.kind == "alpha":
            return -torch.log(torch.where(counted, self.alpha, 1.0))
        # KL = cross-entropy - entropy of the label.
        w = 1.0 if self.mix is None else self.mix
        return torch.where(counted, w * (self.cross_entropy - self.entropy) + (1 - w) * (1 - self.alpha), 0.0)


class _Chunk(NamedTuple):
    """Query rows [start, stop), their counted pairs, and the target rows that their labels are made from."""

    start: int
    stop: int
    first_pair: int
    pair_stop: int
    first_label: int
    label_stop: int


@dataclass
class _Labels:
    """Labels made from M consecutive target rows; the first of them is target row number ``first``."""

    first: int
    logits: Tensor  # [M, Vd], float32 at least
    lse_draft: Tensor  # [M], log-sum-exp over the draft vocabulary
    lse_full: Tensor  # [M], log-sum-exp over the full vocabulary
    entropy: Tensor  # [M], of the label over the draft vocabulary
    token: Tensor  # int64 [M], argmax over the full vocabulary


def step_decays(decay: float, ttt_steps: int) -> Tensor:
    """Return decay^k for each TTT step, float64 [T]."""
    return torch.tensor([math.pow(decay, k) for k in range(ttt_steps)], dtype=torch.float64)
