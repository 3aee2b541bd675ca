"""This process among the others: device, process groups, and the channel over which ranks agree."""

from __future__ import annotations

import os
from dataclasses import dataclass

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from eagle_ds.config import ParallelConfig
from eagle_ds.engine.agreement import Agreement
from eagle_ds.parallel.topology import ProcessGroups, Topology, make_groups

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

    @property
    def is_first(self) -> bool:
        """Rank 0 writes files and logs."""
        return self.topology.rank == 0

    @property
    def memory_bytes(self) -> int:
        """Memory of the device, or of the host divided among its processes."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_properties(self.device).total_memory
        return get_accelerator().total_memory() // self.topology.world_size


def join_world(parallel: ParallelConfig, local_rank: int) -> World:
    """Form the process groups of ``parallel``'s layout. Collective. Raises ValueError if the world does not carry it."""
    accelerator = get_accelerator()
    on_cuda = accelerator.device_name() == "cuda"
    device = torch.device("cuda", local_rank) if on_cuda else torch.device("cpu")
    if on_cuda:
        accelerator.set_device(local_rank)
    else:
        deepspeed.ops.__compatible_ops__[SHM_OP] = False
    if not dist.is_initialized():
        _rendezvous("nccl" if on_cuda else "gloo")
    topology = Topology(dist.get_world_size(), dist.get_rank(), parallel.ulysses, parallel.ring)
    return World(topology, make_groups(topology), Agreement(topology), device)


def _rendezvous(backend: str) -> None:
    """Meet the other processes. Raises ValueError where another run sits on the port."""
    try:
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
    except dist.DistNetworkError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"cannot meet the other processes on port {os.environ.get('MASTER_PORT')} ({reason}); if another run uses it, "
            "start deepspeed with --master_port and another one"
        ) from error
