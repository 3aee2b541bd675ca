"""What each process of a layout test does."""

from __future__ import annotations

import torch
from torch import Tensor

from eagle_ds.kernels.attention import wide
from eagle_ds.kernels.backend import choose_attention
from eagle_ds.model.loss import LossSums, step_decays
from eagle_ds.parallel.topology import Topology, make_groups
from tests.layout_cases import DECAY, Case
from tests.micro_batch import WholeHead, gradients, make_targets, rank_batch, run_step


def layout_step(rank: int, world: int, case: Case) -> tuple[Tensor, LossSums, dict[str, Tensor]]:
    """Return loss, sums and gradients of the global batch, all-reduced: the same on every rank."""
    topology = Topology(world, rank, case.ulysses, case.ring)
    groups = make_groups(topology)
    device = torch.device("cpu")
    if case.device == "cuda":
        device = torch.device("cuda", rank % torch.cuda.device_count())
    model, head = case.model().to(device), _moved(case.head(), device)
    batch = rank_batch(
        case.sharding(topology.dp_rank), topology.sp_rank, case.whole(topology.dp_rank), case.alignment
    ).to(device)
    counted = _summed(make_targets(batch, head).counted.sum(0).double(), world)
    weights = step_decays(DECAY, case.steps).to(device) / counted.clamp(min=1)
    kernel = choose_attention(device, case.torch_dtype, case.arch.head_dim)

    def alpha_mean(alpha: Tensor, rows: Tensor) -> Tensor:
        total, number = _summed(torch.stack([alpha, rows]), world)
        return (total / number.clamp(min=1)).to(loss_dtype)

    loss_dtype = wide(case.torch_dtype)
    options = {"kind": case.kind, "alpha_mean": alpha_mean, "recompute": case.recompute}
    loss, sums = run_step(model, batch, head, weights.to(loss_dtype), groups=groups, kernel=kernel, **options)
    grads = {name: _summed(g.to(loss_dtype), world).cpu() for name, g in gradients(model).items()}
    return _summed(loss, world).cpu(), LossSums.from_flat(_summed(sums.flat(), world).cpu()), grads


def _moved(head: WholeHead, device: torch.device) -> WholeHead:
    return WholeHead(*(x.to(device) for x in (head.draft_rows, head.t2d, head.d2t, head.full)))


def _summed(x: Tensor, world: int) -> Tensor:
    if world > 1:
        torch.distributed.all_reduce(x)
    return x
