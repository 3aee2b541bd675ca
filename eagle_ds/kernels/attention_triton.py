"""Attention in Triton for rows that each see one interval of keys: FlashAttention-2 (arXiv:2307.08691).

Row i sees the keys lo[i] <= j < hi[i], with lo and hi non-decreasing in i (query rows are sorted). Then:

- A tile of query rows sees the keys [lo[first row], hi[last row]). Every row of it sees all keys in
  [lo[last row], hi[first row]).
- The query rows that see any key of a tile [a, b) begin with the first row with hi > a, and end before the
  first row with lo >= b. Those that see all of it begin with the first row with hi >= b, and end before the
  first row with lo > a.

So each program loops over one range in three parts: masked, unmasked, masked.

      keys     lo[first]   lo[last]        hi[first]   hi[last]
    tile of         |  masked  |    unmasked   |  masked  |
    query rows      +----------+---------------+----------+

There is no mask tensor and no list of tiles, and lengths are not compile-time constants: one binary serves
packs, windows, subsets of rows and ring blocks of any length. Tiles are loaded by TMA (tensor descriptors).

Scores are kept in base 2: with c = scale * log2(e), exp(scale s - m) = 2^(c s - m log2(e)). That saves one
multiplication per score. "lse2" is lse * log2(e).

The backward (derived in attention.py) takes the final out and lse, and recomputes the scores twice: once for
dq (a program owns query rows), once for dk and dv (a program owns keys, and loops over the rows of all heads
that read them). That is seven matmuls. A single pass needs only five, but must add its tiles of dq to memory;
it was slower.

Memory beyond the results: lse2 and delta, two float32 for each row and head.
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
from eagle_ds.kernels.attention import KeyBounds, OutAndLse, ReferenceAttention
from eagle_ds.kernels.attention_split import Split, pieces_for

logger = logging.getLogger(__name__)

HOPPER = 132  # multiprocessors of a Hopper GPU
LOG2E = 1.4426950408889634

Tile = tuple[int, int, int, int]
"""(query rows BM, keys BN, warps, pipeline stages)"""

TILES: dict[str, list[Tile]] = {
    "forward": [(128, 128, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 1)],
    "dq": [(128, 64, 8, 3), (64, 64, 8, 2), (64, 32, 4, 1)],
    "dk and dv": [(64, 128, 8, 3), (64, 64, 8, 2), (32, 64, 8, 2), (32, 32, 4, 1)],
}
"""Tiles of each kernel for d <= 128: the fastest on an H200 (docs/benchmarks/h200.md), then smaller ones for
GPUs with less shared memory."""
TILES_OF_WIDE_HEADS: dict[str, list[Tile]] = {
    "forward": [(128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 1), (32, 32, 4, 1)],
    "dq": [(64, 64, 8, 1), (64, 32, 4, 1), (32, 32, 4, 1)],
    "dk and dv": [(32, 64, 8, 2), (32, 32, 4, 1), (16, 32, 4, 1)],
}


@triton.jit
def _forward_span(acc, peak, total, q, K, V, k_column, v_column, start, stop, lo, hi, scale_log2,
                  BN: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Online softmax over the keys [start, stop).

    Of each row ``peak`` is the maximum score so far (base 2), ``total`` the sum of 2^(score - peak), and
    ``acc`` the same sum of the values.
    """
    for j in tl.range(start, stop, BN):
        s = tl.dot(q, K.load([j, k_column]).T)
        if MASKED:
            columns = j + tl.arange(0, BN)
            seen = (columns[None, :] >= lo[:, None]) & (columns[None, :] < hi[:, None])
            s = tl.where(seen, s, float("-inf"))
        # A row that has seen no key yet has peak -inf; subtract 0 instead, as -inf - (-inf) is NaN.
        new_peak = tl.maximum(peak, tl.max(s, 1) * scale_log2)
        finite = tl.where(new_peak == float("-inf"), 0.0, new_peak) if MASKED else new_peak
        p = tl.exp2(s * scale_log2 - finite[:, None])
        # Earlier sums were relative to the old maximum.
        shrink = tl.exp2(peak - finite)
        v = V.load([j, v_column])
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None])
        total = total * shrink + tl.sum(p, 1)
        peak = new_peak
    return acc, peak, total


@triton.jit
def _span_of_rows(Lo, Hi, first, N, BM: tl.constexpr, BN: tl.constexpr):
    """Return (start, full_start, full_stop, stop): keys of the query rows [first, first + BM).

    All rows see [full_start, full_stop). Both limits are multiples of BN, as is start, so loops step from
    tile to tile. If no whole tile is seen by all rows, [start, stop) is masked throughout.
    """
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
def _forward_kernel(Q, K, V, Out, Lse, Lo, Hi, N, scale_log2, q_head, k_head, v_head, GROUP: tl.constexpr,
                    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """Forward of BM query rows of one head; GROUP query heads share a KV head."""
    # Late rows see most keys: start them first, so that no long program begins when the others end.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head, heads = tl.program_id(1), tl.num_programs(1)
    first = block * BM
    rows = first + tl.arange(0, BM)
    real = rows < N
    lo = tl.load(Lo + rows, mask=real, other=0).to(tl.int32)
    hi = tl.load(Hi + rows, mask=real, other=0).to(tl.int32)
    start, full_start, full_stop, stop = _span_of_rows(Lo, Hi, first, N, BM, BN)
    q = Q.load([first, head * q_head])
    # A descriptor is a matrix [rows, heads * d]: the column selects the head.
    k_column, v_column = head // GROUP * k_head, head // GROUP * v_head
    acc = tl.zeros([BM, D], dtype=tl.float32)
    peak = tl.full([BM], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BM], dtype=tl.float32)
    acc, peak, total = _forward_span(acc, peak, total, q, K, V, k_column, v_column, start, full_start,
                                     lo, hi, scale_log2, BN, True)  # fmt: skip
    acc, peak, total = _forward_span(acc, peak, total, q, K, V, k_column, v_column, full_start, full_stop,
                                     lo, hi, scale_log2, BN, False)  # fmt: skip
    acc, peak, total = _forward_span(acc, peak, total, q, K, V, k_column, v_column, full_stop, stop,
                                     lo, hi, scale_log2, BN, True)  # fmt: skip
    # Rows without keys give out = 0 and lse = -inf. 1.44.. is log2(e): back to the natural logarithm.
    seen = total > 0
    out = acc / tl.where(seen, total, 1.0)[:, None]
    lse = tl.where(seen, (peak + tl.log2(tl.where(seen, total, 1.0))) / 1.4426950408889634, float("-inf"))
    Out.store([first, head * D], out.to(Out.dtype))
    tl.store(Lse + rows.to(tl.int64) * heads + head, lse, mask=real)


@triton.jit
def _row_sums_kernel(DOut, Out, Lse, Delta, Lse2, N, padded, dout_row, dout_head, out_row, out_head,
                     lse_row, lse_head, D: tl.constexpr, BM: tl.constexpr):  # fmt: skip
    """Write delta = rowsum(dout * out) and lse2, each [heads, padded].

    Rows past N get lse = inf, so p = 0 and they add nothing.
    """
    head = tl.program_id(1).to(tl.int64)  # int64: if heads come first in memory, head * out_head exceeds 2^31
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    real = rows < N
    width, at = tl.arange(0, D), rows.to(tl.int64)
    dout_at = DOut + at[:, None] * dout_row + head * dout_head + width[None, :]
    out_at = Out + at[:, None] * out_row + head * out_head + width[None, :]
    dout = tl.load(dout_at, mask=real[:, None], other=0.0).to(tl.float32)
    out = tl.load(out_at, mask=real[:, None], other=0.0).to(tl.float32)
    lse = tl.load(Lse + at * lse_row + head * lse_head, mask=real, other=float("inf"))
    to = head * padded + rows
    tl.store(Delta + to, tl.sum(dout * out, 1), mask=rows < padded)
    tl.store(Lse2 + to, lse * 1.4426950408889634, mask=rows < padded)


@triton.jit
def _dq_span(dq, q, dout, lse2, delta, K, V, k_column, v_column, start, stop, lo, hi, scale_log2,
             BN: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Add dq of the keys [start, stop): p = 2^(c s - lse2), ds = p * (dout v^T - delta), dq += ds k."""
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
def _dq_kernel(Q, K, V, DOut, DQ, Lse2, Delta, Lo, Hi, N, padded, scale, scale_log2, q_head, k_head, v_head,
               dout_head, GROUP: tl.constexpr, D: tl.constexpr, BM: tl.constexpr,
               BN: tl.constexpr):  # fmt: skip
    """dq of BM query rows of one head, in the forward's loop. ``scale`` is applied once, at the end."""
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
    dq = _dq_span(dq, q, dout, lse2, delta, K, V, k_column, v_column, start, full_start, lo, hi,
                  scale_log2, BN, True)  # fmt: skip
    dq = _dq_span(dq, q, dout, lse2, delta, K, V, k_column, v_column, full_start, full_stop, lo, hi,
                  scale_log2, BN, False)  # fmt: skip
    dq = _dq_span(dq, q, dout, lse2, delta, K, V, k_column, v_column, full_stop, stop, lo, hi,
                  scale_log2, BN, True)  # fmt: skip
    DQ.store([first, head * D], (dq * scale).to(DQ.dtype))


@triton.jit
def _dkv_span(dk, dv, k, v, Q, DOut, Lse2, Delta, Lo, Hi, columns, kv_head, q_head, dout_head, padded, start,
              stop, N, scale_log2, GROUP: tl.constexpr, D: tl.constexpr, BM: tl.constexpr,
              MASKED: tl.constexpr):  # fmt: skip
    """Add dk and dv of the query rows [start, stop) of all GROUP heads that read this tile of keys.

    One loop runs over all (head, tile of rows), so loads are pipelined across heads too. Scores are
    transposed, [keys, rows], so p^T dout and ds^T q are plain products. Rows past N have lse2 = inf, so
    p = 0.
    """
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
            seen = (columns[:, None] >= lo[None, :]) & (columns[:, None] < hi[None, :])
            p = tl.where(seen, p, 0.0)
        dv = tl.dot(p.to(dout.dtype), dout, dv)
        ds = (p * (tl.dot(v, dout.T) - tl.load(Delta + info)[None, :])).to(q.dtype)
        dk = tl.dot(ds, q, dk)
    return dk, dv


@triton.jit
def _dkv_kernel(Q, K, V, DOut, DK, DV, Lse2, Delta, Lo, Hi, First, FullFirst, FullLast, Last, N, M, padded,
                scale, scale_log2, q_head, k_head, v_head, dout_head, dk_row, dk_head, dv_row, dv_head,
                GROUP: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """Add dk and dv of BN keys of one KV head to DK and DV. See ``_rows_of_key_tiles`` for First .. Last."""
    block, kv_head = tl.program_id(0), tl.program_id(1)
    columns = block * BN + tl.arange(0, BN)
    k = K.load([block * BN, kv_head * k_head])
    v = V.load([block * BN, kv_head * v_head])
    first, last = tl.load(First + block), tl.load(Last + block)
    # Rows [full_first, full_last) see all keys of the tile. Both limits are rounded inwards to whole tiles of
    # rows, counted from ``first``.
    full_first = first + tl.cdiv(tl.load(FullFirst + block) - first, BM) * BM
    full_last = first + tl.maximum(tl.load(FullLast + block) - first, 0) // BM * BM
    if full_last <= full_first:
        full_first = last
        full_last = last
    dk = tl.zeros([BN, D], dtype=tl.float32)
    dv = tl.zeros([BN, D], dtype=tl.float32)
    dk, dv = _dkv_span(dk, dv, k, v, Q, DOut, Lse2, Delta, Lo, Hi, columns, kv_head, q_head, dout_head,
                       padded, first, tl.minimum(full_first, last), N, scale_log2, GROUP, D, BM,
                       True)  # fmt: skip
    dk, dv = _dkv_span(dk, dv, k, v, Q, DOut, Lse2, Delta, Lo, Hi, columns, kv_head, q_head, dout_head,
                       padded, full_first, full_last, N, scale_log2, GROUP, D, BM, False)  # fmt: skip
    dk, dv = _dkv_span(dk, dv, k, v, Q, DOut, Lse2, Delta, Lo, Hi, columns, kv_head, q_head, dout_head,
                       padded, full_last, last, N, scale_log2, GROUP, D, BM, True)  # fmt: skip
    # This program alone owns these keys, so it adds without atomics to what earlier calls left in DK and DV.
    inside = columns[:, None] < M
    at, width = columns[:, None].to(tl.int64), tl.arange(0, D)[None, :]
    to_k = DK + kv_head * dk_head + at * dk_row + width
    to_v = DV + kv_head * dv_head + at * dv_row + width
    tl.store(to_k, tl.load(to_k, mask=inside, other=0.0) + dk * scale, mask=inside)
    tl.store(to_v, tl.load(to_v, mask=inside, other=0.0) + dv, mask=inside)


class TritonBackend(ReferenceAttention):
    """Attention of half-precision CUDA tensors, d a power of two from 16 to 256.

    Bounds must not decrease from row to row.

    Args:
        head_dim: d; heads wider than 128 need smaller tiles.
        programs: number of multiprocessors of the GPU. If rows and heads fill less than half of them, the
            keys are split.
    """

    diagonal_forward = staticmethod(diagonal_triton.diagonal_forward)
    diagonal_backward = staticmethod(diagonal_triton.diagonal_backward)

    def __init__(self, head_dim: int = 128, programs: int = HOPPER) -> None:
        self.programs = programs
        tiles = TILES if head_dim <= 128 else TILES_OF_WIDE_HEADS
        self.tiles = {kernel: list(sizes) for kernel, sizes in tiles.items()}

    def _launch(self, kernel: str, launch: Callable[[int, int, int, int], None]) -> None:
        """Call ``launch`` with the first tile that fits this GPU's shared memory; drop tiles that do not.

        Raises:
            OutOfResources: no tile fits.
        """
        tiles = self.tiles[kernel]
        while True:
            try:
                return launch(*tiles[0])
            except OutOfResources as error:
                if len(tiles) == 1:
                    raise
                tile = tiles.pop(0)
                message = "attention, %s: tile %s does not fit this GPU (%s); trying %s"
                logger.warning(message, kernel, tile, error, tiles[0])

    def _split(self, bounds: KeyBounds, heads: int) -> Split | None:
        """Return how to split the keys of these rows, or None for no split. Computed once for ``bounds``."""
        block = self.tiles["forward"][0][0]
        key = ("split", heads, block)
        if key not in bounds.memo:
            pieces = pieces_for(bounds, heads, block, self.programs)
            bounds.memo[key] = Split.make(bounds, pieces, block) if pieces > 1 else None
        return bounds.memo[key]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bounds: KeyBounds, scale: float) -> OutAndLse:
        """See ``ReferenceAttention``."""
        split = self._split(bounds, q.shape[1])
        if split is None:
            return self._forward(q, k, v, bounds, scale)
        return split.merged(*self._forward(split.copies(q), k, v, split.bounds, scale))

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, bounds: KeyBounds, scale: float) -> OutAndLse:
        n, heads, d = q.shape
        out = torch.empty(n, heads, d, dtype=q.dtype, device=q.device)
        lse = torch.full((n, heads), -torch.inf, dtype=torch.float32, device=q.device)
        if not n or not k.shape[0]:
            return out.zero_(), lse

        def launch(bm: int, bn: int, warps: int, stages: int) -> None:
            _forward_kernel[(triton.cdiv(n, bm), heads)](
                _tiles(q, bm), _tiles(k, bn), _tiles(v, bn), _tiles(out, bm), lse, bounds.lo_device,
                bounds.hi_device, n, scale * LOG2E, q.stride(1), k.stride(1), v.stride(1),
                GROUP=heads // k.shape[1], D=d, BM=bm, BN=bn, num_warps=warps, num_stages=stages,
            )  # fmt: skip

        self._launch("forward", launch)
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bounds: KeyBounds,
        scale: float, dk: Tensor, dv: Tensor,
    ) -> Tensor:  # fmt: skip
        """See ``ReferenceAttention``."""
        split = self._split(bounds, q.shape[1])
        if split is None:
            return self._backward(dout, q, k, v, out, lse, bounds, scale, dk, dv)
        dout, q, out, lse = (split.copies(x) for x in (dout, q, out, lse))
        return split.summed(self._backward(dout, q, k, v, out, lse, split.bounds, scale, dk, dv))

    def _backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bounds: KeyBounds,
        scale: float, dk: Tensor, dv: Tensor,
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
                _tiles(q, bm), _tiles(k, bn), _tiles(v, bn), _tiles(dout, bm), _tiles(dq, bm), lse2, delta,
                bounds.lo_device, bounds.hi_device, n, lse2.shape[1], scale, scale * LOG2E, *heads_at,
                BM=bm, BN=bn, num_warps=warps, num_stages=stages, **sizes,
            )  # fmt: skip

        def launch_dkv(bm: int, bn: int, warps: int, stages: int) -> None:
            _dkv_kernel[(triton.cdiv(keys, bn), k.shape[1])](
                _tiles(q, bm), _tiles(k, bn), _tiles(v, bn), _tiles(dout, bm), dk, dv, lse2, delta,
                bounds.lo_device, bounds.hi_device, *_rows_of_key_tiles(bounds, keys, bn), n, keys,
                lse2.shape[1], scale, scale * LOG2E, *heads_at, *dk.stride()[:2], *dv.stride()[:2],
                BM=bm, BN=bn, num_warps=warps, num_stages=stages, **sizes,
            )  # fmt: skip

        self._launch("dq", launch_dq)
        self._launch("dk and dv", launch_dkv)
        return dq


def _tiles(x: Tensor, rows: int) -> TensorDescriptor:
    """Return a TMA descriptor of [rows, d] tiles of x [M, heads, d].

    The descriptor is a matrix: head h begins in its column h * x.stride(1). So the heads of a row must lie
    within the row's memory.
    """
    width = (x.shape[1] - 1) * x.stride(1) + x.shape[2]
    assert x.stride(2) == 1 and x.stride(0) >= width
    return TensorDescriptor(x, [x.shape[0], width], [x.stride(0), 1], [rows, x.shape[2]])


def _row_sums(dout: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Return (lse2, delta), each float32 [heads, padded].

    The padding is at least one tile of rows, because the loop in ``_dkv_span`` begins at any row and reads
    whole tiles.
    """
    n, heads, d = out.shape
    padded = triton.cdiv(n, 64) * 64 + 128
    lse2, delta = (torch.empty(heads, padded, dtype=torch.float32, device=out.device) for _ in range(2))
    _row_sums_kernel[(triton.cdiv(padded, 64), heads)](
        dout, out, lse, delta, lse2, n, padded, *dout.stride()[:2], *out.stride()[:2], *lse.stride(),
        D=d, BM=64, num_warps=4,
    )  # fmt: skip
    return lse2, delta


def _rows_of_key_tiles(bounds: KeyBounds, keys: int, block: int) -> list[Tensor]:
    """Return four int32 limits of query rows for each tile of keys [a, b), by binary search on the device.

    They are (first, full_first, full_last, last): rows [first, last) see any key of the tile, and rows
    [full_first, full_last) see all of them.
    """
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
