"""The row-wise work of the loss between its matmuls: what it computes, and the plain version beside ``loss_triton``'s.

The formulae stand at the top of ``loss.py``.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

LossKind = Literal["kl", "alpha", "lambda"]


class LossKernels(Protocol):
    """Plain (below), or in Triton."""

    @staticmethod
    def label_sums(target_logits: Tensor) -> tuple[Tensor, Tensor]:
        """(logsumexp, entropy of the softmax), each [M], of target logits [M, Vd]."""
        ...

    @staticmethod
    def row_losses(
        logits: Tensor, target_logits: Tensor, target_row: Tensor, lse_draft: Tensor, lse_full: Tensor, kind: LossKind,
        mix: Tensor | None, weight: Tensor, d_logits: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """(cross-entropy, alpha, argmax) of each row, each [n]; ``d_logits`` [n, Vd], if given, receives weight * d loss / d logits.

        logits [n, Vd]; target_logits [M, Vd], of which row i is taught by ``target_row[i]``; lse_draft and lse_full [M], of
        the target logits over the draft and the full vocabulary; weight [n]; mix [n], for the ``lambda`` loss.
        """
        ...


class PlainKernels:
    """``LossKernels`` in PyTorch: the reference, and the CPU path."""

    @staticmethod
    def label_sums(target_logits: Tensor) -> tuple[Tensor, Tensor]:
        """See ``LossKernels``."""
        lse = torch.logsumexp(target_logits, -1)
        return lse, lse - (torch.softmax(target_logits, -1) * target_logits).sum(-1)

    @staticmethod
    def row_losses(
        logits: Tensor, target_logits: Tensor, target_row: Tensor, lse_draft: Tensor, lse_full: Tensor, kind: LossKind,
        mix: Tensor | None, weight: Tensor, d_logits: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """See ``LossKernels``."""
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
