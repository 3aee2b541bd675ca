"""Build one rank's share of one micro-batch.

The sharding says which rows of the sequence a rank computes on. This module turns that into index tensors
over the rows that the rank has read, so that the model needs no knowledge of documents, packs or ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from eagle_ds.sharding import ranges as rg
from eagle_ds.sharding.sequence import Alignment, SequenceSharding


@dataclass
class TokenLabels:
    """The per-token arrays of one document: token ids, loss mask, and the target's labels if stored.

    Every rank reads them whole: they are small, and TTT steps look ahead past the borders between ranks.
    """

    input_ids: np.ndarray  # int32 [S]
    loss_mask: np.ndarray  # uint8 [S]
    target_token_id: np.ndarray | None = None  # int32 [S], argmax of the target's logits
    target_logsumexp: np.ndarray | None = None  # float32 [S], log-sum-exp of the same logits


@dataclass
class Batch:
    """The input of the draft: C context rows, N query rows, and the rows read from the store.

    M_aux rows of the auxiliary states and M_target target rows were read. Index tensors point into those.
    Query row p is trained at TTT step k if ``trained[p, k]`` is set; its label then comes from target row
    ``target_index[p, k]``.

    ``target_token`` and ``target_logsumexp`` are None if the store has no labels; the reader then computes
    them with ``target.head.argmax_and_logsumexp``.
    """

    sharding: SequenceSharding
    names: tuple[str, ...]
    aux: Tensor  # [M_aux, A*H]
    context_index: Tensor | None  # int64 [C], into aux; None: context rows are all rows of aux, in order
    context_ids: Tensor  # int64 [C], x[p+1]
    context_positions: Tensor  # int64 [C], rope position inside the document
    query_index: Tensor | None  # int64 [N], into aux; None as above
    token_ids: Tensor  # int64 [M_target + 1], x of the target rows; last: token 0, past a document's end
    token_index: Tensor  # int64 [T, N], x[p+1+k] of row p at step k, into token_ids
    query_positions: Tensor  # int64 [N]
    target_hidden: Tensor  # [M_target, H]
    target_index: Tensor  # int64 [N, T], into target_hidden
    trained: Tensor  # bool [N, T], by mask alone
    target_token: Tensor | None  # int64 [M_target], argmax over the full vocabulary
    target_logsumexp: Tensor | None  # float32 [M_target]

    def to(
        self, device: torch.device | str, *, float_dtype: torch.dtype | None = None,
        non_blocking: bool = False,
    ) -> Batch:
        """Copy the batch to ``device``; hidden states are converted to ``float_dtype`` if given."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in moved.items():
            if isinstance(value, Tensor):
                cast = float_dtype if name in ("aux", "target_hidden") else None
                moved[name] = value.to(device, dtype=cast or value.dtype, non_blocking=non_blocking)
        return replace(self, **moved)


def counted_rows(trained: Tensor, token: Tensor, index: Tensor, t2d: Tensor) -> Tensor:
    """Return which (row, TTT step) pairs count, bool [N, T].

    A pair counts if it is trained and the argmax of its label is in the draft vocabulary.

    Args:
        trained: bool [N, T], by the loss mask alone.
        token: int64 [M], the target's argmax at each target row.
        index: int64 [N, T], the target row of each pair.
        t2d: bool [V], whether a target token is in the draft vocabulary.
    """
    return trained & t2d[token[index]] if len(token) else torch.zeros_like(trained)


def trained_pairs(mask: np.ndarray, rows: np.ndarray, ttt_steps: int, alignment: Alignment) -> np.ndarray:
    """Return which (row, TTT step) pairs are trained by the loss mask alone: bool [len(rows), T].

    With ``serving`` alignment row p is trained at step k if every token from x[p+1] (just sampled) to
    x[p+2+k] (being predicted) is trained. With ``feature`` alignment it is trained if m[p+k] is set, where
    m[S-1] counts as 0.

    Args:
        mask: the loss mask of one document, uint8 [S].
        rows: int64, rows p of that document.
    """
    size = len(mask)
    steps = np.arange(ttt_steps)
    if alignment == "feature":
        padded = np.concatenate([mask[:-1] != 0, np.zeros(ttt_steps + 1, dtype=bool)])
        return padded[rows[:, None] + steps]
    # Prefix sums answer "is any token of x[p+1 .. p+2+k] untrained?" for all pairs at once: the counts of
    # untrained tokens before both ends are equal exactly if there is none between them.
    untrained_before = np.concatenate([[0], np.cumsum(mask == 0)])
    stop = rows[:, None] + 3 + steps
    inside = stop <= size
    at_start = untrained_before[np.minimum(rows + 1, size)][:, None]
    return inside & (untrained_before[np.minimum(stop, size)] == at_start)


def assemble(
    sharding: SequenceSharding, rank: int, documents: Sequence[TokenLabels], aux: Tensor,
    target_hidden: Tensor, *, alignment: Alignment, names: Sequence[str] = (),
) -> Batch:
    """Build the batch of sequence-parallel rank ``rank``.

    Args:
        documents: token arrays of the sequence's documents, whole.
        aux: rows ``sharding.aux_rows(rank)``.
        target_hidden: rows ``sharding.target_rows(rank)``.
        names: sample ids of the documents.
    """
    steps = sharding.ttt_steps
    context, queries, targets = sharding.context[rank], sharding.queries[rank], sharding.target_rows(rank)
    held = sharding.aux_rows(rank)
    assert aux.shape[0] == rg.count(held) and target_hidden.shape[0] == rg.count(targets)

    def gather(rows: rg.Ranges, value: Callable[[TokenLabels, np.ndarray], np.ndarray]) -> list[np.ndarray]:
        """Return ``value(document, p)`` for each document; p numbers ``rows`` within the document."""
        return [value(documents[number], rg.rows(own)) for number, own in sharding.file_rows(rows)]

    def labels(name: str, dtype: torch.dtype) -> Tensor | None:
        if any(getattr(document, name) is None for document in documents):
            return None
        parts = gather(targets, lambda document, p: getattr(document, name)[p])
        return torch.from_numpy(np.concatenate(parts)).to(dtype) if parts else torch.zeros(0, dtype=dtype)

    token_index, target_index = _label_indices(sharding, rank)
    trained = gather(queries, lambda document, p: trained_pairs(document.loss_mask, p, steps, alignment))
    target_ids = gather(targets, lambda document, p: document.input_ids[p])
    # The zero appended to input_ids stands for x[S], which a document's last row would read.
    context_ids = gather(context, lambda document, p: np.append(document.input_ids, 0)[p + 1])
    return Batch(
        sharding=sharding, names=tuple(names), aux=aux, target_hidden=target_hidden,
        context_index=_index(context, held),
        context_ids=_concatenate(context_ids),
        context_positions=_concatenate(gather(context, lambda _, p: p)),
        query_index=_index(queries, held),
        token_ids=_concatenate([*target_ids, np.zeros(1, dtype=np.int32)]),
        token_index=token_index,
        query_positions=_concatenate(gather(queries, lambda _, p: p)),
        target_index=target_index,
        trained=torch.from_numpy(np.concatenate([np.zeros((0, steps), dtype=bool), *trained])),
        target_token=labels("target_token_id", torch.int64),
        target_logsumexp=labels("target_logsumexp", torch.float32))


def _label_indices(sharding: SequenceSharding, rank: int) -> tuple[Tensor, Tensor]:
    """Return token_index [T, N] and target_index [N, T] of the rank's query rows, both int64.

    Row p at TTT step k reads token x[p+1+k], and its label comes from the hidden state of row p+1+k. Past the
    end of p's document neither exists. There the token index points to the extra token 0, and the target
    index to the next held row or the last one. Such a pair is never trained, but ``model/loss.py`` needs
    indices that ascend.
    """
    queries, targets = sharding.queries[rank], sharding.target_rows(rank)
    label_rows = rg.rows(queries)[:, None] + 1 + np.arange(sharding.ttt_steps)
    index = rg.places_before(label_rows.reshape(-1), targets).reshape(label_rows.shape)
    ends = np.array([stop for _, stop in sharding.document_bounds()])
    # label_rows[:, 0] - 1 is p itself: the first end after p is the end of p's document.
    inside = label_rows < ends[np.searchsorted(ends, label_rows[:, :1] - 1, side="right")]
    token_index = np.where(inside, index, rg.count(targets)).T
    target_index = np.minimum(index, max(rg.count(targets) - 1, 0))
    return torch.from_numpy(np.ascontiguousarray(token_index)), torch.from_numpy(target_index)


def _index(rows: rg.Ranges, held: rg.Ranges) -> Tensor | None:
    """Return the indices of ``rows`` in ``held``; None if both are the same rows, so no gather is needed."""
    return None if rg.normalize(rows) == rg.normalize(held) else torch.from_numpy(rg.index_in(rows, held))


def _concatenate(parts: list[np.ndarray]) -> Tensor:
    """Concatenate integer arrays to int64; no parts give an empty tensor."""
    return torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *parts]).astype(np.int64))
