"""A world whose ranks share the GPUs of this host, for benchmarks and tests with more ranks than GPUs.

NCCL refuses two processes on one GPU, so these ranks exchange tensors through host memory: results are exact, times mean
nothing. Without a GPU they exchange tensors the same way.
"""

from __future__ import annotations

import logging
import os

import deepspeed
import torch
import torch.distributed as dist

from eagle_ds.bench.staged import BACKEND, register_staged
from eagle_ds.config.recipe import ParallelConfig
from eagle_ds.training.world import World, explaining_rendezvous, take_device, world_of

logger = logging.getLogger(__name__)


def join_shared_gpu(parallel: ParallelConfig, local_rank: int) -> World:
    """Like ``join_world``, but rank i of this host uses GPU i modulo the number of GPUs. Collective."""
    device = take_shared_device(local_rank)
    is_new = not dist.is_initialized()
    if is_new:
        with explaining_rendezvous():
            register_staged()
            dist.init_process_group(BACKEND)  # DeepSpeed would bind the group to one GPU for NCCL
            deepspeed.init_distributed(BACKEND, auto_mpi_discovery=False, verbose=False)
    devices = torch.cuda.device_count() if device.type == "cuda" else 1
    world = world_of(parallel, device, ranks_per_device=-(-dist.get_world_size() // devices))
    if is_new and world.is_first:
        logger.warning("%d ranks a device, through host memory: results count, times mean nothing", world.ranks_per_device)
    return world


def take_shared_device(local_rank: int) -> torch.device:
    """Like ``take_device``, with ``local_rank`` wrapped around the number of GPUs."""
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda":
        local_rank %= torch.cuda.device_count()
        os.environ["LOCAL_RANK"] = str(local_rank)  # DeepSpeed's engine selects its GPU by this variable
    return take_device(local_rank)
