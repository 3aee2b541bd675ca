"""The world of a run: this process's device, the layout's process groups, the control messages."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from eagle_ds.config.sections import ParallelConfig
from eagle_ds.parallel.topology import ProcessGroups, Topology, make_groups
from eagle_ds.training.agreement import Agreement

# On a CPU, DeepSpeed compiles this operation at start: a minute of g++, and a compilation that is killed
# leaves a lock that hangs the next start. Only DeepSpeed's inference_all_reduce uses it, which training never
# calls. Marked as incompatible, it is not built.
SHM_OP = "deepspeed_shm_comm"


@dataclass(frozen=True)
class World:
    """This process among all ranks."""

    topology: Topology
    groups: ProcessGroups
    agreement: Agreement
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes files and logs."""
        return self.topology.rank == 0

    @property
    def memory_bytes(self) -> int:
        """Memory of this rank: its GPU's, or on a CPU an equal share of the host's."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_properties(self.device).total_memory
        return get_accelerator().total_memory() // self.topology.world_size


def join_world(parallel: ParallelConfig, local_rank: int) -> World:
    """Connect to the other processes and form the process groups of the layout. Collective.

    Raises:
        ValueError: the number of processes does not fit the layout, or another run uses the port.
    """
    device = take_device(local_rank)
    if not dist.is_initialized():
        with explaining_rendezvous():
            backend = "nccl" if device.type == "cuda" else "gloo"
            deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
    return world_of(parallel, device)


def world_of(parallel: ParallelConfig, device: torch.device) -> World:
    """Form the groups of the layout within the default process group, which must exist. Collective."""
    topology = Topology(dist.get_world_size(), dist.get_rank(), parallel.ulysses, parallel.ring)
    return World(topology, make_groups(topology), Agreement(topology), device)


def take_device(local_rank: int) -> torch.device:
    """Make GPU ``local_rank`` the current device and return it, or the CPU where there is no GPU."""
    if get_accelerator().device_name() != "cuda":
        deepspeed.ops.__compatible_ops__[SHM_OP] = False
        return torch.device("cpu")
    get_accelerator().set_device(local_rank)
    return torch.device("cuda", local_rank)


@contextmanager
def explaining_rendezvous() -> Iterator[None]:
    """Turn the error of a port that is in use into a ValueError that says how to choose another."""
    try:
        yield
    except dist.DistNetworkError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"cannot connect to the other processes on port {os.environ.get('MASTER_PORT')} ({reason}); "
            "if another run uses this port, start deepspeed with --master_port and another number"
        ) from error
