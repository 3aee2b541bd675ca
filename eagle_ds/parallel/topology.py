"""Ranks as one grid [dp, ring, ulysses], ulysses fastest; process groups are slices of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from deepspeed import comm as dist


@dataclass(frozen=True)
class Topology:
    """Where ``rank`` stands. world_size = dp * ring * ulysses."""

    world_size: int
    rank: int
    ulysses: int = 1
    ring: int = 1

    def __post_init__(self) -> None:
        if self.world_size % (self.ulysses * self.ring):
            raise ValueError(
                f"world_size={self.world_size} is not a multiple of ulysses * ring = {self.ulysses} * {self.ring} = {self.sp}; "
                "start that many processes, or change parallel.ulysses and parallel.ring"
            )

    @property
    def sp(self) -> int:
        """Sequence-parallel size P."""
        return self.ulysses * self.ring

    @property
    def dp(self) -> int:
        """Data-parallel size."""
        return self.world_size // self.sp

    @property
    def grid(self) -> np.ndarray:
        """Global ranks, int64 [dp, ring, ulysses]."""
        return np.arange(self.world_size).reshape(self.dp, self.ring, self.ulysses)

    @property
    def dp_rank(self) -> int:
        """Which of the dp samples this rank works on."""
        return self.rank // self.sp

    @property
    def sp_rank(self) -> int:
        """Index into the plan: ring_rank * ulysses + ulysses_rank."""
        return self.rank % self.sp

    @property
    def ring_rank(self) -> int:
        """Place in the ring."""
        return self.sp_rank // self.ulysses

    @property
    def ulysses_rank(self) -> int:
        """Place among the ranks that share heads."""
        return self.rank % self.ulysses


@dataclass(frozen=True)
class Group:
    """Some ranks that talk to each other. ``handle`` is None for a group of one, which never communicates."""

    ranks: tuple[int, ...]
    rank: int
    handle: Any = None

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)


@dataclass(frozen=True)
class ProcessGroups:
    """The groups this rank belongs to."""

    ulysses: Group
    ring: Group
    sp: Group


SOLO = ProcessGroups(Group((0,), 0), Group((0,), 0), Group((0,), 0))
"""Groups of one, for a single process without torch.distributed."""


def make_groups(topology: Topology) -> ProcessGroups:
    """Create every group of the grid, in the same order on all ranks. Collective; needs an initialised backend if world_size > 1."""
    grid = topology.grid
    sp_rows = grid.reshape(topology.dp, -1)
    return ProcessGroups(
        ulysses=_own_group(grid.reshape(-1, topology.ulysses), topology.rank),
        ring=_own_group(grid.transpose(0, 2, 1).reshape(-1, topology.ring), topology.rank),
        sp=_own_group(sp_rows, topology.rank),
    )


def _own_group(slices: np.ndarray, rank: int) -> Group:
    own = None
    for members in slices.tolist():
        handle = dist.new_group(members) if len(members) > 1 else None
        if rank in members:
            own = Group(tuple(members), members.index(rank), handle)
    assert own is not None, "every rank is in one slice of the grid"
    return own
