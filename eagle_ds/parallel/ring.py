"""The ring extension: gather-once, or rotation by overlapped point-to-point sends (Ring Attention, arXiv:2310.01889)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import comm as dist
from torch import Tensor

from eagle_ds.parallel.topology import Group
from eagle_ds.sharding import ranges as rg
from eagle_ds.sharding.ranges import Ranges


@dataclass
class Transfer:
    """A rotation under way; ``wait`` returns what arrives. Holds the sent tensor alive until then."""

    received: Tensor
    sent: Tensor
    works: list[Any]

    def wait(self) -> Tensor:
        """Block (the stream, for NCCL) until the rotation is done."""
        for work in self.works:
            work.wait()
        return self.received


class RingExchange:
    """Moves blocks of rows between ring ranks; ``blocks[r]`` are the sequence rows that ring rank r owns."""

    def __init__(self, group: Group, blocks: Sequence[Ranges]) -> None:
        assert len(blocks) == group.size
        self.group = group
        self.blocks = tuple(blocks)
        self.counts = [rg.count(block) for block in blocks]

    def rotate(self, block: Tensor, arriving_rows: int) -> Transfer:
        """Start sending ``block`` to the next rank and receiving ``arriving_rows`` rows from the previous one. Collective."""
        ranks, rank = self.group.ranks, self.group.rank
        block = block.contiguous()
        received = block.new_empty(arriving_rows, *block.shape[1:])
        ops = [
            dist.P2POp(dist.isend, block, ranks[(rank + 1) % len(ranks)], self.group.handle),
            dist.P2POp(dist.irecv, received, ranks[rank - 1], self.group.handle),
        ]
        return Transfer(received, block, dist.batch_isend_irecv(ops))

    def gather(self, block: Tensor) -> Tensor:
        """[own rows, ...] -> [S, ...] in sequence order. Collective."""
        if self.group.size == 1:
            return block
        longest = max(self.counts)
        padded = block.new_zeros(longest, *block.shape[1:])
        padded[: block.shape[0]] = block
        everyone = block.new_empty(self.group.size * longest, *block.shape[1:])
        dist.all_gather_into_tensor(everyone, padded, group=self.group.handle)
        whole = block.new_empty(sum(self.counts), *block.shape[1:])
        for r, rows in enumerate(self.blocks):
            for start, stop, at in _pieces(rows, r * longest):
                whole[start:stop] = everyone[at : at + stop - start]
        return whole

    def scatter_sum(self, whole: Tensor) -> Tensor:
        """The transpose of ``gather``: every rank's [S, ...] summed, own rows kept. Collective.

        An all-to-all and a local sum move the bytes of a reduce-scatter, take uneven blocks, and sum in a fixed order.
        """
        if self.group.size == 1:
            return whole
        sent = torch.cat([whole[start:stop] for rows in self.blocks for start, stop in rows])
        own, unit = self.counts[self.group.rank], whole[0].numel()
        received = whole.new_empty(self.group.size, own, *whole.shape[1:])
        dist.all_to_all_single(
            received.view(-1), sent.view(-1), [own * unit] * self.group.size, [c * unit for c in self.counts], group=self.group.handle
        )
        return received.sum(0)


def _pieces(rows: Ranges, at: int) -> list[tuple[int, int, int]]:
    """(start, stop, where it lies in a buffer that holds ``rows`` end to end from ``at``)."""
    pieces = []
    for start, stop in rows:
        pieces.append((start, stop, at))
        at += stop - start
    return pieces
