"""Turn sums over all ranks into the numbers of the log. Only this file divides.

Ranks hold different rows, so a mean of means would be wrong: ranks add up sums and counts, and one division
follows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from eagle_ds.model.loss import LossSums
from eagle_ds.parallel.copies import to_host


@dataclass(frozen=True)
class Metrics:
    """The metrics of one optimizer step or one evaluation."""

    loss: float  # sum_k decay^k * (loss of TTT step k, summed over its counted rows) / N_k
    kl: float  # the same with the label's entropy subtracted from the soft cross-entropy
    accuracy: list[float]  # per TTT step, over trained rows: a label outside the draft vocabulary is a miss
    acceptance: list[float]  # per TTT step: mean alpha over trained rows
    simulated_length: float  # 1 + mean over trained rows of sum_k prod_{j<=k} alpha_j
    trained_rows: int

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for a JSON line."""
        return asdict(self)


def step_weights(counted: Tensor, decay: Tensor, positions: int | None) -> Tensor:
    """Return what multiplies the sum of row losses of each TTT step, float64 [T].

    Args:
        counted: [T], N_k, the counted rows of TTT step k in the global batch. A step with none gets weight 0.
        decay: float64 [T], decay^k.
        positions: B * S, which replaces N_k as divisor where the loss is normalised by positions.
    """
    counted = counted.to(torch.float64)
    if positions is not None:
        return torch.where(counted > 0, decay / positions, 0.0)
    return torch.where(counted > 0, decay / counted.clamp(min=1), 0.0)


def metrics_of(sums: LossSums, decay: Tensor, positions: int | None) -> Metrics:
    """Compute the metrics from sums over all ranks and micro-batches, on the CPU."""
    weights = step_weights(sums["counted"], decay, positions)
    trained = sums["trained"].clamp(min=1)
    return Metrics(
        loss=float((weights * sums["loss"]).sum()),
        kl=float((weights * (sums["cross_entropy"] - sums["entropy"])).sum()),
        accuracy=(sums["correct"] / trained).tolist(), acceptance=(sums["alpha"] / trained).tolist(),
        simulated_length=1 + float(sums.lengths[0] / sums.lengths[1].clamp(min=1)),
        trained_rows=int(sums.lengths[1]),
    )


def sum_over_ranks(sums: LossSums, world_size: int) -> Callable[[], LossSums]:
    """Add ``sums`` over all ranks. Collective.

    Returns a function that waits for the copy to the host and returns the total. Calling it later lets the
    host queue more work meanwhile.
    """
    flat = sums.flat()
    if world_size > 1:
        dist.all_reduce(flat)
    arrived = to_host(flat)
    return lambda: LossSums.from_flat(arrived())


def add(a: LossSums | None, b: LossSums) -> LossSums:
    """Add two sums; ``a`` may be None, for nothing yet."""
    return b if a is None else LossSums(a.steps + b.steps, a.lengths + b.lengths)
