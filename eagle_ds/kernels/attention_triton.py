"""Interval attention on the GPU: FlashAttention's algorithm (arXiv:2307.08691) for rows that each see one run of keys.

Row i sees keys lo[i] <= j < hi[i], with lo and hi non-decreasing in i (query rows are kept sorted). Then

    a block of query rows sees the keys [lo[first], hi[last]); those in [lo[last], hi[first]) are seen by all of them
    a block of keys [a, b) is seen by the query rows from the first with hi > a up to the first with lo >= b

so neither direction needs a mask tensor or a list of blocks, and no shape is compiled in: packs, windows, trained
rows only and ring blocks of any length run the same binary. Only the blocks at the rim of what is seen pay for a mask.
Tiles come by TMA (tensor descriptors), scores are kept in base 2.

The backward recomputes the scores twice, once for dq (a program owns query rows) and once for dk and dv (it owns keys and
walks over the rows of all heads that read them): seven matmuls where one pass would do five, but that pass has to add
its dq tiles to memory, and came out slower. Both take the final out and lse (see ``attention.py``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from eagle_ds.kernels import diagonal_triton
from eagle_ds.kernels.attention import KeyBounds
from eagle_ds.kernels.attention_split import Split, pieces_for

logger = logging.getLogger(__name__)

HOPPER = 132  # multiprocessors of a Hopper GPU
LOG2E = 1.4426950408889634

Tile = tuple[int, int, int, int]
"""(query rows, keys, warps, stages)"""

TILES: dict[str, list[Tile]] = {
    "forward": [(128, 128, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 1)],
    "dq": [(128, 64, 8, 3), (64, 64, 8, 2), (64, 32, 4, 1)],
    "dk and dv": [(64, 128, 8, 3), (64, 64, 8, 2), (32, 64, 8, 2), (32, 32, 4, 1)],
}
"""By kernel, the fastest of those tried on an H200 at d = 128 first (docs/benchmarks/h200.md), then smaller ones for GPUs with
less shared memory and for wider heads."""
TILES_OF_WIDE_HEADS: dict[str, list[Tile]] = {
    "forward": [(128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 1), (32, 32, 4, 1)],
    "dq": [(64, 64, 8, 1), (64, 32, 4, 1), (32, 32, 4, 1)],
    "dk and dv": [(32, 64, 8, 2), (32, 32, 4, 1), (16, 32, 4, 1)],
}


@triton.jit
def _forward_span(acc, peak, total, q, K, V, k_column, v_column, start, stop, lo, hi, scale_log2, BN: tl.constexpr, MASKED: tl.constexpr):
    """Online softmax over the keys [start, stop)."""
    for j in tl.range(start, stop, BN):
        s = tl.dot(q, K.load([j, k_column]).T)
        if MASKED:
            columns = j + tl.arange(0, BN)
            s = tl.where((columns[None, :] >= lo[:, None]) & (columns[None, :] < hi[:, None]), s, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(s, 1) * scale_log2)
        finite = tl.where(new_peak == float("-inf"), 0.0, new_peak) if MASKED else new_peak
        p = tl.exp2(s * scale_log2 - finite[:, None])
        shrink = tl.exp2(peak - finite)
        v = V.load([j, v_column])
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None])
        total = total * shrink + tl.sum(p, 1)
        peak = new_peak
    return acc, peak, total


@triton.jit
def _span_of_rows(Lo, Hi, first, N, BM: tl.constexpr, BN: tl.constexpr):
    """Keys of the query rows [first, first + BM): (start, full_start, full_stop, stop), between the middle two seen by all rows."""
    last = tl.minimum(first + BM, N) - 1
    start = tl.load(Lo + first).to(tl.int32) // BN * BN
    stop = tl.load(Hi + last).to(tl.int32)
    full_start = tl.cdiv(tl.load(Lo + last).to(tl.int32), BN) * BN
    full_stop = tl.load(Hi + first).to(tl.int32) // BN * BN
    if full_stop <= full_start:
        full_start = stop
        full_stop = stop
    return start, tl.minimum(full_start, stop), full_stop, stop


@triton.jit
def _forward_kernel(Q, K, V, Out, Lse, Lo, Hi, N, scale_log2, q_head, k_head, v_head, GROUP: tl.constexpr, D: tl.constexpr,
                    BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # late rows see most keys: start them first
    head, heads = tl.program_id(1), tl.num_programs(1)
    first = block * BM
    rows = first + tl.arange(0, BM)
    real = rows < N
    lo = tl.load(Lo + rows, mask=real, other=0).to(tl.int32)
    hi = tl.load(Hi + rows, mask=real, other=0).to(tl.int32)
    start, full_start, full_stop, stop = _span_of_rows(Lo, Hi, first, N, BM, BN)
    q = Q.load([first, head * q_head])
    k_column, v_column = head // GROUP * k_head, head // GROUP * v_head
    acc = tl.zeros([BM, D], dtype=tl.float32)
    peak = tl.full([BM], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BM], dtype=tl.float32)
    acc, peak, total = _forward_span(acc, peak, total, q, K, V, k_column, v_column, start, full_start, lo, hi, scale_log2, BN, True)
    acc, peak, total = _forward_span(acc, peak, total, q, K, V, k_column, v_column, full_start, full_stop, lo, hi, scale_log2, BN, False)
    acc, peak, total = _forward_span(acc, peak, total, q, K, V, k_column, v_column, full_stop, stop, lo, hi, scale_log2, BN, True)
    seen = total > 0
    out = acc / tl.where(seen, total, 1.0)[:, None]
    lse = tl.where(seen, (peak + tl.log2(tl.where(seen, total, 1.0))) / 1.4426950408889634, float("-inf"))
    Out.store([first, head * D], out.to(Out.dtype))
    tl.store(Lse + rows.to(tl.int64) * heads + head, lse, mask=real)


@triton.jit
def _row_sums_kernel(DOut, Out, Lse, Delta, Lse2, N, padded, dout_row, dout_head, out_row, out_head, lse_row, lse_head,
                      D: tl.constexpr, BM: tl.constexpr):  # fmt: skip
    """delta = rowsum(dout * out) and the base-2 lse, each [heads, padded]; rows past N get an lse of inf, so p = 0."""
    head = tl.program_id(1).to(tl.int64)  # heads may stand first in memory, N * D numbers each
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    real = rows < N
    width, at = tl.arange(0, D), rows.to(tl.int64)
    dout = tl.load(DOut + at[:, None] * dout_row + head * dout_head + width[None, :], mask=real[:, None], other=0.0).to(tl.float32)
    out = tl.load(Out + at[:, None] * out_row + head * out_head + width[None, :], mask=real[:, None], other=0.0).to(tl.float32)
    lse = tl.load(Lse + at * lse_row + head * lse_head, mask=real, other=float("inf"))
    to = head * padded + rows
    tl.store(Delta + to, tl.sum(dout * out, 1), mask=rows < padded)
    tl.store(Lse2 + to, lse * 1.4426950408889634, mask=rows < padded)


@triton.jit
def _dq_span(dq, q, dout, lse2, delta, K, V, k_column, v_column, start, stop, lo, hi, scale_log2, BN: tl.constexpr, MASKED: tl.constexpr):
    for j in tl.range(start, stop, BN):
        k = K.load([j, k_column])
        p = tl.exp2(tl.dot(q, k.T) * scale_log2 - lse2[:, None])
        if MASKED:
            columns = j + tl.arange(0, BN)
            p = tl.where((columns[None, :] >= lo[:, None]) & (columns[None, :] < hi[:, None]), p, 0.0)
        v = V.load([j, v_column])
        ds = p * (tl.dot(dout, v.T) - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq)
    return dq


@triton.jit
def _dq_kernel(Q, K, V, DOut, DQ, Lse2, Delta, Lo, Hi, N, padded, scale, scale_log2, q_head, k_head, v_head, dout_head,
               GROUP: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    first = block * BM
    rows = first + tl.arange(0, BM)
    real = rows < N
    lo = tl.load(Lo + rows, mask=real, other=0).to(tl.int32)
    hi = tl.load(Hi + rows, mask=real, other=0).to(tl.int32)
    start, full_start, full_stop, stop = _span_of_rows(Lo, Hi, first, N, BM, BN)
    q = Q.load([first, head * q_head])
    dout = DOut.load([first, head * dout_head])
    info = head.to(tl.int64) * padded + rows
    lse2 = tl.load(Lse2 + info, mask=real, other=float("inf"))
    delta = tl.load(Delta + info, mask=real, other=0.0)
    k_column, v_column = head // GROUP * k_head, head // GROUP * v_head
    dq = tl.zeros([BM, D], dtype=tl.float32)
    dq = _dq_span(dq, q, dout, lse2, delta, K, V, k_column, v_column, start, full_start, lo, hi, scale_log2, BN, True)
    dq = _dq_span(dq, q, dout, lse2, delta, K, V, k_column, v_column, full_start, full_stop, lo, hi, scale_log2, BN, False)
    dq = _dq_span(dq, q, dout, lse2, delta, K, V, k_column, v_column, full_stop, stop, lo, hi, scale_log2, BN, True)
    DQ.store([first, head * D], (dq * scale).to(DQ.dtype))


@triton.jit
def _dkv_span(dk, dv, k, v, Q, DOut, Lse2, Delta, Lo, Hi, columns, kv_head, q_head, dout_head, padded, start, stop, N, scale_log2,
              GROUP: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """The query rows [start, stop) of the GROUP heads that read this block of keys, in one loop."""
    blocks = tl.cdiv(tl.maximum(stop - start, 0), BM)
    for n in tl.range(0, GROUP * blocks):
        head = kv_head * GROUP + n // blocks
        i = start + n % blocks * BM
        rows = i + tl.arange(0, BM)
        q = Q.load([i, head * q_head])
        dout = DOut.load([i, head * dout_head])
        info = head.to(tl.int64) * padded + rows
        p = tl.exp2(tl.dot(k, q.T) * scale_log2 - tl.load(Lse2 + info)[None, :])
        if MASKED:
            lo = tl.load(Lo + rows, mask=rows < N, other=0).to(tl.int32)
            hi = tl.load(Hi + rows, mask=rows < N, other=0).to(tl.int32)
            p = tl.where((columns[:, None] >= lo[None, :]) & (columns[:, None] < hi[None, :]), p, 0.0)
        dv = tl.dot(p.to(dout.dtype), dout, dv)
        ds = (p * (tl.dot(v, dout.T) - tl.load(Delta + info)[None, :])).to(q.dtype)
        dk = tl.dot(ds, q, dk)
    return dk, dv


@triton.jit
def _dkv_kernel(Q, K, V, DOut, DK, DV, Lse2, Delta, Lo, Hi, First, FullFirst, FullLast, Last, N, M, padded, scale, scale_log2,
                q_head, k_head, v_head, dout_head, dk_row, dk_head, dv_row, dv_head,
                GROUP: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    block, kv_head = tl.program_id(0), tl.program_id(1)
    columns = block * BN + tl.arange(0, BN)
    k = K.load([block * BN, kv_head * k_head])
    v = V.load([block * BN, kv_head * v_head])
    first, last = tl.load(First + block), tl.load(Last + block)
    full_first = first + tl.cdiv(tl.load(FullFirst + block) - first, BM) * BM
    full_last = first + tl.maximum(tl.load(FullLast + block) - first, 0) // BM * BM
    if full_last <= full_first:
        full_first = last
        full_last = last
    dk = tl.zeros([BN, D], dtype=tl.float32)
    dv = tl.zeros([BN, D], dtype=tl.float32)
    dk, dv = _dkv_span(dk, dv, k, v, Q, DOut, Lse2, Delta, Lo, Hi, columns, kv_head, q_head, dout_head, padded,
                       first, tl.minimum(full_first, last), N, scale_log2, GROUP, D, BM, True)  # fmt: skip
    dk, dv = _dkv_span(dk, dv, k, v, Q, DOut, Lse2, Delta, Lo, Hi, columns, kv_head, q_head, dout_head, padded,
                       full_first, full_last, N, scale_log2, GROUP, D, BM, False)  # fmt: skip
    dk, dv = _dkv_span(dk, dv, k, v, Q, DOut, Lse2, Delta, Lo, Hi, columns, kv_head, q_head, dout_head, padded,
                       full_last, last, N, scale_log2, GROUP, D, BM, True)  # fmt: skip
    inside = columns[:, None] < M
    at, width = columns[:, None].to(tl.int64), tl.arange(0, D)[None, :]
    to_k = DK + kv_head * dk_head + at * dk_row + width
    to_v = DV + kv_head * dv_head + at * dv_row + width
    tl.store(to_k, tl.load(to_k, mask=inside, other=0.0) + dk * scale, mask=inside)
    tl.store(to_v, tl.load(to_v, mask=inside, other=0.0) + dv, mask=inside)


class TritonBackend:
    """``AttentionBackend`` for half-precision CUDA tensors, d a power of two from 16 to 256.

    Bounds must not decrease from row to row.

    Args:
        head_dim: d; heads wider than 128 need smaller tiles.
        programs: multiprocessors of the GPU. If rows and heads fill less than half of them, keys are split.
    """

    diagonal_forward = staticmethod(diagonal_triton.diagonal_forward)
    diagonal_backward = staticmethod(diagonal_triton.diagonal_backward)

    def __init__(self, head_dim: int = 128, programs: int = HOPPER) -> None:
        self.programs = programs
        tiles = TILES if head_dim <= 128 else TILES_OF_WIDE_HEADS
        self.tiles = {kernel: list(sizes) for kernel, sizes in tiles.items()}

    def _launch(self, kernel: str, launch: Callable[[int, int, int, int], None]) -> None:
        """``launch`` with the largest tile that this GPU has room for. Raises OutOfResources if it has for none."""
        tiles = self.tiles[kernel]
        while True:
            try:
                return launch(*tiles[0])
            except OutOfResources as error:
                if len(tiles) == 1:
                    raise
                logger.warning("attention, %s: tile %s does not fit this GPU (%s), on with %s", kernel, tiles.pop(0), error, tiles[0])

    def _split(self, bounds: KeyBounds, heads: int) -> Split | None:
        """How to split the keys of these rows, worked out once for each bounds."""
        block = self.tiles["forward"][0][0]
        key = ("split", heads, block)
        if key not in bounds.memo:
            pieces = pieces_for(bounds, heads, block, self.programs)
            bounds.memo[key] = Split.make(bounds, pieces, block) if pieces > 1 else None
        return bounds.memo[key]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bounds: KeyBounds, scale: float) -> tuple[Tensor, Tensor]:
        """See ``AttentionBackend``."""
        split = self._split(bounds, q.shape[1])
        if split is None:
            return self._forward(q, k, v, bounds, scale)
        return split.merged(*self._forward(split.copies(q), k, v, split.bounds, scale))

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, bounds: KeyBounds, scale: float) -> tuple[Tensor, Tensor]:
        n, heads, d = q.shape
        out = torch.empty(n, heads, d, dtype=q.dtype, device=q.device)
        lse = torch.full((n, heads), -torch.inf, dtype=torch.float32, device=q.device)
        if not n or not k.shape[0]:
            return out.zero_(), lse

        def launch(bm: int, bn: int, warps: int, stages: int) -> None:
            _forward_kernel[(triton.cdiv(n, bm), heads)](
                _tiles(q, bm), _tiles(k, bn), _tiles(v, bn), _tiles(out, bm), lse, bounds.lo_device, bounds.hi_device, n, scale * LOG2E,
                q.stride(1), k.stride(1), v.stride(1), GROUP=heads // k.shape[1], D=d, BM=bm, BN=bn, num_warps=warps, num_stages=stages,
            )  # fmt: skip

        self._launch("forward", launch)
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bounds: KeyBounds, scale: float,
        dk: Tensor, dv: Tensor,
    ) -> Tensor:  # fmt: skip
        """See ``AttentionBackend``."""
        split = self._split(bounds, q.shape[1])
        if split is None:
            return self._backward(dout, q, k, v, out, lse, bounds, scale, dk, dv)
        dout, q, out, lse = (split.copies(x) for x in (dout, q, out, lse))
        return split.summed(self._backward(dout, q, k, v, out, lse, split.bounds, scale, dk, dv))

    def _backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bounds: KeyBounds, scale: float,
        dk: Tensor, dv: Tensor,
    ) -> Tensor:  # fmt: skip
        (n, heads, d), keys = q.shape, k.shape[0]
        if not n or not keys:
            return torch.zeros_like(q)
        lse2, delta = _row_sums(dout, out, lse)
        dq = torch.empty(n, heads, d, dtype=q.dtype, device=q.device)
        heads_at = (q.stride(1), k.stride(1), v.stride(1), dout.stride(1))
        sizes = {"GROUP": heads // k.shape[1], "D": d}

        def launch_dq(bm: int, bn: int, warps: int, stages: int) -> None:
            _dq_kernel[(triton.cdiv(n, bm), heads)](
                _tiles(q, bm), _tiles(k, bn), _tiles(v, bn), _tiles(dout, bm), _tiles(dq, bm), lse2, delta, bounds.lo_device,
                bounds.hi_device, n, lse2.shape[1], scale, scale * LOG2E, *heads_at, BM=bm, BN=bn, num_warps=warps, num_stages=stages,
                **sizes,
            )  # fmt: skip

        def launch_dkv(bm: int, bn: int, warps: int, stages: int) -> None:
            _dkv_kernel[(triton.cdiv(keys, bn), k.shape[1])](
                _tiles(q, bm), _tiles(k, bn), _tiles(v, bn), _tiles(dout, bm), dk, dv, lse2, delta, bounds.lo_device, bounds.hi_device,
                *_rows_of_key_blocks(bounds, keys, bn), n, keys, lse2.shape[1], scale, scale * LOG2E, *heads_at,
                *dk.stride()[:2], *dv.stride()[:2], BM=bm, BN=bn, num_warps=warps, num_stages=stages, **sizes,
            )  # fmt: skip

        self._launch("dq", launch_dq)
        self._launch("dk and dv", launch_dkv)
        return dq


def _tiles(x: Tensor, rows: int) -> TensorDescriptor:
    """Descriptor of [rows, d] tiles of x [M, heads, d], whose heads lie within its rows: head h starts in column h * x.stride(1)."""
    assert x.stride(2) == 1 and x.stride(0) >= (x.shape[1] - 1) * x.stride(1) + x.shape[2]
    width = (x.shape[1] - 1) * x.stride(1) + x.shape[2]
    return TensorDescriptor(x, [x.shape[0], width], [x.stride(0), 1], [rows, x.shape[2]])


def _row_sums(dout: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """(base-2 lse, delta), each float32 [heads, N and at least a block of rows more]."""
    n, heads, d = out.shape
    padded = triton.cdiv(n, 64) * 64 + 128
    lse2, delta = (torch.empty(heads, padded, dtype=torch.float32, device=out.device) for _ in range(2))
    _row_sums_kernel[(triton.cdiv(padded, 64), heads)](
        dout, out, lse, delta, lse2, n, padded, *dout.stride()[:2], *out.stride()[:2], *lse.stride(), D=d, BM=64, num_warps=4
    )
    return lse2, delta


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
