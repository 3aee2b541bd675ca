"""This process among the others: device, process groups, and the channel over which ranks agree."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from eagle_ds.bench.staged import BACKEND as STAGED
from eagle_ds.bench.staged import register_staged
from eagle_ds.config.recipe import ParallelConfig
from eagle_ds.parallel.topology import ProcessGroups, Topology, make_groups
from eagle_ds.training.agreement import Agreement

logger = logging.getLogger(__name__)

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


def join_world(parallel: ParallelConfig, local_rank: int, *, share_gpu: bool = False) -> World:
    """Form the process groups of ``parallel``'s layout. Collective. Raises ValueError if the world does not carry it.

    ``share_gpu``: the ranks of this host share the GPUs that it has, however few, and talk through host memory: right, and
    slow. Without a GPU they talk the same way.
    """
    device = take_device(local_rank, share_gpu=share_gpu)
    on_cuda = device.type == "cuda"
    is_new = not dist.is_initialized()
    if is_new:
        _rendezvous(STAGED if share_gpu else "nccl" if on_cuda else "gloo")
    topology = Topology(dist.get_world_size(), dist.get_rank(), parallel.ulysses, parallel.ring)
    sharing = -(-topology.world_size // (torch.cuda.device_count() if on_cuda else 1)) if share_gpu else 1
    if share_gpu and is_new and topology.rank == 0:
        logger.warning("%d ranks a device, which talk through host memory: results count, times mean nothing", sharing)
    return World(topology, make_groups(topology), Agreement(topology), device, sharing)


def take_device(local_rank: int, *, share_gpu: bool = False) -> torch.device:
    """This process's GPU, made the current one, or the CPU where DeepSpeed finds no GPU."""
    if get_accelerator().device_name() != "cuda":
        deepspeed.ops.__compatible_ops__[SHM_OP] = False
        return torch.device("cpu")
    if share_gpu:
        local_rank %= torch.cuda.device_count()
        os.environ["LOCAL_RANK"] = str(local_rank)  # DeepSpeed's engine takes the GPU of that number, and nothing else by it
    get_accelerator().set_device(local_rank)
    return torch.device("cuda", local_rank)


def _rendezvous(backend: str) -> None:
    """Meet the other processes. Raises ValueError where another run sits on the port."""
    try:
        if backend == STAGED:  # not by DeepSpeed, which binds the group to a GPU for NCCL
            register_staged()
            dist.init_process_group(backend)
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
    except dist.DistNetworkError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"cannot meet the other processes on port {os.environ.get('MASTER_PORT')} ({reason}); if another run uses it, "
            "start deepspeed with --master_port and another one"
        ) from error
