"""Block attention: every query row sees one run of key rows; (out, lse) of two key sets merge by online softmax.

A causal mask, packed documents, sliding windows, trained rows only and blocks of a ring all have this form: query
row i attends to keys lo[i] <= j < hi[i] of a key buffer. An empty run gives out = 0 and lse = -inf.

The backward takes the FINAL out and lse, after every merge: with p_ij = exp(s_ij - lse) and
delta_i = dout_i . out_i it follows that ds_ij = p_ij (dout_i . v_j - delta_i), whichever part of the joint key set
j belongs to, so no gradient through lse is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from eagle_ds.parallel.copies import to_device

SCORE_BYTES = 64 << 20  # the reference works on score blocks of about this size


@dataclass(frozen=True)
class KeyBounds:
    """Visible keys of each query row, int64 [N] on the host, and a copy on the device of the tensors."""

    lo: np.ndarray
    hi: np.ndarray
    lo_device: Tensor
    hi_device: Tensor
    memo: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)  # what a backend worked out for these rows

    @cached_property
    def causal_runs(self) -> list[tuple[int, int]]:
        """Maximal runs of two or more rows [start, stop) that see the same first key, and one key more from row to row."""
        sees = self.hi > self.lo
        grows = (np.diff(self.lo) == 0) & (np.diff(self.hi) == 1) & (sees[1:] == sees[:-1])
        edges = np.flatnonzero(np.diff(np.concatenate([[False], grows, [False]])))
        return [(start, last + 1) for start, last in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)]

    def rows(self, start: int, stop: int) -> KeyBounds:
        """Bounds of the rows [start, stop)."""
        return KeyBounds(self.lo[start:stop], self.hi[start:stop], self.lo_device[start:stop], self.hi_device[start:stop])

    @classmethod
    def make(cls, lo: np.ndarray, hi: np.ndarray, device: torch.device) -> KeyBounds:
        """Bounds on host and device."""
        return cls(lo, hi, *(to_device(torch.from_numpy(rows), device) for rows in (lo, hi)))


class AttentionBackend(Protocol):
    """What every backend offers. q [N, Hq, d]; k, v [M, Hkv, d]; Hkv divides Hq; lse [N, Hq] float32 (float64 for float64 inputs).

    ``diagonals`` = [K_1, V_1, K_2, V_2, ...], each [N, Hkv, d]: keys and values that row p alone sees. One such key has
    the score s = scale * q . K, so dK = ds * scale * q and dV = p * dout, summed over the query heads of its KV head.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bounds: KeyBounds, scale: float) -> tuple[Tensor, Tensor]:
        """(out [N, Hq, d], lse [N, Hq])."""
        ...

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bounds: KeyBounds, scale: float,
        dk: Tensor, dv: Tensor,
    ) -> Tensor:  # fmt: skip
        """dq, given the final out and lse of the joint softmax; adds to ``dk`` and ``dv`` (float32 or float64) in place."""
        ...

    def diagonal_forward(self, q: Tensor, out: Tensor, lse: Tensor, diagonals: Sequence[Tensor], scale: float) -> tuple[Tensor, Tensor]:
        """(out, lse) with the diagonals merged in; out in the dtype of q."""
        ...

    def diagonal_backward(
        self, dout: Tensor, q: Tensor, out: Tensor, lse: Tensor, diagonals: Sequence[Tensor], scale: float, dq: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """(``dq`` plus the diagonals' part, [dK_1, dV_1, ...]) given the final out and lse."""
        ...


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type that sums are kept in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge(*parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint key sets, from (out [N, Hq, d], lse [N, Hq]) of each, which may be empty (lse = -inf)."""
    lse = torch.logsumexp(torch.stack([lse for _, lse in parts]), 0)
    finite = torch.where(lse == -torch.inf, 0.0, lse)
    weighted = (out * torch.exp(part_lse - finite).unsqueeze(-1) for out, part_lse in parts)
    return reduce(torch.add, weighted), lse


class ReferenceAttention:
    """Plain PyTorch in float32 or float64, a block of query rows at a time: the yardstick, and the CPU path."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bounds: KeyBounds, scale: float) -> tuple[Tensor, Tensor]:
        """See ``AttentionBackend``; out in the dtype of q."""
        out = torch.zeros_like(q)
        lse = torch.full(q.shape[:2], -torch.inf, dtype=wide(q.dtype), device=q.device)
        for rows, keys in _blocks(q, bounds):
            scores, heads_v = self._scores(q, k, v, bounds, rows, keys, scale)
            block_lse = torch.logsumexp(scores, dim=-1)
            p = torch.exp(scores - torch.where(block_lse == -torch.inf, 0.0, block_lse).unsqueeze(-1))
            out[rows] = _from_kv_heads(p @ heads_v, q.shape[1]).to(q.dtype)
            lse[rows] = _from_kv_heads(block_lse.unsqueeze(-1), q.shape[1]).squeeze(-1)
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bounds: KeyBounds, scale: float,
        dk: Tensor, dv: Tensor,
    ) -> Tensor:  # fmt: skip
        """See ``AttentionBackend``."""
        dtype = wide(q.dtype)
        dq = torch.zeros(q.shape, dtype=dtype, device=q.device)
        delta = (dout.to(dtype) * out.to(dtype)).sum(-1)
        for rows, keys in _blocks(q, bounds):
            scores, heads_v = self._scores(q, k, v, bounds, rows, keys, scale)
            heads_k = k[keys].to(dtype).transpose(0, 1)
            heads_q, heads_dout = (_to_kv_heads(t[rows].to(dtype), k.shape[1]) for t in (q, dout))
            row_lse, row_delta = (_to_kv_heads(t[rows].to(dtype).unsqueeze(-1), k.shape[1]) for t in (lse, delta))
            p = torch.exp(scores - row_lse)
            ds = p * (heads_dout @ heads_v.transpose(1, 2) - row_delta) * scale
            dq[rows] = _from_kv_heads(ds @ heads_k, q.shape[1])
            dk[keys] += (ds.transpose(1, 2) @ heads_q).transpose(0, 1)
            dv[keys] += (p.transpose(1, 2) @ heads_dout).transpose(0, 1)
        return dq.to(q.dtype)

    def diagonal_forward(self, q: Tensor, out: Tensor, lse: Tensor, diagonals: Sequence[Tensor], scale: float) -> tuple[Tensor, Tensor]:
        """See ``AttentionBackend``."""
        for k, v in zip(diagonals[::2], diagonals[1::2], strict=True):
            own = _per_query_head(v, q).to(lse.dtype), _diagonal_score(q, k, scale)
            out, lse = merge((out.to(lse.dtype), lse), own)
        return out.to(q.dtype), lse

    def diagonal_backward(
        self, dout: Tensor, q: Tensor, out: Tensor, lse: Tensor, diagonals: Sequence[Tensor], scale: float, dq: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """See ``AttentionBackend``."""
        dtype, gradients = lse.dtype, []
        wide_q, wide_dout, dq = q.to(dtype), dout.to(dtype), dq.to(dtype)
        delta = (wide_dout * out.to(dtype)).sum(-1)
        for k, v in zip(diagonals[::2], diagonals[1::2], strict=True):
            p = torch.exp(_diagonal_score(q, k, scale) - lse)
            ds = (p * ((wide_dout * _per_query_head(v, q).to(dtype)).sum(-1) - delta) * scale).unsqueeze(-1)
            dq = dq + ds * _per_query_head(k, q).to(dtype)
            gradients.append(_sum_query_heads(ds * wide_q, k.shape[1]).to(k.dtype))
            gradients.append(_sum_query_heads(p.unsqueeze(-1) * wide_dout, v.shape[1]).to(v.dtype))
        return dq.to(q.dtype), gradients

    @staticmethod
    def _scores(q: Tensor, k: Tensor, v: Tensor, bounds: KeyBounds, rows: slice, keys: slice, scale: float) -> tuple[Tensor, Tensor]:
        """Masked scores [Hkv, rows * group, keys] and values [Hkv, keys, d], in the wide type."""
        dtype = wide(q.dtype)
        heads_k, heads_v = (t[keys].to(dtype).transpose(0, 1) for t in (k, v))
        scores = _to_kv_heads(q[rows].to(dtype), k.shape[1]) @ heads_k.transpose(1, 2) * scale
        column = torch.arange(keys.start, keys.stop, device=q.device)
        seen = (column >= bounds.lo_device[rows, None]) & (column < bounds.hi_device[rows, None])
        return scores.masked_fill_(~seen.repeat_interleave(q.shape[1] // k.shape[1], dim=0), -torch.inf), heads_v


def _blocks(q: Tensor, bounds: KeyBounds) -> list[tuple[slice, slice]]:
    """Blocks of query rows, each with the hull of the keys that they see; rows that see nothing make no block of their own."""
    blocks, start = [], 0
    while start < q.shape[0]:
        visible = max(int(bounds.hi[start:].max() - bounds.lo[start:].min()), 1)
        stop = min(start + max(SCORE_BYTES // (4 * q.shape[1] * visible), 16), start + 256, q.shape[0])
        lo, hi = bounds.lo[start:stop], bounds.hi[start:stop]
        some = lo < hi
        if some.any():
            blocks.append((slice(start, stop), slice(int(lo[some].min()), int(hi[some].max()))))
        start = stop
    return blocks


def _to_kv_heads(x: Tensor, kv_heads: int) -> Tensor:
    """[n, Hq, w] -> [Hkv, n * group, w]: the query heads of one KV head side by side."""
    n, heads, width = x.shape
    return x.view(n, kv_heads, heads // kv_heads, width).permute(1, 0, 2, 3).reshape(kv_heads, n * (heads // kv_heads), width)


def _from_kv_heads(x: Tensor, heads: int) -> Tensor:
    """The inverse of ``_to_kv_heads``."""
    kv_heads, rows, width = x.shape
    group = heads // kv_heads
    return x.view(kv_heads, rows // group, group, width).permute(1, 0, 2, 3).reshape(rows // group, heads, width)


def _per_query_head(kv: Tensor, q: Tensor) -> Tensor:
    """[N, Hkv, d] -> [N, Hq, d]."""
    return kv.repeat_interleave(q.shape[1] // kv.shape[1], dim=1)


def _sum_query_heads(x: Tensor, kv_heads: int) -> Tensor:
    """[N, Hq, d] -> [N, Hkv, d]."""
    return x.unflatten(1, (kv_heads, x.shape[1] // kv_heads)).sum(2)


def _diagonal_score(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """scale * q . k of each row and head, [N, Hq], in the wide type."""
    dtype = wide(q.dtype)
    return (q.to(dtype) * _per_query_head(k, q).to(dtype)).sum(-1) * scale
