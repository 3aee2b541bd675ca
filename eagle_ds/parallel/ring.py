"""The ring: ring ranks own blocks of K_0/V_0 and share them by gather-once or by rotation.

Gather-once: an all-gather gives every rank all blocks, once for each sequence. In the backward, every rank
holds gradients of all blocks; each block's gradients are summed at its owner.

               rank 0   rank 1   rank 2                      rank 0      rank 1      rank 2
    forward      A        B        C         backward       dA dB dC    dA dB dC    dA dB dC
               ABC      ABC      ABC                        sum dA      sum dB      sum dC

Rotation (Ring Attention, arXiv:2310.01889): every rank sends the block that it holds to the next rank while
it computes with it. After R - 1 hops every rank has seen every block. K_0/V_0 of one block, not of all, are
in memory.

               rank 0       rank 1       rank 2
    hop 0        A  ------->  B  ------->  C  ------> rank 0
    hop 1        C  ------->  A  ------->  B  ------> rank 0
    hop 2        B            C            A

In the backward of the rotation a block's gradient follows the block, one hop later: rank r receives the
gradient that rank r - 1 computed for the block that r has now, adds its own part, and sends the sum on. The
last of R hops brings the finished gradient to the block's owner.
"""

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
    """One hop of a rotation in progress. It keeps the sent tensor alive until the hop is complete."""

    received: Tensor
    sent: Tensor
    works: list[Any]

    def wait(self) -> Tensor:
        """Return the received tensor. With NCCL the current stream waits, not the host."""
        for work in self.works:
            work.wait()
        return self.received


class RingExchange:
    """Move blocks of rows between the ranks of a ring; ring rank r owns the sequence rows ``blocks[r]``."""

    def __init__(self, group: Group, blocks: Sequence[Ranges]) -> None:
        assert len(blocks) == group.size
        self.group = group
        self.blocks = tuple(blocks)
        self.counts = [rg.count(block) for block in blocks]

    def rotate(self, block: Tensor, arriving_rows: int) -> Transfer:
        """Start to send ``block`` to the next rank, and to receive the previous rank's block. Collective.

        Args:
            arriving_rows: rows of the block that arrives.
        """
        ranks, rank = self.group.ranks, self.group.rank
        block = block.contiguous()
        received = block.new_empty(arriving_rows, *block.shape[1:])
        ops = [
            dist.P2POp(dist.isend, block, ranks[(rank + 1) % len(ranks)], self.group.handle),
            dist.P2POp(dist.irecv, received, ranks[rank - 1], self.group.handle),
        ]
        return Transfer(received, block, dist.batch_isend_irecv(ops))

    def gather(self, block: Tensor) -> Tensor:
        """Collect the blocks of all ranks: [own rows, ...] -> [S, ...] in sequence order. Collective."""
        if self.group.size == 1:
            return block
        # An all-gather needs equal sizes, so every block is padded to the longest.
        longest = max(self.counts)
        padded = block.new_zeros(longest, *block.shape[1:])
        padded[: block.shape[0]] = block
        everyone = block.new_empty(self.group.size * longest, *block.shape[1:])
        dist.all_gather_into_tensor(everyone, padded, group=self.group.handle)
        # Rank r's rows lie at r * longest, range after range; each range goes to its place in the sequence.
        whole = block.new_empty(sum(self.counts), *block.shape[1:])
        for r, ranges in enumerate(self.blocks):
            at = r * longest
            for start, stop in ranges:
                whole[start:stop] = everyone[at : at + stop - start]
                at += stop - start
        return whole

    def scatter_sum(self, whole: Tensor) -> Tensor:
        """Sum every rank's [S, ...] and return the own rows, [own rows, ...]: the transpose of ``gather``.
        Collective.

        An all-to-all and a local sum move the same bytes as a reduce-scatter. They also accept blocks of
        different sizes, and add in a fixed order, so results are reproducible.
        """
        if self.group.size == 1:
            return whole
        sent = torch.cat([whole[start:stop] for ranges in self.blocks for start, stop in ranges])
        own, unit = self.counts[self.group.rank], whole[0].numel()
        received = whole.new_empty(self.group.size, own, *whole.shape[1:])
        splits = [own * unit] * self.group.size, [c * unit for c in self.counts]  # numbers received, sent
        dist.all_to_all_single(received.view(-1), sent.view(-1), *splits, group=self.group.handle)
        return received.sum(0)
