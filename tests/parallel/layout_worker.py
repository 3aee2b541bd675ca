"""What each process of a layout test does."""

from __future__ import annotations

import torch
from torch import Tensor

from eagle_ds.loss import StepSums, uniform_decay
from eagle_ds.parallel.topology import SOLO, Topology, make_groups
from tests.cases import DECAY, Case
from tests.steps import gradients, make_targets, rank_batch, run_step


def layout_step(rank: int, world: int, case: Case) -> tuple[Tensor, StepSums, dict[str, Tensor]]:
    """(loss, sums, gradients) of the global batch, all-reduced; every rank returns the same."""
    topology = Topology(world, rank, case.ulysses, case.ring)
    groups = make_groups(topology) if world > 1 else SOLO
    model, head = case.model(), case.head()
    batch = rank_batch(case.plan(topology.dp_rank), topology.sp_rank, case.whole(topology.dp_rank), case.alignment)
    counted = _summed(make_targets(batch, head).counted.sum(0).double(), world)
    weights = uniform_decay(DECAY, case.steps) / counted.clamp(min=1)

    def alpha_mean(alpha: Tensor, rows: Tensor) -> Tensor:
        total, number = _summed(torch.stack([alpha, rows]), world)
        return (total / number.clamp(min=1)).to(case.torch_dtype)

    loss, sums = run_step(model, batch, head, weights.to(case.torch_dtype), groups=groups, kind=case.kind, alpha_mean=alpha_mean)
    grads = {name: _summed(g, world) for name, g in gradients(model).items()}
    return _summed(loss, world), StepSums.from_flat(_summed(sums.flat(), world)), grads


def _summed(x: Tensor, world: int) -> Tensor:
    if world > 1:
        torch.distributed.all_reduce(x)
    return x
