"""Interval attention on the GPU: FlashAttention-2's algorithm (arXiv:2307.08691) for rows that each see one run of keys.

Row i sees keys lo[i] <= j < hi[i], with lo and hi non-decreasing in i (query rows are kept sorted). Then

    a block of query rows sees the keys [lo[first], hi[last]); those in [lo[last], hi[first]) are seen by all of them
    a block of keys [a, b) is seen by the query rows from the first with hi > a up to the first with lo >= b

so neither direction needs a mask tensor or a list of blocks, and no shape is compiled in: packs, windows, trained
rows only and ring blocks of any length run the same binary. Scores are kept in base 2. The backward recomputes them
twice, once for dq and once for dk/dv; both take the final out and lse (see ``attention.py``).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from eagle_ds.model.attention import KeyBounds

LOG2E = 1.4426950408889634


@triton.jit
def _scores(q, k, columns, lo, hi, scale_log2, MASKED: tl.constexpr):
    """Base-2 scores [BM, BN]; hidden ones -inf."""
    s = tl.dot(q, tl.trans(k)) * scale_log2
    if MASKED:
        s = tl.where((columns[None, :] >= lo[:, None]) & (columns[None, :] < hi[:, None]), s, float("-inf"))
    return s


@triton.jit
def _forward_span(acc, peak, total, q, K, V, stride_k, stride_v, start, stop, M, lo, hi, scale_log2,
                  BN: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Online softmax over the keys [start, stop)."""
    width = tl.arange(0, D)
    for j in tl.range(start, stop, BN):
        columns = j + tl.arange(0, BN)
        inside = columns[:, None] < M
        k = tl.load(K + columns[:, None].to(tl.int64) * stride_k + width[None, :], mask=inside, other=0.0)
        s = _scores(q, k, columns, lo, hi, scale_log2, MASKED)
        new_peak = tl.maximum(peak, tl.max(s, 1))
        finite = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        p = tl.exp2(s - finite[:, None])
        shrink = tl.exp2(peak - finite)
        v = tl.load(V + columns[:, None].to(tl.int64) * stride_v + width[None, :], mask=inside, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None])
        total = total * shrink + tl.sum(p, 1)
        peak = new_peak
    return acc, peak, total


@triton.jit
def _forward_kernel(Q, K, V, Out, Lse, Lo, Hi, N, M, scale_log2, stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh,
                    stride_o, stride_oh, stride_l, GROUP: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # late rows see most keys: start them first
    head = tl.program_id(1)
    rows = block * BM + tl.arange(0, BM)
    real = rows < N
    last = tl.minimum(block * BM + BM, N) - 1
    lo = tl.load(Lo + rows, mask=real, other=0).to(tl.int32)
    hi = tl.load(Hi + rows, mask=real, other=0).to(tl.int32)
    first_key, last_key = tl.load(Lo + block * BM).to(tl.int32), tl.load(Hi + last).to(tl.int32)
    full_start = tl.cdiv(tl.load(Lo + last).to(tl.int32), BN) * BN
    full_stop = tl.load(Hi + block * BM).to(tl.int32) // BN * BN
    first_key = first_key // BN * BN
    if full_stop <= full_start:
        full_start = last_key
        full_stop = last_key
    width = tl.arange(0, D)
    q = tl.load(Q + head * stride_qh + rows[:, None].to(tl.int64) * stride_q + width[None, :], mask=real[:, None], other=0.0)
    K += head // GROUP * stride_kh
    V += head // GROUP * stride_vh
    acc = tl.zeros([BM, D], dtype=tl.float32)
    peak = tl.full([BM], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BM], dtype=tl.float32)
    acc, peak, total = _forward_span(acc, peak, total, q, K, V, stride_k, stride_v, first_key, tl.minimum(full_start, last_key), M,
                                     lo, hi, scale_log2, BN, D, True)  # fmt: skip
    acc, peak, total = _forward_span(acc, peak, total, q, K, V, stride_k, stride_v, full_start, full_stop, M,
                                     lo, hi, scale_log2, BN, D, False)  # fmt: skip
    acc, peak, total = _forward_span(acc, peak, total, q, K, V, stride_k, stride_v, full_stop, last_key, M,
                                     lo, hi, scale_log2, BN, D, True)  # fmt: skip
    seen = total > 0
    out = acc / tl.where(seen, total, 1.0)[:, None]
    lse = tl.where(seen, (peak + tl.log2(tl.where(seen, total, 1.0))) / 1.4426950408889634, float("-inf"))
    to_out = Out + head * stride_oh + rows[:, None].to(tl.int64) * stride_o + width[None, :]
    tl.store(to_out, out.to(Out.dtype.element_ty), mask=real[:, None])
    tl.store(Lse + rows.to(tl.int64) * stride_l + head, lse, mask=real)


@triton.jit
def _dq_span(dq, q, dout, lse2, delta, K, V, stride_k, stride_v, start, stop, M, lo, hi, scale_log2,
             BN: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    width = tl.arange(0, D)
    for j in tl.range(start, stop, BN):
        columns = j + tl.arange(0, BN)
        inside = columns[:, None] < M
        k = tl.load(K + columns[:, None].to(tl.int64) * stride_k + width[None, :], mask=inside, other=0.0)
        v = tl.load(V + columns[:, None].to(tl.int64) * stride_v + width[None, :], mask=inside, other=0.0)
        p = tl.exp2(_scores(q, k, columns, lo, hi, scale_log2, MASKED) - lse2[:, None])
        ds = p * (tl.dot(dout, tl.trans(v)) - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq)
    return dq


@triton.jit
def _dq_kernel(Q, K, V, DOut, Lse, Delta, DQ, Lo, Hi, N, M, scale, scale_log2, stride_q, stride_qh, stride_k, stride_kh,
               stride_v, stride_vh, stride_o, stride_oh, stride_dq, stride_dqh, stride_l,
               GROUP: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    rows = block * BM + tl.arange(0, BM)
    real = rows < N
    last = tl.minimum(block * BM + BM, N) - 1
    lo = tl.load(Lo + rows, mask=real, other=0).to(tl.int32)
    hi = tl.load(Hi + rows, mask=real, other=0).to(tl.int32)
    first_key, last_key = tl.load(Lo + block * BM).to(tl.int32), tl.load(Hi + last).to(tl.int32)
    full_start = tl.cdiv(tl.load(Lo + last).to(tl.int32), BN) * BN
    full_stop = tl.load(Hi + block * BM).to(tl.int32) // BN * BN
    first_key = first_key // BN * BN
    if full_stop <= full_start:
        full_start = last_key
        full_stop = last_key
    width = tl.arange(0, D)
    at = rows[:, None].to(tl.int64)
    q = tl.load(Q + head * stride_qh + at * stride_q + width[None, :], mask=real[:, None], other=0.0)
    dout = tl.load(DOut + head * stride_oh + at * stride_o + width[None, :], mask=real[:, None], other=0.0)
    lse2 = tl.load(Lse + rows.to(tl.int64) * stride_l + head, mask=real, other=0.0) * 1.4426950408889634
    delta = tl.load(Delta + rows.to(tl.int64) * stride_l + head, mask=real, other=0.0)
    K += head // GROUP * stride_kh
    V += head // GROUP * stride_vh
    dq = tl.zeros([BM, D], dtype=tl.float32)
    dq = _dq_span(dq, q, dout, lse2, delta, K, V, stride_k, stride_v, first_key, tl.minimum(full_start, last_key), M,
                  lo, hi, scale_log2, BN, D, True)  # fmt: skip
    dq = _dq_span(dq, q, dout, lse2, delta, K, V, stride_k, stride_v, full_start, full_stop, M,
                  lo, hi, scale_log2, BN, D, False)  # fmt: skip
    dq = _dq_span(dq, q, dout, lse2, delta, K, V, stride_k, stride_v, full_stop, last_key, M,
                  lo, hi, scale_log2, BN, D, True)  # fmt: skip
    tl.store(DQ + head * stride_dqh + at * stride_dq + width[None, :], (dq * scale).to(DQ.dtype.element_ty), mask=real[:, None])


@triton.jit
def _dkv_span(dk, dv, k, v, Q, DOut, Lse, Delta, Lo, Hi, columns, stride_q, stride_o, stride_l, start, stop, N, scale_log2,
              BM: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    width = tl.arange(0, D)
    for i in tl.range(start, stop, BM):
        rows = i + tl.arange(0, BM)
        real = rows < N
        at = rows[:, None].to(tl.int64)
        q = tl.load(Q + at * stride_q + width[None, :], mask=real[:, None], other=0.0)
        dout = tl.load(DOut + at * stride_o + width[None, :], mask=real[:, None], other=0.0)
        lse2 = tl.load(Lse + rows.to(tl.int64) * stride_l, mask=real, other=0.0) * 1.4426950408889634
        delta = tl.load(Delta + rows.to(tl.int64) * stride_l, mask=real, other=0.0)
        s = tl.dot(k, tl.trans(q)) * scale_log2
        if MASKED:
            lo = tl.load(Lo + rows, mask=real, other=0).to(tl.int32)
            hi = tl.load(Hi + rows, mask=real, other=0).to(tl.int32)
            s = tl.where((columns[:, None] >= lo[None, :]) & (columns[:, None] < hi[None, :]), s, float("-inf"))
        p = tl.exp2(s - lse2[None, :])
        dv = tl.dot(p.to(dout.dtype), dout, dv)
        ds = p * (tl.dot(v, tl.trans(dout)) - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk)
    return dk, dv


@triton.jit
def _dkv_kernel(Q, K, V, DOut, Lse, Delta, DK, DV, Lo, Hi, First, FullFirst, FullLast, Last, N, M, scale, scale_log2,
                stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh, stride_o, stride_oh, stride_dk, stride_dkh,
                stride_dv, stride_dvh, stride_l, GROUP: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    block, kv_head = tl.program_id(0), tl.program_id(1)
    columns = block * BN + tl.arange(0, BN)
    inside = columns[:, None] < M
    width = tl.arange(0, D)
    at = columns[:, None].to(tl.int64)
    k = tl.load(K + kv_head * stride_kh + at * stride_k + width[None, :], mask=inside, other=0.0)
    v = tl.load(V + kv_head * stride_vh + at * stride_v + width[None, :], mask=inside, other=0.0)
    first, last = tl.load(First + block), tl.load(Last + block)
    full_first = tl.cdiv(tl.load(FullFirst + block) - first, BM) * BM + first
    full_last = first + tl.maximum(tl.load(FullLast + block) - first, 0) // BM * BM
    if full_last <= full_first:
        full_first = last
        full_last = last
    dk = tl.zeros([BN, D], dtype=tl.float32)
    dv = tl.zeros([BN, D], dtype=tl.float32)
    for g in tl.range(0, GROUP):
        head = kv_head * GROUP + g
        q, dout, lse, delta = Q + head * stride_qh, DOut + head * stride_oh, Lse + head, Delta + head
        dk, dv = _dkv_span(dk, dv, k, v, q, dout, lse, delta, Lo, Hi, columns, stride_q, stride_o, stride_l,
                           first, tl.minimum(full_first, last), N, scale_log2, BM, D, True)  # fmt: skip
        dk, dv = _dkv_span(dk, dv, k, v, q, dout, lse, delta, Lo, Hi, columns, stride_q, stride_o, stride_l,
                           full_first, full_last, N, scale_log2, BM, D, False)  # fmt: skip
        dk, dv = _dkv_span(dk, dv, k, v, q, dout, lse, delta, Lo, Hi, columns, stride_q, stride_o, stride_l,
                           full_last, last, N, scale_log2, BM, D, True)  # fmt: skip
    to_k = DK + kv_head * stride_dkh + at * stride_dk + width[None, :]
    to_v = DV + kv_head * stride_dvh + at * stride_dv + width[None, :]
    tl.store(to_k, tl.load(to_k, mask=inside, other=0.0) + dk * scale, mask=inside)
    tl.store(to_v, tl.load(to_v, mask=inside, other=0.0) + dv, mask=inside)


class TritonAttention:
    """``BlockAttention`` for half-precision CUDA tensors, d a power of two from 16 to 256, and bounds that do not decrease."""

    # (BM, BN, warps, stages), the fastest of those tried on an H200 at d = 128: 525, 601 and 388 TFLOP/s at 32K tokens
    forward_blocks = (128, 128, 8, 3)
    dq_blocks = (128, 64, 8, 3)
    dkv_blocks = (64, 128, 8, 3)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bounds: KeyBounds, scale: float) -> tuple[Tensor, Tensor]:
        """See ``BlockAttention``."""
        n, heads, d = q.shape
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = torch.empty(n, heads, dtype=torch.float32, device=q.device)
        if n:
            bm, bn, warps, stages = self.forward_blocks
            _forward_kernel[(triton.cdiv(n, bm), heads)](
                q, k, v, out, lse, bounds.lo_device, bounds.hi_device, n, k.shape[0], scale * LOG2E, *_strides(q, k, v, out), lse.stride(0),
                GROUP=heads // k.shape[1], D=d, BM=bm, BN=bn, num_warps=warps, num_stages=stages,
            )  # fmt: skip
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bounds: KeyBounds, scale: float,
        dk: Tensor, dv: Tensor,
    ) -> Tensor:  # fmt: skip
        """See ``BlockAttention``."""
        n, heads, d = q.shape
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        if not n:
            return dq
        lse = lse.contiguous()
        delta = (dout.float() * out.float()).sum(-1)
        common = {"GROUP": heads // k.shape[1], "D": d}
        bm, bn, warps, stages = self.dq_blocks
        _dq_kernel[(triton.cdiv(n, bm), heads)](
            q, k, v, dout, lse, delta, dq, bounds.lo_device, bounds.hi_device, n, k.shape[0], scale, scale * LOG2E,
            *_strides(q, k, v, dout, dq), lse.stride(0), BM=bm, BN=bn, num_warps=warps, num_stages=stages, **common,
        )  # fmt: skip
        bm, bn, warps, stages = self.dkv_blocks
        _dkv_kernel[(triton.cdiv(k.shape[0], bn), k.shape[1])](
            q, k, v, dout, lse, delta, dk, dv, bounds.lo_device, bounds.hi_device, *_rows_of_key_blocks(bounds, k.shape[0], bn),
            n, k.shape[0], scale, scale * LOG2E, *_strides(q, k, v, dout, dk, dv), lse.stride(0),
            BM=bm, BN=bn, num_warps=warps, num_stages=stages, **common,
        )  # fmt: skip
        return dq


def _strides(*tensors: Tensor) -> list[int]:
    """Row and head stride of each [rows, heads, d] tensor, whose last dimension must be dense."""
    assert all(t.stride(2) == 1 for t in tensors)
    return [s for t in tensors for s in t.stride()[:2]]


def _rows_of_key_blocks(bounds: KeyBounds, keys: int, block: int) -> list[Tensor]:
    """For key blocks [a, b): first row that sees any of it, first and last that see all of it, and last that sees any; int32 each."""
    start = torch.arange(0, keys, block, device=bounds.lo_device.device)
    stop = torch.clamp(start + block, max=keys)
    lo, hi = bounds.lo_device, bounds.hi_device
    limits = (
        torch.searchsorted(hi, start, right=True),  # hi > a
        torch.searchsorted(hi, stop),  # hi >= b
        torch.searchsorted(lo, start, right=True),  # lo <= a
        torch.searchsorted(lo, stop),  # lo < b
    )
    return [x.to(torch.int32) for x in limits]
