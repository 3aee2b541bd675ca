"""Worlds with more ranks than GPUs, for benchmarks and tests: ranks that share a GPU, or one rank alone.

Training itself uses ``eagle_ds.training.world.join_world``. ``process_groups.py`` describes the process
groups of both simulations, and what they leave out.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass

import deepspeed
import torch
import torch.distributed as dist

from eagle_ds.bench.process_groups import ALONE, STAGED, register_alone, register_staged
from eagle_ds.config.deepspeed import read_ds_json, zero_stage
from eagle_ds.config.recipe import Recipe
from eagle_ds.config.sections import ParallelConfig
from eagle_ds.estimate.devices import DEVICES
from eagle_ds.estimate.sequences import sharding_for
from eagle_ds.estimate.step_time import floor_seconds
from eagle_ds.estimate.tensor_sizes import Rows
from eagle_ds.parallel.topology import Topology, make_groups
from eagle_ds.sharding.sequence import Document
from eagle_ds.training.agreement import Agreement
from eagle_ds.training.world import World, explaining_rendezvous, take_device, world_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SharedWorld(World):
    """A world in which ``ranks_per_device`` ranks share each GPU."""

    ranks_per_device: int = 1

    @property
    def memory_bytes(self) -> int:
        """This rank's share of its GPU's memory, or of the host's on a CPU."""
        return super().memory_bytes // (self.ranks_per_device if self.device.type == "cuda" else 1)


def join_shared_gpu(parallel: ParallelConfig, local_rank: int) -> SharedWorld:
    """Form the process groups of ``parallel`` among ranks that share the GPUs of this host. Collective.

    Like ``join_world``, except that rank i uses GPU i modulo the number of GPUs. On CPU the ranks exchange
    tensors the same way. Results are exact, times mean nothing.
    """
    device = take_shared_device(local_rank)
    is_new = not dist.is_initialized()
    if is_new:
        with explaining_rendezvous():
            register_staged()
            # Initialise torch's group first: DeepSpeed would bind the group to one GPU, as NCCL needs.
            dist.init_process_group(STAGED)
            deepspeed.init_distributed(STAGED, auto_mpi_discovery=False, verbose=False)
    devices = torch.cuda.device_count() if device.type == "cuda" else 1
    ranks_per_device = -(-dist.get_world_size() // devices)
    world = SharedWorld(**vars(world_of(parallel, device)), ranks_per_device=ranks_per_device)
    if is_new and world.is_first:
        shared = f"{ranks_per_device} ranks share each device and exchange tensors through host memory"
        logger.warning("%s: the results are exact, the times mean nothing", shared)
    return world


def take_shared_device(local_rank: int) -> torch.device:
    """Select GPU ``local_rank`` modulo the number of GPUs; return the CPU where there is no GPU."""
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda":
        local_rank %= torch.cuda.device_count()
        os.environ["LOCAL_RANK"] = str(local_rank)  # DeepSpeed's engine selects its GPU by this variable
    return take_device(local_rank)


def alone_world(
    recipe: Recipe, documents: Sequence[Document], local_rank: int, size: int, rank: int | None
) -> World:
    """Make this process one rank of a world of ``size`` ranks whose other ranks are simulated.

    The process joins once; a second call keeps the first call's rank.

    Args:
        recipe: gives the layout and the DeepSpeed config.
        documents: of one sequence; they decide which rank is the busiest.
        local_rank: of this process, selects the GPU.
        size: number of ranks.
        rank: the rank to be; None for the busiest one.

    Raises:
        ValueError: ``size`` is not a multiple of the layout, ``rank`` is out of range, or ``rank`` is not 0
            under ZeRO-3.
    """
    device = take_device(local_rank)
    if not dist.is_initialized():
        # raises for a size that does not fit
        Topology(size, 0, recipe.parallel.ulysses, recipe.parallel.ring)
        if rank is None:
            rank = busiest_rank(recipe, documents)
        if not 0 <= rank < size:
            raise ValueError(f"rank {rank} is out of range in a world of {size} ranks; use 0 to {size - 1}")
        partitions_weights = zero_stage(read_ds_json(recipe.deepspeed)) == 3
        if rank and partitions_weights:
            found = f"rank {rank} cannot run alone under ZeRO-3, which compares all ranks with rank 0"
            raise ValueError(f"{found}; use rank 0")
        register_alone(fills_gathers_in_place=partitions_weights)
        dist.init_process_group(ALONE, store=dist.HashStore(), rank=rank, world_size=size)
        deepspeed.init_distributed(ALONE, auto_mpi_discovery=False, verbose=False)
    topology = Topology(dist.get_world_size(), dist.get_rank(), recipe.parallel.ulysses, recipe.parallel.ring)
    return World(topology, make_groups(topology), Agreement(topology, ALONE), device)


def busiest_rank(recipe: Recipe, documents: Sequence[Document]) -> int:
    """Return the rank whose rows need the most time by estimate; the ring mode does not matter."""
    sharding = sharding_for(recipe, list(documents))

    def floor(rank: int) -> float:
        return sum(floor_seconds(recipe, sharding, DEVICES["h200"], Rows.of_rank(sharding, rank)).values())

    return max(range(sharding.world), key=floor)
