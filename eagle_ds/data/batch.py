"""One rank's share of one micro-batch: index arithmetic from the plan, tensors from the store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from eagle_ds.sharding import ranges as rg
from eagle_ds.sharding.sequence import Alignment, SequenceSharding


@dataclass
class TokenLabels:
    """The small per-token arrays of one document, whole (every rank reads them)."""

    input_ids: np.ndarray  # int32 [S]
    loss_mask: np.ndarray  # uint8 [S]
    target_token_id: np.ndarray | None = None  # int32 [S]
    target_logsumexp: np.ndarray | None = None  # float32 [S]


@dataclass
class Batch:
    """What the draft computes on. C context rows, N query rows, M_aux and M_target rows read from the store.

    A query row p of step k is trained where ``trained[p, k]``; its label comes from target row ``target_index[p, k]``.
    ``target_token`` and ``target_logsumexp`` are None where the store lacks them; ``target.head.argmax_and_logsumexp`` makes them then.
    """

    sharding: SequenceSharding
    names: tuple[str, ...]
    aux: Tensor  # [M_aux, A*H]
    context_index: Tensor | None  # int64 [C], into aux; None: all of it in order
    context_ids: Tensor  # int64 [C], x[p+1]
    context_positions: Tensor  # int64 [C], rope position inside the document
    query_index: Tensor | None  # int64 [N], likewise
    token_ids: Tensor  # int64 [M_target + 1], x of the target rows, and token 0 for what is past a document's end
    token_index: Tensor  # int64 [T, N], x[p+1+k] of row p at step k, into token_ids
    query_positions: Tensor  # int64 [N]
    target_hidden: Tensor  # [M_target, H]
    target_index: Tensor  # int64 [N, T], into target_hidden
    trained: Tensor  # bool [N, T], by mask alone
    target_token: Tensor | None  # int64 [M_target], argmax over the full vocabulary
    target_logsumexp: Tensor | None  # float32 [M_target]

    def to(self, device: torch.device | str, *, float_dtype: torch.dtype | None = None, non_blocking: bool = False) -> Batch:
        """The same batch on ``device``; hidden states in ``float_dtype`` if given."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in moved.items():
            if isinstance(value, Tensor):
                cast = float_dtype if name in ("aux", "target_hidden") else None
                moved[name] = value.to(device, dtype=cast or value.dtype, non_blocking=non_blocking)
        return replace(self, **moved)


def counted_rows(trained: Tensor, token: Tensor, index: Tensor, t2d: Tensor) -> Tensor:
    """Return which (row, TTT step) pairs count: trained, and the label's argmax is in the draft vocabulary. bool [N, T].

    Args:
        trained: bool [N, T], by the loss mask alone.
        token: int64 [M], the target's argmax at each target row.
        index: int64 [N, T], the target row of each pair.
        t2d: bool [V], whether a target token is in the draft vocabulary.
    """
    return trained & t2d[token[index]] if len(token) else torch.zeros_like(trained)


def trained_steps(loss_mask: np.ndarray, rows: np.ndarray, ttt_steps: int, alignment: Alignment) -> np.ndarray:
    """bool [len(rows), T]: whether row p counts at step k by mask alone (DESIGN section 2).

    ``serving``: every token from x[p+1] to x[p+2+k] is trained. ``feature``: m[p+k] with m[S-1] = 0.
    """
    size = len(loss_mask)
    steps = np.arange(ttt_steps)
    if alignment == "feature":
        mask = np.concatenate([loss_mask[:-1] != 0, np.zeros(ttt_steps + 1, dtype=bool)])
        return mask[rows[:, None] + steps]
    untrained_before = np.concatenate([[0], np.cumsum(loss_mask == 0)])
    stop = rows[:, None] + 3 + steps
    inside = stop <= size
    return inside & (untrained_before[np.minimum(stop, size)] == untrained_before[np.minimum(rows + 1, size)][:, None])


def assemble(
    sharding: SequenceSharding,
    rank: int,
    info: Sequence[TokenLabels],
    aux: Tensor,
    target_hidden: Tensor,
    *,
    alignment: Alignment,
    names: Sequence[str] = (),
) -> Batch:
    """Batch of sequence-parallel rank ``rank``. ``aux`` holds ``plan.aux_rows(rank)``, ``target_hidden`` ``plan.target_rows(rank)``."""
    steps = sharding.ttt_steps
    context, queries, targets = sharding.context[rank], sharding.queries[rank], sharding.target_rows(rank)
    assert aux.shape[0] == rg.count(sharding.aux_rows(rank)) and target_hidden.shape[0] == rg.count(targets)
    trained, positions = [], []
    for number, rows in sharding.file_rows(queries):
        p = rg.rows(rows)
        trained.append(trained_steps(info[number].loss_mask, p, steps, alignment))
        positions.append(p)
    context_ids, context_positions = [], []
    for number, rows in sharding.file_rows(context):
        p = rg.rows(rows)
        context_ids.append(np.append(info[number].input_ids, 0)[p + 1])
        context_positions.append(p)
    ids = [info[number].input_ids[rg.rows(rows)] for number, rows in sharding.file_rows(targets)]
    wanted = rg.rows(queries)[:, None] + 1 + np.arange(steps)
    index = rg.rank_of(wanted.reshape(-1), targets).reshape(wanted.shape)
    ends = np.array([stop for _, stop in sharding.document_bounds()])
    inside = wanted < ends[np.searchsorted(ends, wanted[:, :1] - 1, side="right")]
    return Batch(
        sharding=sharding,
        names=tuple(names),
        aux=aux,
        context_index=_index(context, sharding.aux_rows(rank)),
        context_ids=_stack(context_ids),
        context_positions=_stack(context_positions),
        query_index=_index(queries, sharding.aux_rows(rank)),
        token_ids=_stack([*ids, np.zeros(1, dtype=np.int32)]),
        token_index=torch.from_numpy(np.ascontiguousarray(np.where(inside, index, rg.count(targets)).T)),
        query_positions=_stack(positions),
        target_hidden=target_hidden,
        target_index=torch.from_numpy(np.minimum(index, max(rg.count(targets) - 1, 0))),
        trained=torch.from_numpy(np.concatenate(trained)) if trained else torch.zeros(0, steps, dtype=torch.bool),
        target_token=_target_facts(sharding, info, targets, "target_token_id", torch.int64),
        target_logsumexp=_target_facts(sharding, info, targets, "target_logsumexp", torch.float32),
    )


def _index(members: rg.Ranges, held: rg.Ranges) -> Tensor | None:
    return None if rg.normalize(members) == rg.normalize(held) else torch.from_numpy(rg.index_in(members, held))


def _stack(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *parts]).astype(np.int64))


def _target_facts(sharding: SequenceSharding, info: Sequence[TokenLabels], targets: rg.Ranges, name: str, dtype: torch.dtype) -> Tensor | None:
    """The stored label facts of the target rows; None unless every document has them."""
    if any(getattr(f, name) is None for f in info):
        return None
    parts = [getattr(info[number], name)[rg.rows(rows)] for number, rows in sharding.file_rows(targets)]
    return torch.from_numpy(np.concatenate(parts)).to(dtype) if parts else torch.zeros(0, dtype=dtype)
