"""Joint attention of EAGLE-3's test-time training: a shared prefix block plus each row's own diagonal keys.

Row p of step k attends, in one softmax, to K_0[lo..p] and to K_1[p] .. K_k[p]. Only K_0/V_0 are needed by other
rows, so only they travel; a diagonal key is read by its own row alone and is merged after attention has come back
to the sequence-sharded layout. dK_0/dV_0 of all steps gather in one float32 buffer and go home once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from eagle_ds.kernels.attention import BlockAttention, KeyBounds, merge, wide
from eagle_ds.sharding import ranges as rg
from eagle_ds.sharding.heads import HeadSharding
from eagle_ds.sharding.sequence import SequenceSharding

if TYPE_CHECKING:
    from eagle_ds.parallel.topology import ProcessGroups


class PrefixAttention:
    """Attention of this rank's query rows to K_0/V_0 of the whole sequence, for one micro-batch, under any U x R.

    Holds K_0/V_0 of this rank's head slots (all rows in ``gather`` mode, the ring rank's block in ``p2p`` mode) and the
    gradients that the steps add up. Methods marked collective are called by all ranks of the sequence-parallel group.

    ``resend_queries``: a step's head-sharded queries are not kept for its backward, which exchanges them again.
    """

    def __init__(
        self,
        sharding: SequenceSharding,
        groups: ProcessGroups,
        kernel: BlockAttention,
        *,
        query_heads: int,
        kv_heads: int,
        head_dim: int,
        sliding_window: int | None = None,
        resend_queries: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        from eagle_ds.parallel.ring import RingExchange  # these import DeepSpeed, which tools that only load a draft do without
        from eagle_ds.parallel.ulysses import UlyssesExchange

        self.sharding = sharding
        self.kernel = kernel
        self.ulysses = UlyssesExchange(groups.ulysses, HeadSharding(query_heads, kv_heads, sharding.ulysses))
        self.ring = RingExchange(groups.ring, [sharding.ring_context(r) for r in range(sharding.ring)])
        self.scale = head_dim**-0.5
        self.window = sliding_window
        self.resend_queries = resend_queries
        self.device = torch.device(device)
        self.rotates = sharding.ring > 1 and sharding.ring_mode == "p2p"
        own = slice(groups.ring.rank * sharding.ulysses, (groups.ring.rank + 1) * sharding.ulysses)
        self.context_counts = [rg.count(r) for r in sharding.context[own]]
        self.query_counts = [rg.count(r) for r in sharding.queries[own]]
        self.query_rows = rg.rows(sharding.ring_queries(groups.ring.rank))
        bounds = sharding.document_bounds()
        self.first_row = np.array([a for a, _ in bounds])[np.searchsorted([b for _, b in bounds], self.query_rows, side="right")]
        self.kv = torch.empty(0)
        self._dkv: Tensor | None = None
        self._bounds: dict[tuple[int, int], KeyBounds] = {}

    @property
    def dkv(self) -> Tensor:
        """The sum of the steps' dK_0 and dV_0, float32 at least: made when the first backward adds to it, after the loss."""
        if self._dkv is None:
            self._dkv = torch.zeros(self.kv.shape, dtype=wide(self.kv.dtype), device=self.kv.device)
        return self._dkv

    def exchange(self, k0: Tensor, v0: Tensor) -> Tensor:
        """Share K_0, V_0 [own context rows, Hkv, d] with all ranks. Returns a scalar that ties the steps to this call
        in the autograd graph: pass it to ``attend``. Collective, forward and backward."""
        return _Exchange.apply(self, k0, v0)

    def attend(self, anchor: Tensor, step: int, q: Tensor, diagonals: list[Tensor]) -> Tensor:
        """Attention output [own query rows, Hq, d] of TTT step ``step``; ``diagonals`` = [K_1, V_1, ..., K_step, V_step],
        each [own query rows, Hkv, d]. Collective, forward and backward."""
        return _JointAttention.apply(self, step, anchor, q, *diagonals)

    def bounds(self, block: int, step: int) -> KeyBounds:
        """Keys of ring block ``block`` (of the whole sequence, in gather mode) that each query row sees at ``step``."""
        key = (block, step if self.window else 0)
        if key not in self._bounds:
            lo, hi = self.first_row, self.query_rows + 1
            if self.window:
                lo = np.minimum(np.maximum(lo, self.query_rows + step - self.window + 1), hi)
            if self.rotates:
                lo, hi = (rg.rank_of(rows, self.ring.blocks[block]) for rows in (lo, hi))
            self._bounds[key] = KeyBounds.make(lo, hi, self.device)
        return self._bounds[key]

    def forward(self, q_local: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """(out [own rows, Hq, d], lse [own rows, Hq], q head-sharded) over the prefix alone. Collective."""
        q = self.head_sharded(q_local)
        out, lse = self._rotate_forward(q, step) if self.rotates else self._block_forward(q, self.kv, 0, step)
        out = self.ulysses.to_rows(out.to(q.dtype), self.query_counts)
        lse = self.ulysses.to_rows(lse.unsqueeze(-1), self.query_counts).squeeze(-1)
        return out, lse, q

    def head_sharded(self, rows: Tensor) -> Tensor:
        """[own rows, Hq, w] -> [rows of the Ulysses group, Hq / U, w]. Collective."""
        return self.ulysses.to_heads(rows, self.query_counts)

    def backward(self, dout_local: Tensor, q: Tensor, out_local: Tensor, lse_local: Tensor, step: int) -> Tensor:
        """dq [own rows, Hq, d] from the prefix keys; dK_0 and dV_0 are added to the buffer. ``out`` and ``lse`` are the
        final ones, after the merge with the diagonals. Collective."""
        dout, out = (self.head_sharded(x) for x in (dout_local, out_local))
        lse = self.head_sharded(lse_local.unsqueeze(-1)).squeeze(-1)
        if self.rotates:
            dq = self._rotate_backward(dout, q, out, lse, step).to(q.dtype)
        else:
            dq = self._block_backward(dout, q, self.kv, out, lse, 0, step, self.dkv)
        return self.ulysses.to_rows(dq, self.query_counts)

    def _block_forward(self, q: Tensor, kv: Tensor, block: int, step: int) -> tuple[Tensor, Tensor]:
        k, v = kv.chunk(2, dim=-1)
        return self.kernel.forward(q, k, v, self.bounds(block, step), self.scale)

    def _block_backward(self, dout: Tensor, q: Tensor, kv: Tensor, out: Tensor, lse: Tensor, block: int, step: int, dkv: Tensor) -> Tensor:
        """dq; dK_0 and dV_0 of the block are added to ``dkv``."""
        k, v = kv.chunk(2, dim=-1)
        return self.kernel.backward(dout, q, k, v, out, lse, self.bounds(block, step), self.scale, *dkv.chunk(2, dim=-1))

    def _rotate_forward(self, q: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Every block of the ring passes by; the next one travels while this one is attended to."""
        size, kv = self.sharding.ring, self.kv
        out = lse = None
        for i in range(size):
            block = (self.ring.group.rank - i) % size
            coming = self.ring.rotate(kv, self.ring.counts[block - 1]) if i + 1 < size else None
            block_out, block_lse = self._block_forward(q, kv, block, step)
            out, lse = (block_out.to(block_lse.dtype), block_lse) if out is None else merge((out, lse), (block_out, block_lse))
            kv = coming.wait() if coming else kv
        return out, lse

    def _rotate_backward(self, dout: Tensor, q: Tensor, out: Tensor, lse: Tensor, step: int) -> Tensor:
        """As forward; a block's gradient follows it one hop behind, and the last hop brings it home."""
        size, kv, following = self.sharding.ring, self.kv, None
        dq = torch.zeros(q.shape, dtype=wide(q.dtype), device=q.device)
        for i in range(size):
            block = (self.ring.group.rank - i) % size
            coming = self.ring.rotate(kv, self.ring.counts[block - 1]) if i + 1 < size else None
            dkv = torch.zeros(kv.shape, dtype=self.dkv.dtype, device=kv.device)
            dq += self._block_backward(dout, q, kv, out, lse, block, step, dkv)
            if following:
                dkv += following.wait()
            following = self.ring.rotate(dkv, self.ring.counts[block - 1])
            kv = coming.wait() if coming else kv
        self.dkv.add_(following.wait())
        return dq


class _Exchange(torch.autograd.Function):
    """K_0/V_0 out in forward, the summed dK_0/dV_0 back in backward, which autograd runs after every step's."""

    @staticmethod
    def forward(ctx: Any, prefix: PrefixAttention, k0: Tensor, v0: Tensor) -> Tensor:
        kv = prefix.ulysses.kv_to_slots(torch.cat([k0, v0], dim=-1), prefix.context_counts)
        prefix.kv = kv if prefix.rotates else prefix.ring.gather(kv)
        ctx.prefix, ctx.dtype = prefix, k0.dtype
        return torch.zeros((), dtype=k0.dtype, device=k0.device)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[None, Tensor, Tensor]:
        prefix: PrefixAttention = ctx.prefix
        dkv = prefix.dkv if prefix.rotates else prefix.ring.scatter_sum(prefix.dkv)
        dkv = prefix.ulysses.slots_to_kv(dkv, prefix.context_counts).to(ctx.dtype)
        prefix.kv, prefix._dkv = torch.empty(0), None
        dk, dv = dkv.chunk(2, dim=-1)
        return None, dk, dv


class _JointAttention(torch.autograd.Function):
    """Prefix and diagonals in one softmax; the derivation of the backward stands at the top of ``attention.py``."""

    @staticmethod
    def forward(ctx: Any, prefix: PrefixAttention, step: int, anchor: Tensor, q: Tensor, *diagonals: Tensor) -> Tensor:
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
        q_heads = prefix.head_sharded(q) if q_heads is None else q_heads
        dq = prefix.backward(dout, q_heads, out, lse, ctx.step)
        dq, gradients = prefix.kernel.diagonal_backward(dout, q, out, lse, diagonals, prefix.scale, dq)
        return None, None, dq.new_zeros(()), dq, *gradients
