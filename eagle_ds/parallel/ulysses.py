"""DeepSpeed-Ulysses: all-to-all between sequence-sharded rows and head-sharded rows (arXiv:2309.14509).

DeepSpeed's own ``DistributedAttention`` is not used: it wants equal row counts on every rank and at least as many
KV heads as ranks, and it would send K and V again in every TTT step. Here row counts come from the plan, query and
key rows differ, KV heads are replicated where U does not divide them, and K_0/V_0 travel once per sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from deepspeed import comm as dist
from torch import Tensor

from eagle_ds.parallel.topology import Group
from eagle_ds.parallel.transfer import to_device
from eagle_ds.parallel.words import dense
from eagle_ds.sharding.heads import HeadSharding


class UlyssesExchange:
    """Moves tensors [rows, heads, width] within one Ulysses group.

    ``heads`` says which KV heads each rank gets.
    """

    def __init__(self, group: Group, heads: HeadSharding) -> None:
        assert heads.ulysses == group.size
        self.group = group
        self.heads = heads

    def to_heads(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """[own rows, U*h, w] -> [all rows of the group, h, w]; ``counts`` are the rows of each rank. Collective."""
        u = self.group.size
        if u == 1:
            return rows
        own, heads, width = rows.shape
        sent = dense(dense(rows).view(own, u, heads // u * width).transpose(0, 1))
        received = rows.new_empty(sum(counts), heads // u, width)
        unit = heads // u * width
        self._all_to_all(received, sent, [c * unit for c in counts], [own * unit] * u)
        return received

    def to_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """[all rows of the group, h, w] -> [own rows, U*h, w], the inverse of ``to_heads``. Collective."""
        u = self.group.size
        if u == 1:
            return rows
        _, heads, width = rows.shape
        own, unit = counts[self.group.rank], heads * width
        received = rows.new_empty(u, own, heads, width)
        self._all_to_all(received, dense(rows), [own * unit] * u, [c * unit for c in counts])
        return dense(received.view(u, own, unit).transpose(0, 1)).view(own, u * heads, width)

    def kv_to_slots(self, kv: Tensor, counts: Sequence[int]) -> Tensor:
        """[own rows, Hkv, w] -> [all rows of the group, slots, w]. Collective."""
        if self.heads.replicates:
            kv = kv.index_select(1, self._slot_heads(kv.device))
        return self.to_heads(kv, counts)

    def slots_to_kv(self, slots: Tensor, counts: Sequence[int]) -> Tensor:
        """The transpose of ``kv_to_slots``, for gradients: copies of one KV head are summed. Collective."""
        rows = self.to_rows(slots, counts)
        if not self.heads.replicates:
            return rows
        summed = rows.new_zeros(rows.shape[0], self.heads.kv_heads, rows.shape[2])
        return summed.index_add_(1, self._slot_heads(rows.device), rows)

    def _slot_heads(self, device: torch.device) -> Tensor:
        return to_device(torch.tensor(self.heads.slot_heads), device)

    def _all_to_all(self, received: Tensor, sent: Tensor, received_splits: list[int], sent_splits: list[int]) -> None:
        dist.all_to_all_single(received.view(-1), sent.view(-1), received_splits, sent_splits, group=self.group.handle)
