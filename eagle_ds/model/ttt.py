"""Joint attention of test-time training: the prefix keys that all rows share, and each row's diagonal keys.

Row p of TTT step k attends to the prefix keys K_0[lo..p] and to its diagonal keys K_1[p] .. K_k[p], all
in one softmax.

    prefix attention   attention to K_0/V_0. Other ranks own some of these keys, so K_0/V_0 are exchanged.
    diagonal keys      Only row p reads K_i[p] with i >= 1, so it never leaves the rank that owns row p.
    merge              Both give (out, lse). They are combined by log-sum-exp once the prefix's result is back
                       on the rank that owns the row.

K_0/V_0 are the same at all T steps. They are sent once. Their gradients are summed over the steps in one
float32 buffer, and sent back once. (With rotation the blocks travel at every step; their gradients are summed
over the steps all the same.)

The backward token. The one return of dK_0/dV_0 must run after the backward of all T steps. Autograd knows
only the graph of tensors, and the steps read K_0/V_0 from the `PrefixAttention` object, which is not in the
graph. So `_ShareKeys` returns a zero scalar, the *backward token*, and every step takes it as an input. The
token carries no data; it is an edge in the graph. Autograd runs `_ShareKeys.backward` only when all Functions
that took the token have run theirs, and by then every step has added to the buffer. `model/projections.py`
uses a token in the same way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from eagle_ds.kernels.attention import KeyBounds, ReferenceAttention, merge, wide
from eagle_ds.sharding import ranges as rg

if TYPE_CHECKING:  # parallel/ imports DeepSpeed, which tools that only load a draft do not need
    from eagle_ds.parallel.exchange import SequenceExchange


class PrefixAttention:
    """Attention of this rank's query rows to K_0/V_0 of the whole sequence, for one micro-batch.

    Holds K_0/V_0 of this rank's KV slots as ``kv`` [keys, slots, 2d]: K in the first half of the last
    dimension, V in the second. The keys are all S rows with gather-once, and the ring rank's block with
    rotation. Also holds ``dkv``, the sum of their gradients over the TTT steps.

    Args:
        exchange: communication for this sequence.
        kernel: attention backend.
        head_dim: d.
        sliding_window: W, keys visible to a row including itself; None for all.
        resend_queries: do not keep the head-sharded queries of a step for its backward; exchange them a
            second time.
        device: where key bounds are needed.
    """

    def __init__(
        self, exchange: SequenceExchange, kernel: ReferenceAttention, *, head_dim: int,
        sliding_window: int | None = None, resend_queries: bool = False, device: torch.device | str = "cpu",
    ) -> None:
        self.exchange = exchange
        self.kernel = kernel
        self.scale = head_dim**-0.5
        self.window = sliding_window
        self.resend_queries = resend_queries
        self.device = torch.device(device)
        # First row of the document of each query row: keys of earlier documents in the pack are not visible.
        bounds = exchange.sharding.document_bounds()
        document = np.searchsorted([stop for _, stop in bounds], exchange.query_rows, side="right")
        self.first_row = np.array([start for start, _ in bounds])[document]
        self.kv = torch.empty(0)
        self._dkv: Tensor | None = None
        self._bounds: dict[tuple[int, int], KeyBounds] = {}

    @property
    def dkv(self) -> Tensor:
        """Sum of dK_0/dV_0 over the TTT steps, float32 at least.

        Allocated when the first backward adds to it: by then the loss has freed its memory.
        """
        if self._dkv is None:
            self._dkv = torch.zeros(self.kv.shape, dtype=wide(self.kv.dtype), device=self.kv.device)
        return self._dkv

    def share_keys(self, k0: Tensor, v0: Tensor) -> Tensor:
        """Share K_0 and V_0 [own context rows, Hkv, d] with all ranks, and return the backward token.

        Collective, forward and backward.
        """
        return _ShareKeys.apply(self, k0, v0)

    def attend(self, backward_token: Tensor, step: int, q: Tensor, diagonals: list[Tensor]) -> Tensor:
        """Compute the joint attention of TTT step ``step``. Collective, forward and backward.

        Args:
            backward_token: from ``share_keys``.
            q: [own query rows, Hq, d].
            diagonals: [K_1, V_1, ..., K_step, V_step], each [own query rows, Hkv, d].

        Returns:
            [own query rows, Hq, d].
        """
        return _JointAttention.apply(self, step, backward_token, q, *diagonals)

    def bounds(self, block: int, step: int) -> KeyBounds:
        """Return which keys of ring block ``block`` each query row sees.

        With gather-once there is one block, number 0, and it is the whole sequence.
        """
        key = (block, step if self.window else 0)  # without a window every step sees the same prefix
        if key not in self._bounds:
            rows = self.exchange.query_rows
            lo, hi = self.first_row, rows + 1
            if self.window:  # the query's RoPE position is p + step: keys p + step - W < j <= p are visible
                lo = np.minimum(np.maximum(lo, rows + step - self.window + 1), hi)
            if self.exchange.rotates:  # from sequence rows to rows of the block
                lo, hi = (rg.places_before(limit, self.exchange.ring.blocks[block]) for limit in (lo, hi))
            self._bounds[key] = KeyBounds.make(lo, hi, self.device)
        return self._bounds[key]

    def forward(self, q_local: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Attend to the prefix alone. Collective.

        Returns out [own rows, Hq, d], lse [own rows, Hq], and q head-sharded [ring rank's rows, Hq / U, d].
        """
        q = self.exchange.queries_to_heads(q_local)
        rotates = self.exchange.rotates
        out, lse = self._rotate_forward(q, step) if rotates else self._block_forward(q, self.kv, 0, step)
        out = self.exchange.heads_to_queries(out.to(q.dtype))
        lse = self.exchange.heads_to_queries(lse.unsqueeze(-1)).squeeze(-1)
        return out, lse, q

    def backward(
        self, dout_local: Tensor, q: Tensor, out_local: Tensor, lse_local: Tensor, step: int
    ) -> Tensor:
        """Return dq [own rows, Hq, d] from the prefix keys, and add dK_0 and dV_0 to ``dkv``. Collective.

        ``out`` and ``lse`` are the final ones, after the merge with the diagonals: see kernels/attention.py.
        """
        dout, out = (self.exchange.queries_to_heads(x) for x in (dout_local, out_local))
        lse = self.exchange.queries_to_heads(lse_local.unsqueeze(-1)).squeeze(-1)
        if self.exchange.rotates:
            dq = self._rotate_backward(dout, q, out, lse, step).to(q.dtype)
        else:
            dq = self._block_backward(dout, q, self.kv, out, lse, self.bounds(0, step), self.dkv)
        return self.exchange.heads_to_queries(dq)

    def _block_forward(self, q: Tensor, kv: Tensor, block: int, step: int) -> tuple[Tensor, Tensor]:
        k, v = kv.chunk(2, dim=-1)
        return self.kernel.forward(q, k, v, self.bounds(block, step), self.scale)

    def _block_backward(
        self, dout: Tensor, q: Tensor, kv: Tensor, out: Tensor, lse: Tensor, bounds: KeyBounds, dkv: Tensor
    ) -> Tensor:
        """Return dq, and add dK_0 and dV_0 of the block to ``dkv``."""
        k, v = kv.chunk(2, dim=-1)
        return self.kernel.backward(dout, q, k, v, out, lse, bounds, self.scale, *dkv.chunk(2, dim=-1))

    def _rotate_forward(self, q: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Attend to every block of the ring in turn, while the next block arrives."""
        ring, kv = self.exchange.ring, self.kv
        size = ring.group.size
        out = lse = None
        for i in range(size):
            # Blocks move to the next rank, so at hop i this rank holds that of the rank i places earlier.
            block = (ring.group.rank - i) % size
            arriving = ring.rotate(kv, ring.counts[block - 1]) if i + 1 < size else None
            block_out, block_lse = self._block_forward(q, kv, block, step)
            if out is None:
                out, lse = block_out.to(block_lse.dtype), block_lse
            else:
                out, lse = merge((out, lse), (block_out, block_lse))
            kv = arriving.wait() if arriving else kv
        return out, lse

    def _rotate_backward(self, dout: Tensor, q: Tensor, out: Tensor, lse: Tensor, step: int) -> Tensor:
        """Return dq, and add dK_0/dV_0 of this rank's own block, summed over the ring's ranks, to ``dkv``.

        A block's gradient follows the block one hop later. Its last hop brings it to the block's owner.
        """
        ring, kv = self.exchange.ring, self.kv
        following = None
        size = ring.group.size
        dq = torch.zeros(q.shape, dtype=wide(q.dtype), device=q.device)
        for i in range(size):
            block = (ring.group.rank - i) % size
            arriving = ring.rotate(kv, ring.counts[block - 1]) if i + 1 < size else None
            dkv = torch.zeros(kv.shape, dtype=self.dkv.dtype, device=kv.device)
            dq += self._block_backward(dout, q, kv, out, lse, self.bounds(block, step), dkv)
            if following:  # what earlier ranks computed for the same block
                dkv += following.wait()
            following = ring.rotate(dkv, ring.counts[block - 1])
            kv = arriving.wait() if arriving else kv
        self.dkv.add_(following.wait())
        return dq


class _ShareKeys(torch.autograd.Function):
    """Forward: send K_0/V_0 to all ranks. Backward: return the sum of dK_0/dV_0 to the rows' owners."""

    @staticmethod
    def forward(ctx: Any, prefix: PrefixAttention, k0: Tensor, v0: Tensor) -> Tensor:
        prefix.kv = prefix.exchange.share_keys(torch.cat([k0, v0], dim=-1))
        ctx.prefix, ctx.dtype = prefix, k0.dtype
        return torch.zeros((), dtype=k0.dtype, device=k0.device)  # the backward token

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[None, Tensor, Tensor]:
        prefix: PrefixAttention = ctx.prefix
        dkv = prefix.exchange.return_gradients(prefix.dkv).to(ctx.dtype)
        prefix.kv, prefix._dkv = torch.empty(0), None  # free both: this was the last reader
        dk, dv = dkv.chunk(2, dim=-1)
        return None, dk, dv


class _JointAttention(torch.autograd.Function):
    """Prefix and diagonal keys in one softmax; kernels/attention.py derives the backward."""

    @staticmethod
    def forward(
        ctx: Any, prefix: PrefixAttention, step: int, backward_token: Tensor, q: Tensor, *diagonals: Tensor
    ) -> Tensor:
        out, lse, q_heads = prefix.forward(q, step)
        out, lse = prefix.kernel.diagonal_forward(q, out, lse, diagonals, prefix.scale)
        ctx.save_for_backward(q, None if prefix.resend_queries else q_heads, out, lse, *diagonals)
        ctx.prefix, ctx.step = prefix, step
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, q_heads, out, lse, *diagonals = ctx.saved_tensors
        prefix: PrefixAttention = ctx.prefix
        dout = dout.contiguous()
        q_heads = prefix.exchange.queries_to_heads(q) if q_heads is None else q_heads
        # The ranks exchange tensors here. dK_0/dV_0 are added to the buffer, so only dq and the gradients of
        # the diagonals are returned.
        dq = prefix.backward(dout, q_heads, out, lse, ctx.step)
        dq, gradients = prefix.kernel.diagonal_backward(dout, q, out, lse, diagonals, prefix.scale, dq)
        return None, None, dq.new_zeros(()), dq, *gradients
