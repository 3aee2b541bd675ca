"""Run one micro-batch through the real code: from whole arrays to loss, metric sums and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eagle_ds.data.batch import Batch, TokenLabels, assemble, counted_rows
from eagle_ds.kernels.attention import ReferenceAttention
from eagle_ds.model.draft import Eagle3Draft
from eagle_ds.model.loss import HeadTargets, LossSettings, LossSums, head_loss
from eagle_ds.model.offload import ActivationOffload
from eagle_ds.model.ttt import PrefixAttention
from eagle_ds.parallel.exchange import SequenceExchange
from eagle_ds.parallel.topology import ProcessGroups, Topology, make_groups
from eagle_ds.sharding import ranges as rg
from eagle_ds.sharding.sequence import SequenceSharding
from eagle_ds.target.head import TargetHead, argmax_and_logsumexp

SOLO = make_groups(Topology(1, 0))  # groups of one, without torch.distributed


@dataclass
class WholeSequence:
    """Whole arrays of one packed sequence."""

    info: list[TokenLabels]
    aux: Tensor  # [S, A*H]
    hidden: Tensor  # [S, H]


@dataclass(frozen=True)
class WholeHead(TargetHead):
    """The target's head with all its rows, from which tests compute labels."""

    full: Tensor  # [V, H]


def rank_batch(sharding: SequenceSharding, rank: int, whole: WholeSequence, alignment: str) -> Batch:
    """Return the rows of the whole arrays that ``rank`` would read from a store."""
    wanted = ((whole.aux, sharding.aux_rows(rank)), (whole.hidden, sharding.target_rows(rank)))
    aux, hidden = (x[torch.from_numpy(rg.rows(rows))] for x, rows in wanted)
    return assemble(sharding, rank, whole.info, aux, hidden, alignment=alignment)


def prefix_for(
    model: Eagle3Draft, sharding: SequenceSharding, groups: ProcessGroups = SOLO,
    kernel: ReferenceAttention | None = None, recompute: str = "none",
) -> PrefixAttention:
    arch = model.arch
    exchange = SequenceExchange(sharding, groups, arch.num_attention_heads, arch.num_key_value_heads)
    return PrefixAttention(
        exchange, kernel or ReferenceAttention(), head_dim=arch.head_dim, sliding_window=arch.sliding_window,
        resend_queries=recompute == "full", device=model.fc.weight.device,
    )


def make_targets(batch: Batch, head: WholeHead) -> HeadTargets:
    token, logsumexp = argmax_and_logsumexp(batch.target_hidden, head.full, widen=False)
    counted = counted_rows(batch.trained, token, batch.target_index, head.t2d)
    return HeadTargets(
        head, batch.target_hidden, logsumexp, token, batch.target_index, batch.trained, counted
    )


def run_step(
    model: Eagle3Draft,
    batch: Batch,
    head: WholeHead,
    weights: Tensor,
    *,
    groups: ProcessGroups = SOLO,
    kernel: ReferenceAttention | None = None,
    recompute: str = "none",
    **settings: object,
) -> tuple[Tensor, LossSums]:
    """Run forward and backward. The gradients are in the model afterwards."""
    targets = make_targets(batch, head)
    spec = LossSettings(weights, **settings)
    prefix = prefix_for(model, batch.sharding, groups, kernel, recompute)
    loss, sums = model(batch, prefix, lambda *head_inputs: head_loss(*head_inputs, targets, spec), recompute)
    loss.backward()
    return loss.detach(), sums


def kept_bytes(offload: ActivationOffload) -> int:
    """Count the bytes of all storages that are in host memory now."""
    return sum(stored.num_bytes for ref in offload._stored.values() if (stored := ref()) is not None)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the L2 norm of the difference / that of ``expected``."""
    scale = expected.double().norm()
    return float((found.double() - expected.double()).norm() / (scale if scale > 0 else 1.0))


def gradients(model: Eagle3Draft) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def total(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).sum(0)
