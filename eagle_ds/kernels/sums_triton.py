"""Add the results of several kernels for the same rows, in place and in one pass over memory.

    merge_into   merge of attention.py: (out, lse) of another key set into the first
    add_into     dK and dV of one rectangle of keys, half precision, into the float32 sums of the sequence.

Plain PyTorch would write float32 copies of its inputs first. Tensors are strided: cuDNN leaves heads first in
memory, and dK and dV are halves of one tensor.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

ROWS = 32  # of one program


@triton.jit
def _merge_kernel(Out, Lse, Other, OtherLse, N, out_row, out_head, lse_row, lse_head, other_row, other_head,
                  other_lse_row, other_lse_head, D: tl.constexpr, D_PADDED: tl.constexpr,
                  BM: tl.constexpr):  # fmt: skip
    """Merge BM rows of one head. D is padded to a power of two and masked."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    head, width = tl.program_id(1).to(tl.int64), tl.arange(0, D_PADDED)
    real = rows < N
    inside = real[:, None] & (width < D)[None, :]
    lse_at = Lse + rows * lse_row + head * lse_head
    a = tl.load(lse_at, mask=real, other=float("-inf"))
    b = tl.load(OtherLse + rows * other_lse_row + head * other_lse_head, mask=real, other=float("-inf"))
    peak = tl.maximum(a, b)
    peak = tl.where(peak == float("-inf"), 0.0, peak)  # neither set has keys: -inf - (-inf) would be NaN
    weight_a, weight_b = tl.exp(a - peak), tl.exp(b - peak)
    total = weight_a + weight_b
    share = 1.0 / tl.where(total > 0, total, 1.0)
    at = Out + rows[:, None] * out_row + head * out_head + width[None, :]
    other_at = Other + rows[:, None] * other_row + head * other_head + width[None, :]
    other = tl.load(other_at, mask=inside, other=0.0).to(tl.float32)
    out = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    out = out * (weight_a * share)[:, None] + other * (weight_b * share)[:, None]
    tl.store(at, out.to(Out.dtype.element_ty), mask=inside)
    tl.store(lse_at, tl.where(total > 0, peak + tl.log(total), float("-inf")), mask=real)


@triton.jit
def _add_kernel(DK, DV, BlockDK, BlockDV, N, dk_row, dk_head, dv_row, dv_head, block_dk_row, block_dk_head,
                block_dv_row, block_dv_head, D: tl.constexpr, D_PADDED: tl.constexpr,
                BM: tl.constexpr):  # fmt: skip
    """Add BM rows of one head. No atomics: rectangles are added one after another, on one stream."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    head, width = tl.program_id(1).to(tl.int64), tl.arange(0, D_PADDED)[None, :]
    inside = (rows < N)[:, None] & (width < D)
    rows = rows[:, None]
    at_k, at_v = DK + rows * dk_row + head * dk_head + width, DV + rows * dv_row + head * dv_head + width
    from_k = BlockDK + rows * block_dk_row + head * block_dk_head + width
    from_v = BlockDV + rows * block_dv_row + head * block_dv_head + width
    k = tl.load(from_k, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(from_v, mask=inside, other=0.0).to(tl.float32)
    tl.store(at_k, tl.load(at_k, mask=inside, other=0.0) + k, mask=inside)
    tl.store(at_v, tl.load(at_v, mask=inside, other=0.0) + v, mask=inside)


def merge_into(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    """Overwrite (out [N, Hq, d], lse float32 [N, Hq]) with attention over the union of both key sets."""
    n, heads, d = out.shape
    if n:
        _merge_kernel[(triton.cdiv(n, ROWS), heads)](
            out, lse, other_out, other_lse, n, *_strides(out), *lse.stride(), *_strides(other_out),
            *other_lse.stride(), **_sizes(d),
        )  # fmt: skip


def add_into(dk: Tensor, dv: Tensor, block_dk: Tensor, block_dv: Tensor) -> None:
    """Add the gradients [M, Hkv, d] of a rectangle's keys to their float32 sums ``dk`` and ``dv``."""
    n, heads, d = dk.shape
    if n:
        _add_kernel[(triton.cdiv(n, ROWS), heads)](
            dk, dv, block_dk, block_dv, n, *_strides(dk), *_strides(dv), *_strides(block_dk),
            *_strides(block_dv), **_sizes(d),
        )  # fmt: skip


def _strides(x: Tensor) -> tuple[int, ...]:
    """Return the strides of rows and heads; the numbers of a head must be adjacent."""
    assert x.stride(2) == 1
    return x.stride()[:2]


def _sizes(d: int) -> dict[str, int]:
    """Return the compile-time sizes."""
    return {"D": d, "D_PADDED": triton.next_power_of_2(d), "BM": ROWS}
