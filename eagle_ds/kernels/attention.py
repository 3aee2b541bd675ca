"""Attention in which each query row sees one interval of keys: interface, plain reference and merge.

Query row i attends to the keys lo[i] <= j < hi[i] of a key buffer. This form covers a causal mask, packed
documents, sliding windows, a subset of rows, and the blocks of a ring. An empty interval gives out = 0 and
lse = -inf.

Attention to a union of disjoint key sets (blocks of the prefix, a row's own diagonal keys) is computed for
each set and merged. With (out_a, lse_a) and (out_b, lse_b):

    lse = log(exp(lse_a) + exp(lse_b))        out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b

The backward of any one set takes the FINAL out and lse, after all merges. Write s_ij = scale q_i.k_j, and
p_ij = exp(s_ij - lse_i) for the probability of key j in the joint softmax, so out_i = sum_j p_ij v_j. Then

    dv_j  = sum_i p_ij dout_i
    ds_ij = p_ij (dout_i . v_j - sum_l p_il dout_i . v_l)
          = p_ij (dout_i . v_j - delta_i)     delta_i = dout_i . out_i
    dq_i  = scale sum_j ds_ij k_j             dk_j  = scale sum_i ds_ij q_i

delta_i depends on the final out only, so the formulae hold for the keys of every set. Each set's backward is
independent of the others, their gradients add up, and no gradient flows through lse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eagle_ds.parallel.copies import to_device

SCORE_BYTES = 64 << 20  # the reference computes about this many bytes of scores at a time


@dataclass(frozen=True)
class KeyBounds:
    """Visible keys [lo, hi) of each query row: int64 [N] on the host, and copies on the tensors' device."""

    lo: np.ndarray
    hi: np.ndarray
    lo_device: Tensor
    hi_device: Tensor
    # What backends have computed from these bounds, by a key of their own.
    memo: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def causal_runs(self) -> list[tuple[int, int]]:
        """Maximal runs [start, stop) of rows with the same first key, each row seeing one key more."""
        sees = self.hi > self.lo
        grows = (np.diff(self.lo) == 0) & (np.diff(self.hi) == 1) & (sees[1:] == sees[:-1])
        # grows[i] compares rows i and i + 1. So a run begins where it turns true, and ends with the row where
        # it turns false.
        edges = np.flatnonzero(np.diff(np.concatenate([[False], grows, [False]])))
        starts, lasts = edges[::2].tolist(), edges[1::2].tolist()
        return [(start, last + 1) for start, last in zip(starts, lasts, strict=True)]

    def rows(self, start: int, stop: int) -> KeyBounds:
        """Return the bounds of the rows [start, stop)."""
        return KeyBounds(*(x[start:stop] for x in (self.lo, self.hi, self.lo_device, self.hi_device)))

    @classmethod
    def make(cls, lo: np.ndarray, hi: np.ndarray, device: torch.device) -> KeyBounds:
        """Return bounds with copies on ``device``; the host does not wait for the copies."""
        return cls(lo, hi, *(to_device(torch.from_numpy(rows), device) for rows in (lo, hi)))


OutAndLse = tuple[Tensor, Tensor]
"""(out [N, Hq, d], lse [N, Hq]): attention of N rows to some keys, and the log-sum-exp of the scores."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge(*sets: OutAndLse) -> OutAndLse:
    """Return (out, lse) of attention to the union of disjoint key sets, from (out, lse) of each."""
    lse = torch.logsumexp(torch.stack([lse for _, lse in sets]), 0)
    # A row without keys in any set has lse = -inf. Subtract 0 instead, as -inf - (-inf) is NaN.
    finite = torch.where(lse == -torch.inf, 0.0, lse)
    weighted = (out * torch.exp(own_lse - finite).unsqueeze(-1) for out, own_lse in sets)
    return reduce(torch.add, weighted), lse


class ReferenceAttention:
    """Attention in plain PyTorch, in float32 or float64: the reference, the CPU path, and the interface.

    The backends for a GPU derive from this class and override all public methods.

    Shapes: q [N, Hq, d]; k and v [M, Hkv, d], where Hkv divides Hq; out [N, Hq, d]; lse [N, Hq] in float32,
    or in float64 for float64 inputs. ``scale`` multiplies q.k. ``diagonals`` are [K_1, V_1, K_2, V_2, ...],
    each [N, Hkv, d]: keys and values that row p alone sees. For such a key dK = ds * scale * q and dV = p *
    dout, summed over the query heads of its KV head.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bounds: KeyBounds, scale: float) -> OutAndLse:
        """Return (out, lse) of attention to k and v."""
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
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bounds: KeyBounds,
        scale: float, dk: Tensor, dv: Tensor,
    ) -> Tensor:  # fmt: skip
        """Return dq, and add to ``dk`` and ``dv`` (float32 or float64), given the final out and lse."""
        dtype = wide(q.dtype)
        dq = torch.zeros(q.shape, dtype=dtype, device=q.device)
        delta = (dout.to(dtype) * out.to(dtype)).sum(-1)
        for rows, keys in _blocks(q, bounds):
            scores, heads_v = self._scores(q, k, v, bounds, rows, keys, scale)
            heads_k = k[keys].to(dtype).transpose(0, 1)
            heads_q, heads_dout = (_to_kv_heads(t[rows].to(dtype), k.shape[1]) for t in (q, dout))
            columns = (t[rows].to(dtype).unsqueeze(-1) for t in (lse, delta))
            row_lse, row_delta = (_to_kv_heads(column, k.shape[1]) for column in columns)
            p = torch.exp(scores - row_lse)
            ds = p * (heads_dout @ heads_v.transpose(1, 2) - row_delta) * scale
            dq[rows] = _from_kv_heads(ds @ heads_k, q.shape[1])
            dk[keys] += (ds.transpose(1, 2) @ heads_q).transpose(0, 1)
            dv[keys] += (p.transpose(1, 2) @ heads_dout).transpose(0, 1)
        return dq.to(q.dtype)

    def diagonal_forward(
        self, q: Tensor, out: Tensor, lse: Tensor, diagonals: Sequence[Tensor], scale: float
    ) -> OutAndLse:
        """Return (out in q's dtype, lse) with the diagonals merged into the given ones."""
        for k, v in zip(diagonals[::2], diagonals[1::2], strict=True):
            own = _per_query_head(v, q).to(lse.dtype), _diagonal_score(q, k, scale)
            out, lse = merge((out.to(lse.dtype), lse), own)
        return out.to(q.dtype), lse

    def diagonal_backward(
        self, dout: Tensor, q: Tensor, out: Tensor, lse: Tensor, diagonals: Sequence[Tensor], scale: float,
        dq: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
        """Return (dq plus that of the diagonals, [dK_1, dV_1, ...]), given the final out and lse."""
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
    def _scores(
        q: Tensor, k: Tensor, v: Tensor, bounds: KeyBounds, rows: slice, keys: slice, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Return masked scores [Hkv, rows * group, keys] and values [Hkv, keys, d], group = Hq / Hkv."""
        dtype = wide(q.dtype)
        heads_k, heads_v = (t[keys].to(dtype).transpose(0, 1) for t in (k, v))
        scores = _to_kv_heads(q[rows].to(dtype), k.shape[1]) @ heads_k.transpose(1, 2) * scale
        column = torch.arange(keys.start, keys.stop, device=q.device)
        seen = (column >= bounds.lo_device[rows, None]) & (column < bounds.hi_device[rows, None])
        # The scores' rows are (row, head of the group), so each row's mask is repeated for its heads.
        unseen = ~seen.repeat_interleave(q.shape[1] // k.shape[1], dim=0)
        return scores.masked_fill_(unseen, -torch.inf), heads_v


def _blocks(q: Tensor, bounds: KeyBounds) -> list[tuple[slice, slice]]:
    """Divide the query rows into blocks whose scores need about SCORE_BYTES each.

    Returns (rows, keys) of each block; ``keys`` is the smallest range that contains all keys that its rows
    see. Blocks that see no key are left out.
    """
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
    """Collect the query heads of each KV head: [n, Hq, w] -> [Hkv, n * group, w]."""
    return x.unflatten(1, (kv_heads, -1)).transpose(0, 1).flatten(1, 2)


def _from_kv_heads(x: Tensor, heads: int) -> Tensor:
    """Invert ``_to_kv_heads``: [Hkv, n * group, w] -> [n, Hq, w]."""
    return x.unflatten(1, (-1, heads // len(x))).transpose(0, 1).flatten(1, 2)


def _per_query_head(kv: Tensor, q: Tensor) -> Tensor:
    """Repeat each KV head for its query heads: [N, Hkv, d] -> [N, Hq, d]."""
    return kv.repeat_interleave(q.shape[1] // kv.shape[1], dim=1)


def _sum_query_heads(x: Tensor, kv_heads: int) -> Tensor:
    """Sum over the query heads of each KV head: [N, Hq, d] -> [N, Hkv, d]."""
    return x.unflatten(1, (kv_heads, -1)).sum(2)


def _diagonal_score(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Return scale * q . k of each row and query head, [N, Hq]."""
    dtype = wide(q.dtype)
    return (q.to(dtype) * _per_query_head(k, q).to(dtype)).sum(-1) * scale
