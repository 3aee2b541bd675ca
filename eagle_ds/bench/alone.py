"""One rank of a larger world by itself: a process group that claims N ranks and answers every collective from what this one has.

The GPU then does exactly one rank's computing in exactly one rank's memory, and waits for nobody: what a layout costs without its
communication, measured where there is one GPU. Numbers are wrong and finite: what others would have sent is made of what this rank
sent, and weights that ZeRO gathers in place stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from eagle_ds.bench.python_group import Pending, PythonGroup
from eagle_ds.config.deepspeed import read_ds_json, zero_stage
from eagle_ds.config.recipe import Recipe
from eagle_ds.estimate.memory import Rows
from eagle_ds.estimate.planner import DEVICES, floor_seconds, sharding_for
from eagle_ds.parallel.topology import Topology, make_groups
from eagle_ds.sharding.sequence import Document
from eagle_ds.training.agreement import Agreement
from eagle_ds.training.world import World, take_device

BACKEND = "alone"


def alone_world(recipe: Recipe, documents: Sequence[Document], local_rank: int, size: int, rank: int | None) -> World:
    """A world of ``size`` ranks of which this process is ``rank``, by default the one that the plan of ``documents`` loads most.

    Joined once a process: a second call keeps the first's rank. Raises ValueError for a rank or layout that ``size`` does not carry,
    and for any rank but 0 under ZeRO-3.
    """
    device = take_device(local_rank)
    if not dist.is_initialized():
        Topology(size, 0, recipe.parallel.ulysses, recipe.parallel.ring)  # complains of a size that carries no such layout
        if rank is None:
            rank = busiest_rank(recipe, documents)
        if not 0 <= rank < size:
            raise ValueError(f"rank {rank} is none of a world of {size}; give one from 0 to {size - 1}")
        if rank and zero_stage(read_ds_json(recipe.deepspeed)) == 3:
            raise ValueError(f"ZeRO-3 checks every rank against what rank 0 broadcasts, so rank {rank} cannot be alone; take rank 0")
        dist.Backend.register_backend(BACKEND, _make_group, extended_api=True, devices=["cpu", "cuda"])
        dist.init_process_group(BACKEND, store=dist.HashStore(), rank=rank, world_size=size)
        deepspeed.init_distributed(BACKEND, auto_mpi_discovery=False, verbose=False)
    topology = Topology(dist.get_world_size(), dist.get_rank(), recipe.parallel.ulysses, recipe.parallel.ring)
    return World(topology, make_groups(topology), Agreement(topology, BACKEND), device)


def busiest_rank(recipe: Recipe, documents: Sequence[Document]) -> int:
    """The rank whose rows have the longest floor, whatever the ring's mode."""
    sharding = sharding_for(recipe, list(documents))

    def floor(rank: int) -> float:
        return sum(floor_seconds(recipe, sharding, DEVICES["h200"], Rows.of_rank(sharding, rank)).values())

    return max(range(sharding.world), key=floor)


def _make_group(options: Any, _: Any) -> AloneGroup:
    return AloneGroup(options.group_rank, options.group_size)


class AloneGroup(PythonGroup):
    """Every call is done when it returns."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self._sent: Tensor | None = None

    def getBackendName(self) -> str:
        """What torch calls it in messages."""
        return BACKEND

    def shutdown(self) -> None:
        """There is nothing to end."""

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Pending:
        """As if all others had zeros."""
        return Pending()

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> Pending:
        """As if the root had the same."""
        return Pending()

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Pending:
        """As if all had the same; gathered in place, as if they had what the buffer holds of them: ZeRO's weights."""
        if outputs[0][self.rank()].data_ptr() != inputs[0].data_ptr():
            for output in outputs[0]:
                _fill(output, inputs[0])
        return Pending()

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> Pending:
        """As if all others had zeros."""
        own = inputs[0][self.rank()]
        if outputs[0].data_ptr() != own.data_ptr():
            _fill(outputs[0], own)
        return Pending()

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Pending:
        """As if each sent what it is sent, over again where that is short; or what another is sent, where that is nothing."""
        anything = max(inputs, key=Tensor.numel)
        for output, own in zip(outputs, inputs, strict=True):
            _fill(output, own if own.numel() else anything)
        return Pending()

    def send(self, tensors: list[Tensor], dst: int, tag: int = 0) -> Pending:
        """Kept until something is received."""
        (self._sent,) = tensors
        return Pending()

    def recv(self, tensors: list[Tensor], src: int, tag: int = 0) -> Pending:
        """The last thing sent; zeros where nothing was."""
        sent, self._sent = self._sent, None
        _fill(tensors[0], tensors[0].new_empty(0) if sent is None else sent)
        return Pending()

    def barrier(self, opts: Any = None) -> Pending:
        """All are here."""
        return Pending()


@torch.no_grad()
def _fill(output: Tensor, source: Tensor) -> None:
    """``source`` over and over; zeros where it is empty."""
    to, source = output.view(-1), source.reshape(-1)
    if not source.numel():
        to.zero_()
        return
    whole = to.numel() // source.numel() * source.numel()
    to[:whole].view(-1, source.numel()).copy_(source)
    to[whole:].copy_(source[: to.numel() - whole])
