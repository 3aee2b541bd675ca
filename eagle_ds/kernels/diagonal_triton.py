"""The diagonal keys of a row on a GPU: merged into (out, lse) by one kernel, their whole backward in another.

A diagonal key K_i[p] has one score per query head, s = scale * q.k. The forward merges the keys one by one
into the running (out, lse), which is the merge of attention.py for a key set of one. With the final out and
lse, the backward is elementwise in rows (derived in attention.py):

    p = exp(s - lse)     delta = dout.out     ds = p * (dout.v - delta) * scale
    dq += ds * k         dk = sum of ds * q,  dv = sum of p * dout, over the query heads of the KV head

Both are bound by memory. One program handles one row and one KV head: it loads the head's GROUP = Hq / Hkv
query heads once and loops over the row's keys, so nothing of size [N, Hq, d] is written but the result. Plain
version: ``ReferenceAttention``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _places(GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, D: tl.constexpr):
    """Offsets of this program's query heads in lse and in q, and of its KV head in k; all tensors are dense.

    Triton's ranges are powers of two long, so GROUP is padded and ``real`` masks the rest.
    """
    row, kv_head, kv_heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    group, width = tl.arange(0, GROUP_PADDED), tl.arange(0, D)
    real = group < GROUP
    heads = (row * kv_heads + kv_head) * GROUP + group
    at = heads[:, None] * D + width[None, :]
    kv_at = (row * kv_heads + kv_head) * D + width
    return heads, real, at, kv_at


@triton.jit
def _diagonal_forward_kernel(Q, Out, Lse, Merged, MergedLse, Ks, Vs, scale, COUNT: tl.constexpr,
                             GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, D: tl.constexpr):  # fmt: skip
    heads, real, at, kv_at = _places(GROUP, GROUP_PADDED, D)
    q = tl.load(Q + at, mask=real[:, None], other=0.0).to(tl.float32)
    out = tl.load(Out + at, mask=real[:, None], other=0.0).to(tl.float32)
    lse = tl.load(Lse + heads, mask=real, other=0.0)
    for i in tl.static_range(COUNT):
        k = tl.load(Ks[i] + kv_at).to(tl.float32)
        v = tl.load(Vs[i] + kv_at).to(tl.float32)
        s = tl.sum(q * k[None, :], 1) * scale
        peak = tl.maximum(lse, s)  # subtracted before exp, so that it cannot overflow
        a, b = tl.exp(lse - peak), tl.exp(s - peak)
        out = (out * a[:, None] + v[None, :] * b[:, None]) / (a + b)[:, None]
        lse = peak + tl.log(a + b)
    tl.store(Merged + at, out.to(Merged.dtype.element_ty), mask=real[:, None])
    tl.store(MergedLse + heads, lse, mask=real)


@triton.jit
def _diagonal_backward_kernel(Q, DOut, Out, Lse, DQ, DQOut, Ks, Vs, DKs, DVs, scale,
                              COUNT: tl.constexpr, GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr,
                              D: tl.constexpr):  # fmt: skip
    heads, real, at, kv_at = _places(GROUP, GROUP_PADDED, D)
    q = tl.load(Q + at, mask=real[:, None], other=0.0).to(tl.float32)
    dout = tl.load(DOut + at, mask=real[:, None], other=0.0).to(tl.float32)
    out = tl.load(Out + at, mask=real[:, None], other=0.0).to(tl.float32)
    dq = tl.load(DQ + at, mask=real[:, None], other=0.0).to(tl.float32)
    lse = tl.load(Lse + heads, mask=real, other=0.0)
    delta = tl.sum(dout * out, 1)
    for i in tl.static_range(COUNT):
        k = tl.load(Ks[i] + kv_at).to(tl.float32)
        v = tl.load(Vs[i] + kv_at).to(tl.float32)
        # Padded heads have lse = 0 and would give p = 1: they must not reach the sums over the group.
        p = tl.where(real, tl.exp(tl.sum(q * k[None, :], 1) * scale - lse), 0.0)
        ds = p * (tl.sum(dout * v[None, :], 1) - delta) * scale
        dq += ds[:, None] * k[None, :]
        tl.store(DKs[i] + kv_at, tl.sum(ds[:, None] * q, 0).to(DKs[i].dtype.element_ty))
        tl.store(DVs[i] + kv_at, tl.sum(p[:, None] * dout, 0).to(DVs[i].dtype.element_ty))
    tl.store(DQOut + at, dq.to(DQOut.dtype.element_ty), mask=real[:, None])


def diagonal_forward(
    q: Tensor, out: Tensor, lse: Tensor, diagonals: Sequence[Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """See ``ReferenceAttention.diagonal_forward``."""
    if not diagonals or not q.shape[0]:
        return out, lse
    *dense, q, out, lse = (x.contiguous() for x in (*diagonals, q, out, lse))
    ks, vs = tuple(dense[::2]), tuple(dense[1::2])
    merged, merged_lse = torch.empty_like(out), torch.empty_like(lse)
    _diagonal_forward_kernel[(q.shape[0], ks[0].shape[1])](
        q, out, lse, merged, merged_lse, ks, vs, scale, **_sizes(q, ks), num_warps=1
    )
    return merged, merged_lse


def diagonal_backward(
    dout: Tensor, q: Tensor, out: Tensor, lse: Tensor, diagonals: Sequence[Tensor], scale: float, dq: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """See ``ReferenceAttention.diagonal_backward``."""
    if not diagonals or not q.shape[0]:
        return dq, [torch.zeros_like(x) for x in diagonals]
    *dense, q, out, lse = (x.contiguous() for x in (*diagonals, q, out, lse))
    ks, vs = tuple(dense[::2]), tuple(dense[1::2])
    dks, dvs = tuple(map(torch.empty_like, ks)), tuple(map(torch.empty_like, vs))
    total = torch.empty_like(q)
    _diagonal_backward_kernel[(q.shape[0], ks[0].shape[1])](
        q, dout.contiguous(), out, lse, dq.contiguous(), total, ks, vs, dks, dvs, scale, **_sizes(q, ks),
        num_warps=1,
    )  # fmt: skip
    return total, [g for pair in zip(dks, dvs, strict=True) for g in pair]


def _sizes(q: Tensor, ks: Sequence[Tensor]) -> dict[str, int]:
    """Return the compile-time sizes. COUNT is the number of diagonal keys: one binary for each TTT step."""
    group = q.shape[1] // ks[0].shape[1]
    return {"COUNT": len(ks), "GROUP": group, "GROUP_PADDED": triton.next_power_of_2(group), "D": q.shape[2]}
