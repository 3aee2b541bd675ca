"""The sharding plan: which rank owns which rows of one (packed) sequence. Integers only.

Three kinds of rows (DESIGN: "only trained rows need queries"):

    context rows   a rank computes K_0 and V_0 for them          all S rows, split evenly
    query rows     a rank unrolls the T steps for them           the N trained rows, split evenly
    target rows    hidden states a rank's labels are made from   its query rows + 1 + k

Every rank computes the same plan from lengths and trained spans, so nobody has to ask. Sequence-parallel rank
``ring_rank * ulysses + ulysses_rank`` owns a slice of what its ring rank owns. A ring rank's context is two pieces,
one from each end of the sequence (zigzag), so that a causal mask loads all ring ranks alike in every rotation; its
query rows are pieces dealt out so that both row counts and attended keys balance, whatever the mask looks like.
Inside a ring rank Ulysses splits heads, which balances attention by itself, so rows are simply cut into equal runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from eagle_ds.sharding import ranges as rg
from eagle_ds.sharding.ranges import Range, Ranges

CHUNK_ROWS = 64  # rows of one HDF5 chunk: cuts that fall on a chunk border inflate no chunk twice
MIN_ALIGNED_PIECE = 8 * CHUNK_ROWS  # shorter pieces are cut anywhere: balance matters more there
MAX_IMBALANCE = 1.02  # busiest ring rank / mean, above which query pieces are cut finer
MAX_PIECES_PER_RANK = 32

Alignment = Literal["serving", "feature"]
RingMode = Literal["gather", "p2p"]


@dataclass(frozen=True)
class Document:
    """One sample: its length and where its loss mask is 1, as half-open token spans."""

    num_tokens: int
    trained_spans: Ranges

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ValueError(f"a sample has {self.num_tokens} tokens; at least 1 is needed")
        spans = rg.normalize(self.trained_spans)
        if spans and (spans[0][0] < 0 or spans[-1][1] > self.num_tokens):
            raise ValueError(f"trained spans {spans} reach outside the sample's {self.num_tokens} tokens")
        object.__setattr__(self, "trained_spans", spans)

    def trained_rows(self, ttt_steps: int, alignment: Alignment) -> Ranges:
        """Rows that count at some step by mask alone (DESIGN section 2).

        ``serving``: row p needs x[p+1] and x[p+2] trained. ``feature``: m[p+k] for some k < T, with m[S-1] = 0.
        """
        if alignment == "serving":
            return rg.normalize((max(a - 1, 0), b - 2) for a, b in self.trained_spans)
        spans = rg.clip(self.trained_spans, 0, self.num_tokens - 1)
        return rg.normalize((max(a - ttt_steps + 1, 0), b) for a, b in spans)


@dataclass(frozen=True)
class SequenceSharding:
    """Who owns what in one sequence of documents laid end to end; rows are numbered over the whole sequence.

    ``context[i]`` and ``queries[i]`` belong to sequence-parallel rank i; the ranks of one ring rank, taken in
    order, hold ascending rows, so concatenating their shares gives the ring rank's rows sorted.
    """

    documents: tuple[Document, ...]
    ulysses: int
    ring: int
    ring_mode: RingMode
    ttt_steps: int
    context: tuple[Ranges, ...]
    queries: tuple[Ranges, ...]

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First row of each document, and the sequence's length last."""
        starts = [0]
        for document in self.documents:
            starts.append(starts[-1] + document.num_tokens)
        return tuple(starts)

    @property
    def num_tokens(self) -> int:
        """Rows of the sequence, S."""
        return self.starts[-1]

    @property
    def num_queries(self) -> int:
        """Query rows of all ranks, N."""
        return sum(map(rg.count, self.queries))

    @property
    def world(self) -> int:
        """Sequence-parallel size, P."""
        return self.ulysses * self.ring

    def aux_rows(self, rank: int) -> Ranges:
        """Rows whose auxiliary hidden states ``rank`` reads: context and query rows, each once."""
        return rg.normalize((*self.context[rank], *self.queries[rank]))

    def target_rows(self, rank: int) -> Ranges:
        """Rows whose final hidden state ``rank`` reads: p + 1 + k of its query rows, inside p's document."""
        wanted = []
        for start, stop in self.document_bounds():
            for a, b in rg.clip(self.queries[rank], start, stop):
                wanted.append((a + 1, min(b + self.ttt_steps, stop)))
        return rg.normalize(wanted)

    def document_bounds(self) -> tuple[Range, ...]:
        """[start, stop) of each document."""
        return tuple(zip(self.starts[:-1], self.starts[1:], strict=True))

    def file_rows(self, wanted: Sequence[Range]) -> list[tuple[int, Ranges]]:
        """``wanted`` rows of the sequence as (document number, rows inside that document), in order, empty ones left out."""
        parts = []
        for number, (start, stop) in enumerate(self.document_bounds()):
            inside = rg.clip(wanted, start, stop)
            if inside:
                parts.append((number, rg.shift(inside, -start)))
        return parts

    def ring_context(self, ring_rank: int) -> Ranges:
        """Context rows held by all Ulysses ranks of ``ring_rank``, sorted."""
        return self._ring_share(self.context, ring_rank)

    def ring_queries(self, ring_rank: int) -> Ranges:
        """Query rows of all Ulysses ranks of ``ring_rank``, sorted."""
        return self._ring_share(self.queries, ring_rank)

    def _ring_share(self, shares: tuple[Ranges, ...], ring_rank: int) -> Ranges:
        own = shares[ring_rank * self.ulysses : (ring_rank + 1) * self.ulysses]
        return tuple(r for share in own for r in share)

    def attention_work(self, ring_rank: int) -> int:
        """Query-key pairs of step 0 that ``ring_rank`` computes, per head."""
        return _attended_keys(self.ring_queries(ring_rank), self.document_bounds())

    @property
    def balance(self) -> dict[str, float]:
        """Busiest rank / mean rank, for the rows that a rank owns and the keys that a ring rank attends to."""
        return {
            "context": _imbalance([rg.count(r) for r in self.context]),
            "queries": _imbalance([rg.count(r) for r in self.queries]),
            "attention": _imbalance([self.attention_work(r) for r in range(self.ring)]),
        }

    @cached_property
    def digest(self) -> str:
        """Short hash of every number in the plan; ranks compare it."""
        return hashlib.sha256(
            repr((self.documents, self.ulysses, self.ring, self.ring_mode, self.context, self.queries)).encode()
        ).hexdigest()[:16]


def shard_sequence(
    documents: Sequence[Document],
    *,
    ulysses: int = 1,
    ring: int = 1,
    ring_mode: RingMode = "gather",
    ttt_steps: int = 7,
    alignment: Alignment = "serving",
    trained_rows_only: bool = True,
) -> SequenceSharding:
    """The plan for ``documents`` packed end to end. Raises ValueError if there are none."""
    if not documents:
        raise ValueError("a sequence needs at least one document")
    starts = [0]
    for document in documents:
        starts.append(starts[-1] + document.num_tokens)
    bounds = tuple(zip(starts[:-1], starts[1:], strict=True))
    context = _split_context(starts[-1], ulysses, ring)
    if trained_rows_only:
        trained = [rg.shift(doc.trained_rows(ttt_steps, alignment), start) for doc, start in zip(documents, starts, strict=False)]
        queries = _split_queries(tuple(r for part in trained for r in part), bounds, ulysses, ring)
    else:
        queries = context
    return SequenceSharding(tuple(documents), ulysses, ring, ring_mode, ttt_steps, context, queries)


def _cuts(total: int, pieces: int, align: int) -> list[int]:
    """``pieces + 1`` cut points of [0, total), even to within one unit of ``align`` rows."""
    units = -(-total // align)
    return [min(units * i // pieces * align, total) for i in range(pieces)] + [total]


def _split_context(num_tokens: int, ulysses: int, ring: int) -> tuple[Ranges, ...]:
    """Zigzag over ring ranks, then equal runs over Ulysses ranks."""
    pieces = 2 * ring if ring > 1 else 1
    align = CHUNK_ROWS if num_tokens // (ulysses * ring) >= MIN_ALIGNED_PIECE else 1
    cuts = _cuts(num_tokens, pieces, align)
    shares: list[Ranges] = []
    for r in range(ring):
        own = rg.normalize([(cuts[i], cuts[i + 1]) for i in sorted({r, pieces - 1 - r} if ring > 1 else {0})])
        shares.extend(_split_evenly(own, ulysses, align))
    return tuple(shares)


def _split_evenly(own: Ranges, parts: int, align: int = 1) -> list[Ranges]:
    cuts = _cuts(rg.count(own), parts, align)
    return [rg.take(own, cuts[i], cuts[i + 1]) for i in range(parts)]


def _split_queries(trained: Ranges, bounds: Sequence[Range], ulysses: int, ring: int) -> tuple[Ranges, ...]:
    """Deal pieces of the trained rows to ring ranks, cut finer until their attention work balances."""
    per_rank = 2 if ring > 1 else 1
    while True:
        dealt = _deal(trained, bounds, ring, per_rank)
        work = [_attended_keys(share, bounds) for share in dealt]
        if _imbalance(work) <= MAX_IMBALANCE or per_rank >= MAX_PIECES_PER_RANK or rg.count(trained) < ring * per_rank * CHUNK_ROWS:
            break
        per_rank *= 2
    return tuple(part for share in dealt for part in _split_evenly(share, ulysses))


def _deal(trained: Ranges, bounds: Sequence[Range], ring: int, per_rank: int) -> list[Ranges]:
    """Equal pieces, heaviest first, each to the least loaded ring rank that still lacks pieces."""
    cuts = _cuts(rg.count(trained), ring * per_rank, 1)
    pieces = [rg.take(trained, a, b) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
    work = [_attended_keys(piece, bounds) for piece in pieces]
    owned: list[list[int]] = [[] for _ in range(ring)]
    load = [0] * ring
    for i in sorted(range(len(pieces)), key=lambda i: (-work[i], i)):
        rank = min((r for r in range(ring) if len(owned[r]) < per_rank), key=lambda r: (load[r], r))
        owned[rank].append(i)
        load[rank] += work[i]
    return [rg.normalize(r for i in sorted(mine) for r in pieces[i]) for mine in owned]


def _attended_keys(rows: Ranges, bounds: Sequence[Range]) -> int:
    """Sum over rows of how many keys of their own document they see, themselves included."""
    total = 0
    for start, stop in bounds:
        for a, b in rg.clip(rows, start, stop):
            total += (b - a) * (a - start + b - start + 1) // 2
    return total


def _imbalance(loads: Sequence[int]) -> float:
    mean = sum(loads) / len(loads)
    return max(loads) / mean if mean else 1.0
