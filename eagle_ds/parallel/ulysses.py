"""DeepSpeed-Ulysses (arXiv:2309.14509): an all-to-all between sequence-sharded rows and head-sharded rows.

Before, each rank has all heads of its own rows. After, it has its own heads of all rows of the group. With U
= 2:

             heads 0,1  heads 2,3                           heads 0,1      heads 2,3
    rank 0       a          b                 rank 0's rows     a              b
    rank 1       c          d                 rank 1's rows     c              d
                                                              rank 0         rank 1

Here rank 0 sends b to rank 1, and rank 1 sends c to rank 0.

DeepSpeed's own ``DistributedAttention`` does not fit: it needs equal row counts on every rank and at least as
many KV heads as ranks, and it would send K and V again at every TTT step. Here row counts come from the
sharding, query rows and context rows differ, KV heads are replicated where U does not divide them, and
K_0/V_0 are sent once for each sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from deepspeed import comm as dist
from torch import Tensor

from eagle_ds.parallel.copies import dense, to_device
from eagle_ds.parallel.topology import Group
from eagle_ds.sharding.heads import HeadSharding


class UlyssesExchange:
    """Move tensors [rows, heads, width] within one Ulysses group.

    ``counts`` is the number of rows of each rank of the group, in order. Every method is collective and costs
    nothing in a group of one.
    """

    def __init__(self, group: Group, heads: HeadSharding) -> None:
        assert heads.ulysses == group.size
        self.group = group
        self.heads = heads

    def to_heads(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Exchange [own rows, U*h, w] -> [all rows of the group, h, w]."""
        u = self.group.size
        if u == 1:
            return rows
        own, heads, width = rows.shape
        unit = heads // u * width
        # [own rows, U, h*w] -> [U, own rows, h*w]: the piece for each rank must be contiguous.
        sent = dense(dense(rows).view(own, u, unit).transpose(0, 1))
        received = rows.new_empty(sum(counts), heads // u, width)
        self._all_to_all(received, sent, [c * unit for c in counts], [own * unit] * u)
        return received

    def to_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Exchange [all rows of the group, h, w] -> [own rows, U*h, w], the inverse of ``to_heads``."""
        u = self.group.size
        if u == 1:
            return rows
        _, heads, width = rows.shape
        own, unit = counts[self.group.rank], heads * width
        received = rows.new_empty(u, own, heads, width)
        self._all_to_all(received, dense(rows), [own * unit] * u, [c * unit for c in counts])
        # What rank r sent, received[r], holds the heads of r. Put the heads of one row next to each other.
        return dense(received.view(u, own, unit).transpose(0, 1)).view(own, u * heads, width)

    def kv_to_slots(self, kv: Tensor, counts: Sequence[int]) -> Tensor:
        """Exchange [own rows, Hkv, w] -> [all rows of the group, slots, w]; copies KV heads as needed."""
        if self.heads.replicates:
            kv = kv.index_select(1, self._slot_heads(kv.device))
        return self.to_heads(kv, counts)

    def slots_to_kv(self, slots: Tensor, counts: Sequence[int]) -> Tensor:
        """Send gradients back, and sum those of copies of a KV head: the transpose of ``kv_to_slots``."""
        rows = self.to_rows(slots, counts)
        if not self.heads.replicates:
            return rows
        summed = rows.new_zeros(rows.shape[0], self.heads.kv_heads, rows.shape[2])
        return summed.index_add_(1, self._slot_heads(rows.device), rows)

    def _slot_heads(self, device: torch.device) -> Tensor:
        return to_device(torch.tensor(self.heads.slot_heads), device)

    def _all_to_all(self, received: Tensor, sent: Tensor, *splits: list[int]) -> None:
        """``splits``: how many numbers are received from each rank, and how many are sent to each."""
        dist.all_to_all_single(received.view(-1), sent.view(-1), *splits, group=self.group.handle)
