"""The target's output head: its logits, and the labels that training derives from them.

Every position's label needs two numbers of the full vocabulary: the argmax of the target's logits, and their
log-sum-exp. Capture, conversion and training all compute them here. Logits exist for a few rows at a time
only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from eagle_ds.kernels.attention import wide
from eagle_ds.kernels.backend import is_half_on_gpu


@dataclass(frozen=True)
class TargetHead:
    """The frozen rows of the target's head that the draft's labels are computed from."""

    draft_rows: Tensor  # [Vd, H], the rows of the draft vocabulary
    t2d: Tensor  # bool [V], whether a target token is in the draft vocabulary
    d2t: Tensor  # int64 [Vd], offsets: target id = i + d2t[i]


def head_logits(hidden: Tensor, head: Tensor, *, widen: bool = True) -> Tensor:
    """Compute hidden [M, H] @ head [V, H].T in float32 (in float64 for float64 states).

    On a GPU the matrix units multiply 16-bit operands and accumulate in float32, so nothing is rounded.
    Elsewhere ``widen`` converts both operands to float32 first. Without it the product is rounded to the
    states' own dtype; the training loss computes its draft logits in this way.
    """
    if is_half_on_gpu(hidden) and hidden.dtype == head.dtype:
        return torch.mm(hidden, head.t(), out_dtype=torch.float32)
    dtype = wide(hidden.dtype) if widen else hidden.dtype
    return F.linear(hidden.to(dtype), head.to(dtype)).to(wide(dtype))


@torch.no_grad()
def argmax_and_logsumexp(
    hidden: Tensor, head: Tensor, chunk_bytes: int = 1 << 27, *,
    vocab_rows: int | None = None, widen: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return argmax and log-sum-exp over the full vocabulary of the target's logits at each position.

    Args:
        hidden: [M, H], the states that the head reads; chunks of rows are moved to the head's device.
        head: [V, H].
        chunk_bytes: float32 logits computed at once.
        vocab_rows: rows of the head multiplied at once; all V by default. Fewer save memory where the head
            has to be converted to float32 first.
        widen: see `head_logits`.

    Returns:
        int64 [M] and float32 [M] (float64 for float64 states), on the head's device.
    """
    vocab_rows = vocab_rows or len(head)
    token = [torch.zeros(0, dtype=torch.int64, device=head.device)]
    logsumexp = [torch.zeros(0, dtype=wide(hidden.dtype), device=head.device)]
    for rows in hidden.split(max(chunk_bytes // (4 * vocab_rows), 1)) if len(hidden) else ():
        best, total = _over_vocabulary(rows.to(head.device), head, vocab_rows, widen)
        token.append(best)
        logsumexp.append(total)
    return torch.cat(token), torch.cat(logsumexp)


def _over_vocabulary(rows: Tensor, head: Tensor, vocab_rows: int, widen: bool) -> tuple[Tensor, Tensor]:
    """Argmax and log-sum-exp of a few rows, reading the head block by block."""
    value, token = (logits := head_logits(rows, head[:vocab_rows], widen=widen)).max(-1)
    total = torch.logsumexp(logits, -1)
    for start in range(vocab_rows, len(head), vocab_rows):
        logits = head_logits(rows, head[start : start + vocab_rows], widen=widen)
        block_value, block_token = logits.max(-1)
        # Only a strictly larger value wins, so the smallest token id is kept on ties, as torch.argmax does.
        token = torch.where(block_value > value, block_token + start, token)
        value = torch.maximum(block_value, value)
        total = torch.logaddexp(total, torch.logsumexp(logits, -1))
    return token, total
