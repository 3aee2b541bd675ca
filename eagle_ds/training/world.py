"""This process among the others: device, process groups, and the channel over which ranks agree."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from eagle_ds.config.recipe import ParallelConfig
from eagle_ds.parallel.topology import ProcessGroups, Topology, make_groups
from eagle_ds.training.agreement import Agreement

SHM_OP = "deepspeed_shm_comm"
"""DeepSpeed compiles it on CPU at start (a minute of g++, and a killed compilation leaves a lock that hangs the next start),
but only its ``inference_all_reduce`` uses it. Marked incompatible it is neither built nor missed."""


@dataclass(frozen=True)
class World:
    """Where this process stands and what it talks through."""

    topology: Topology
    groups: ProcessGroups
    agreement: Agreement
    device: torch.device
    ranks_per_device: int = 1

    @property
    def is_first(self) -> bool:
        """Rank 0 writes files and logs."""
        return self.topology.rank == 0

    @property
    def memory_bytes(self) -> int:
        """Memory of the device divided among its ranks, or of the host among its processes."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_properties(self.device).total_memory // self.ranks_per_device
        return get_accelerator().total_memory() // self.topology.world_size


def join_world(parallel: ParallelConfig, local_rank: int) -> World:
    """Form the process groups of the recipe's layout. Collective.

    Raises:
        ValueError: the number of processes does not carry the layout, or another run uses the port.
    """
    device = take_device(local_rank)
    if not dist.is_initialized():
        with explaining_rendezvous():
            deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False)
    return world_of(parallel, device)


def world_of(parallel: ParallelConfig, device: torch.device, ranks_per_device: int = 1) -> World:
    """The layout's groups over the default process group, which exists. Collective."""
    topology = Topology(dist.get_world_size(), dist.get_rank(), parallel.ulysses, parallel.ring)
    return World(topology, make_groups(topology), Agreement(topology), device, ranks_per_device)


def take_device(local_rank: int) -> torch.device:
    """Make this process's GPU the current one; return the CPU where DeepSpeed finds no GPU."""
    if get_accelerator().device_name() != "cuda":
        deepspeed.ops.__compatible_ops__[SHM_OP] = False
        return torch.device("cpu")
    get_accelerator().set_device(local_rank)
    return torch.device("cuda", local_rank)


@contextmanager
def explaining_rendezvous() -> Iterator[None]:
    """Turn a port that is taken into a ValueError that says how to choose another."""
    try:
        yield
    except dist.DistNetworkError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"cannot meet the other processes on port {os.environ.get('MASTER_PORT')} ({reason}); if another run uses it, "
            "start deepspeed with --master_port and another one"
        ) from error
