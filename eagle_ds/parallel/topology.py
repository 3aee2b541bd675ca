"""Lay out all ranks as one grid [dp, ring, ulysses], with ulysses fastest. Process groups are slices of the
grid.

Example, 8 ranks with dp = 2, ring = 2, ulysses = 2 (layout U2R2, twice):

    sequence 0 (dp rank 0)            sequence 1 (dp rank 1)
                 ulysses 0  1                      ulysses 0  1
       ring 0         rank 0  1          ring 0         rank 4  5
       ring 1         rank 2  3          ring 1         rank 6  7

A row of a table is a Ulysses group (0, 1), a column is a ring (0, 2), a table is a sequence-parallel group.
Neighbouring ranks, which are usually on the same host, are in one Ulysses group, because it sends the most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from deepspeed import comm as dist


@dataclass(frozen=True)
class Topology:
    """The place of ``rank`` in the grid; world_size = dp * ring * ulysses.

    Raises ValueError if ulysses * ring does not divide world_size.
    """

    world_size: int
    rank: int
    ulysses: int = 1
    ring: int = 1

    def __post_init__(self) -> None:
        if self.world_size % self.sp:
            raise ValueError(
                f"world_size={self.world_size} is not a multiple of ulysses * ring = {self.ulysses} * "
                f"{self.ring} = {self.sp}; start that many processes, or change parallel.ulysses and "
                "parallel.ring"
            )

    @property
    def sp(self) -> int:
        """Number of ranks that share one sequence, P."""
        return self.ulysses * self.ring

    @property
    def dp(self) -> int:
        """Number of sequences that are trained on at the same time."""
        return self.world_size // self.sp

    @property
    def grid(self) -> np.ndarray:
        """Global ranks, int64 [dp, ring, ulysses]."""
        return np.arange(self.world_size).reshape(self.dp, self.ring, self.ulysses)

    @property
    def dp_rank(self) -> int:
        """Which of the dp sequences this rank works on."""
        return self.rank // self.sp

    @property
    def sp_rank(self) -> int:
        """Index of this rank's share in a `SequenceSharding`: ring rank * ulysses + Ulysses rank."""
        return self.rank % self.sp


@dataclass(frozen=True)
class Group:
    """Ranks that communicate with each other; ``handle`` is None for a group of one."""

    ranks: tuple[int, ...]  # global ranks
    rank: int  # index of this process in ``ranks``
    handle: Any = None

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)


@dataclass(frozen=True)
class ProcessGroups:
    """The Ulysses group and the ring that this rank belongs to."""

    ulysses: Group
    ring: Group


def make_groups(topology: Topology) -> ProcessGroups:
    """Create every group of the grid and return this rank's two.

    Collective; torch.distributed must be initialised if world_size > 1. A single process gets groups of one.
    """
    grid = topology.grid
    return ProcessGroups(
        ulysses=_own_group(grid.reshape(-1, topology.ulysses), topology.rank),
        ring=_own_group(grid.transpose(0, 2, 1).reshape(-1, topology.ring), topology.rank),
    )


def _own_group(slices: np.ndarray, rank: int) -> Group:
    """Create a group for each row of ``slices`` [groups, size]; return the one that holds ``rank``."""
    own = None
    for members in slices.tolist():
        # All ranks create all groups, in the same order: new_group is collective over the world, members or
        # not.
        handle = dist.new_group(members) if len(members) > 1 else None
        if rank in members:
            own = Group(tuple(members), members.index(rank), handle)
    assert own is not None, "every rank is in one slice of the grid"
    return own
