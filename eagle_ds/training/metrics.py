"""From sums over all ranks to the numbers in the log: the one place that divides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from eagle_ds.model.loss import LossSums
from eagle_ds.parallel.transfer import to_host


@dataclass(frozen=True)
class Metrics:
    """Of one optimizer step or one evaluation (formulae: DESIGN section 2)."""

    loss: float  # sum_k decay^k * (step k's loss over its counted rows) / N_k
    kl: float  # the same with the label's entropy subtracted from the soft cross-entropy
    accuracy: list[float]  # by TTT step, of trained rows: an out-of-vocabulary label is a miss
    acceptance: list[float]  # by TTT step: mean alpha over trained rows
    simulated_length: float  # 1 + mean over trained rows of sum_k prod_{j<=k} alpha_j
    trained_rows: int

    def as_dict(self) -> dict[str, Any]:
        """For a JSON line."""
        return asdict(self)


def step_weights(counted: Tensor, decay: Tensor, positions: int | None) -> Tensor:
    """float64 [T]: what multiplies step k's sum of row losses. ``counted`` [T] is N_k over the global batch; with
    ``positions`` (B * S) that divides instead. A step that counts nothing weighs nothing."""
    counted = counted.to(torch.float64)
    if positions is not None:
        return torch.where(counted > 0, decay / positions, 0.0)
    return torch.where(counted > 0, decay / counted.clamp(min=1), 0.0)


def metrics_of(sums: LossSums, decay: Tensor, positions: int | None) -> Metrics:
    """``sums`` over all ranks and micro-batches, on the CPU."""
    weights = step_weights(sums["counted"], decay, positions)
    trained = sums["trained"].clamp(min=1)
    return Metrics(
        loss=float((weights * sums["loss"]).sum()),
        kl=float((weights * (sums["cross_entropy"] - sums["entropy"])).sum()),
        accuracy=(sums["correct"] / trained).tolist(),
        acceptance=(sums["alpha"] / trained).tolist(),
        simulated_length=1 + float(sums.lengths[0] / sums.lengths[1].clamp(min=1)),
        trained_rows=int(sums.lengths[1]),
    )


def sum_over_ranks(sums: LossSums, world_size: int) -> Callable[[], LossSums]:
    """``sums`` added over all ranks, on their way to the host: call the result for them, see ``transfer.to_host``. Collective."""
    flat = sums.flat()
    if world_size > 1:
        dist.all_reduce(flat)
    arrived = to_host(flat)
    return lambda: LossSums.from_flat(arrived())


def add(a: LossSums | None, b: LossSums) -> LossSums:
    """Sum of two, ``a`` possibly not there yet."""
    return b if a is None else LossSums(a.steps + b.steps, a.lengths + b.lengths)
