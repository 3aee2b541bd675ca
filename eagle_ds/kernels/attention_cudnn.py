"""Attention with cuDNN for large rectangles and causal squares, with Triton for other keys and diagonals.

cuDNN is called through aten, whose ops return and accept lse. attention_partition.py decides which rows and
keys go to which kernel. The results of several kernels for one row are merged by log-sum-exp; in the backward
each kernel gets the final out and lse, so their gradients just add up (attention.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from eagle_ds.kernels.attention import KeyBounds, OutAndLse
from eagle_ds.kernels.attention_partition import BACKWARD, FORWARD, Partition, RowGroup, uncovered_bounds
from eagle_ds.kernels.attention_triton import HOPPER, TritonBackend
from eagle_ds.kernels.sums_triton import add_into, merge_into
from eagle_ds.parallel.copies import copy_rows

# With at most this many rectangles in a group, partial results are summed in half precision. Each sum is then
# rounded, but no pass over float32 copies is needed.
FEW_RECTANGLES = 2


class CudnnBackend(TritonBackend):
    """Attention in half precision with d <= 128, on GPUs of compute capability 9.0 or newer."""

    def __init__(
        self, head_dim: int = 128, programs: int = HOPPER, forward_partition: Partition = FORWARD,
        backward_partition: Partition = BACKWARD,
    ) -> None:  # fmt: skip
        super().__init__(head_dim, programs)
        self.forward_partition, self.backward_partition = forward_partition, backward_partition

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bounds: KeyBounds, scale: float) -> OutAndLse:
        """See ``ReferenceAttention``."""
        groups = self.forward_partition.for_heads(q.shape[1]).groups(bounds)
        done = [self._group_forward(q[g.start : g.stop], k, v, bounds, g, scale) for g in groups]
        return _concatenate([out for out, _ in done]), _concatenate([lse for _, lse in done])

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bounds: KeyBounds,
        scale: float, dk: Tensor, dv: Tensor,
    ) -> Tensor:  # fmt: skip
        """See ``ReferenceAttention``."""
        done = []
        for group in self.backward_partition.for_heads(q.shape[1]).groups(bounds):
            own = [x[group.start : group.stop] for x in (dout, q, out, lse)]
            done.append(self._group_backward(*own, k, v, bounds, group, scale, dk, dv))
        return _concatenate(done)

    def _group_forward(
        self, q: Tensor, k: Tensor, v: Tensor, bounds: KeyBounds, group: RowGroup, scale: float
    ) -> OutAndLse:
        """Return (out, lse) of the group's rows q."""
        if group.square is None:
            out, lse = super().forward(q, k, v, uncovered_bounds(bounds, group), scale)
        else:
            q = _pad(q, group.size + group.padding)
            # The square's keys may end before the padded rows do: pad them too. Causality hides the padding
            # from real rows, and results of padded rows are dropped.
            keys = slice(group.square, group.square + len(q))
            out, lse = _cudnn_forward(q, *(_pad(x[keys], len(q)) for x in (k, v)), True, scale)
        out = out.to(_sum_dtype(group, q))
        for r in group.rectangles:
            rows, keys = slice(r.start, r.stop), slice(r.first_key, r.last_key)
            merge_into(out[rows], lse[rows], *_cudnn_forward(q[rows], k[keys], v[keys], False, scale))
        return out[: group.size].to(q.dtype), lse[: group.size]

    def _group_backward(
        self, dout: Tensor, q: Tensor, out: Tensor, lse: Tensor, k: Tensor, v: Tensor, bounds: KeyBounds,
        group: RowGroup, scale: float, dk: Tensor, dv: Tensor,
    ) -> Tensor:  # fmt: skip
        """Return dq of the group's rows, and add to dk and dv."""
        if group.square is None:
            own = uncovered_bounds(bounds, group)
            dq = super().backward(dout, q, k, v, out, lse, own, scale, dk, dv)
        else:
            dout, q, out = (_pad(x, group.size + group.padding) for x in (dout, q, out))
            lse = _pad(lse, len(q), torch.inf)  # p = exp(s - inf) = 0: padded rows add nothing to dk and dv
            keys = slice(group.square, group.square + len(q))
            own_kv = (_pad(x[keys], len(q)) for x in (k, v))  # a generator: the call frees the copies
            dq, *gradients = _cudnn_backward(dout, q, *own_kv, out, lse, True, scale)
            add_into(dk[keys], dv[keys], *(g[: len(dk[keys])] for g in gradients))
        dq = dq.to(_sum_dtype(group, q))
        for r in group.rectangles:
            rows, keys = slice(r.start, r.stop), slice(r.first_key, r.last_key)
            inputs = dout[rows], q[rows], k[keys], v[keys], out[rows], lse[rows]
            part, *gradients = _cudnn_backward(*inputs, False, scale)
            add_into(dk[keys], dv[keys], *gradients)
            dq[rows] += part
        return dq[: group.size].to(q.dtype)


def _pad(x: Tensor, rows: int, value: float = 0.0) -> Tensor:
    """Append rows of ``value``: [n, ...] -> [rows, ...]."""
    return x if len(x) == rows else _concatenate([x, x.new_full((rows - len(x), *x.shape[1:]), value)])


def _concatenate(parts: list[Tensor]) -> Tensor:
    """Concatenate rows. Unlike ``torch.cat``, copies in 8-byte words if heads come first in memory."""
    if len(parts) == 1:
        return parts[0]
    joined = parts[0].new_empty(sum(map(len, parts)), *parts[0].shape[1:])
    for to, part in zip(joined.split([len(part) for part in parts]), parts, strict=True):
        copy_rows(to, part)
    return joined


def _sum_dtype(group: RowGroup, q: Tensor) -> torch.dtype:
    """Return the dtype of the sum of partial results: float32 if there are many, as each sum is rounded."""
    return torch.float32 if len(group.rectangles) > FEW_RECTANGLES else q.dtype


def _heads_first(x: Tensor) -> Tensor:
    """View [rows, heads, d] as [1, heads, rows, d]; cuDNN accepts any strides."""
    return x.transpose(0, 1).unsqueeze(0)


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> OutAndLse:
    """Return (out, lse); both are views with heads first in memory."""
    # Arguments after the tensors: no bias, with lse, no dropout, causal or not, no debug mask.
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        _heads_first(q), _heads_first(k), _heads_first(v), None, True, 0.0, causal, False, scale=scale
    )
    return out.squeeze(0).transpose(0, 1), lse.reshape(q.shape[1], q.shape[0]).t()


def _cudnn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv) for the final out and lse, in half precision, heads first in memory."""
    # Without dropout the random seed and offset are not read. lse must be dense [1, Hq, N, 1].
    seed = torch.zeros((), dtype=torch.int64, device=q.device)
    heads_first = (_heads_first(x) for x in (dout, q, k, v, out))
    lse = lse.t().contiguous().view(1, q.shape[1], q.shape[0], 1)
    grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *heads_first, lse, seed, seed, None, None, None, q.shape[0], k.shape[0], 0.0, causal, scale=scale
    )
    return tuple(g.squeeze(0).transpose(0, 1) for g in grads)
