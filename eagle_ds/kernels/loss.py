"""Row-wise work of the loss between its matmuls: interface and plain reference.

For a row of draft logits z with p = softmax(z), the label q over the draft vocabulary, and the label q' with
probabilities of the full vocabulary (sum q' <= 1):

    cross-entropy  c = logsumexp(z) - q.z        dc/dz     = p - q
    acceptance     alpha = sum min(q', p)        dalpha/dz = p * (b - b.p),  b = [p < q']

The second gradient follows from d min(q', p)/dp = b and the softmax Jacobian dp_i/dz_j = p_i (delta_ij -
p_j). The losses, and their gradients by z:

    kl      c (the label's entropy is constant)           p - q
    alpha   -log alpha                                    -dalpha/dz / alpha
    lambda  w * (c - entropy(q)) + (1 - w) * (1 - alpha)  w * (p - q) - (1 - w) * dalpha/dz (none through w)
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

LossKind = Literal["kl", "alpha", "lambda"]


class PlainKernels:
    """The reference, and the CPU path. `loss_triton.TritonKernels` overrides both methods."""

    @staticmethod
    def label_sums(target_logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return (log-sum-exp, entropy of the softmax), each [M], of target logits [M, Vd]."""
        lse = torch.logsumexp(target_logits, -1)
        return lse, lse - (torch.softmax(target_logits, -1) * target_logits).sum(-1)

    @staticmethod
    def row_losses(
        logits: Tensor, target_logits: Tensor, target_row: Tensor, lse_draft: Tensor, lse_full: Tensor,
        kind: LossKind, mix: Tensor | None, weight: Tensor, d_logits: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Return (cross-entropy, alpha, argmax of the logits) of each row, each [n].

        Args:
            logits: draft logits [n, Vd].
            target_logits: [M, Vd]; ``target_logits[target_row[i]]`` is the label of row i.
            target_row: int64 [n].
            lse_draft: [M], log-sum-exp of the target's logits over the draft vocabulary.
            lse_full: [M], log-sum-exp of the target's logits over the full vocabulary.
            kind: which loss ``d_logits`` is the gradient of.
            mix: w of the ``lambda`` loss, [n].
            weight: [n], factor on each row's gradient.
            d_logits: [n, Vd], overwritten with weight * d loss / d logits; None if no gradient is needed.
        """
        t = target_logits[target_row]
        q, q_full = torch.exp(t - lse_draft[target_row, None]), torch.exp(t - lse_full[target_row, None])
        lse = torch.logsumexp(logits, -1)
        p = torch.exp(logits - lse[:, None])
        alpha = torch.minimum(q_full, p).sum(-1)
        if d_logits is not None:
            gradient = p - q
            if kind != "kl":
                below = (p < q_full).to(p.dtype)
                d_alpha = p * (below - (below * p).sum(-1, keepdim=True))
                w = 1.0 if mix is None else mix[:, None]
                gradient = -d_alpha / alpha[:, None] if kind == "alpha" else w * gradient - (1 - w) * d_alpha
            d_logits.copy_(gradient * weight[:, None])
        return lse - (q * logits).sum(-1), alpha, logits.argmax(-1)
