"""The sharding of one (packed) sequence: which rank owns which rows. Integers only.

There are three kinds of rows (docs/maths.md, section 3: only trained rows need queries):

    context rows   the rank computes K_0 and V_0 for them         all S rows, split evenly
    query rows     the rank unrolls the T TTT steps for them      the N trained rows, split evenly
    target rows    the rank reads their target hidden states,     rows p + 1 + k of its query rows p
                   which are the labels of its query rows

Every rank computes the same sharding from document lengths and trained spans, so no communication is needed.
Sequence-parallel rank ``ring_rank * ulysses + ulysses_rank`` owns a slice of its ring rank's rows.

The split over ring ranks balances causal attention, where later rows attend to more keys. A ring rank owns
two pieces of the context, one from each end of the sequence (zigzag). Where all rows are query rows, this
gives all ring ranks equal work in every hop of a rotation. Example, ring = 2:

    rows of the sequence   0 ......................... S
    pieces                 |  0  |  1  |  2  |  3  |
    ring rank              |  0  |  1  |  1  |  0  |

Query rows may be anywhere, since masks differ. They are split into pieces that are dealt to ring ranks so
that both row counts and attended keys balance. Within a ring rank Ulysses splits heads, so every rank attends
to all the rows of its ring rank, and the rows are simply split into equal runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from eagle_ds.sharding import ranges as rg
from eagle_ds.sharding.ranges import Range, Ranges

# Rows of one HDF5 chunk. Context shares end at multiples of it, so that two ranks need not decompress the
# same chunk. (Packing shifts documents against this grid, so then some chunks are read twice.)
CHUNK_ROWS = 64
# Rows of a rank from which on shares are aligned. Smaller shares may end anywhere, because for them an even
# split matters more.
MIN_ALIGNED_SHARE = 8 * CHUNK_ROWS
MAX_IMBALANCE = 1.02  # attention work of the busiest ring rank / mean; above it query pieces are made smaller
MAX_PIECES_PER_RANK = 32  # but no more pieces than this for each ring rank

Alignment = Literal["serving", "feature"]
RingMode = Literal["gather", "p2p"]


@dataclass(frozen=True)
class Document:
    """One sample: its length in tokens, and where its loss mask is 1, as half-open token spans."""

    num_tokens: int
    trained_spans: Ranges

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ValueError(f"a sample has {self.num_tokens} tokens; at least 1 is needed")
        spans = rg.normalize(self.trained_spans)
        if spans and (spans[0][0] < 0 or spans[-1][1] > self.num_tokens):
            raise ValueError(f"trained spans {spans} reach outside the sample's {self.num_tokens} tokens")
        object.__setattr__(self, "trained_spans", spans)  # the class is frozen

    def trained_rows(self, ttt_steps: int, alignment: Alignment) -> Ranges:
        """Return the rows that are trained at some TTT step, by the loss mask m alone (docs/maths.md).

        ``serving``: row p needs tokens p+1 (just sampled) and p+2 (predicted) trained; later steps need more.
        ``feature``: row p needs m[p+k] = 1 for some k < T, where m[S-1] is taken as 0.
        """
        if alignment == "serving":
            # p + 1 >= a and p + 2 <= b - 1, so p is in [a - 1, b - 2).
            return rg.normalize((max(a - 1, 0), b - 2) for a, b in self.trained_spans)
        # a <= p + k < b for some k in [0, T), so p is in [a - T + 1, b).
        spans = rg.clip(self.trained_spans, 0, self.num_tokens - 1)
        return rg.normalize((max(a - ttt_steps + 1, 0), b) for a, b in spans)


@dataclass(frozen=True)
class SequenceSharding:
    """Who owns which rows of one sequence, in which rows of all documents are numbered consecutively.

    ``context[i]`` and ``queries[i]`` belong to sequence-parallel rank i. The Ulysses ranks of one ring rank
    own ascending rows in order, so their shares, concatenated, are the ring rank's rows, sorted.
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
        """The first row of each document, and the sequence's length at the end."""
        return _starts(self.documents)

    @property
    def num_tokens(self) -> int:
        """Rows of the sequence, S."""
        return self.starts[-1]

    @property
    def num_queries(self) -> int:
        """Query rows of all ranks together, N."""
        return sum(map(rg.count, self.queries))

    @property
    def world(self) -> int:
        """Number of ranks that share the sequence, P."""
        return self.ulysses * self.ring

    def aux_rows(self, rank: int) -> Ranges:
        """Return the rows whose auxiliary hidden states ``rank`` reads: its context and query rows."""
        return rg.normalize((*self.context[rank], *self.queries[rank]))

    def target_rows(self, rank: int) -> Ranges:
        """Return the rows whose final hidden state ``rank`` reads: p + 1 + k of its query rows p."""
        wanted = []
        for start, stop in self.document_bounds():
            for a, b in rg.clip(self.queries[rank], start, stop):
                # Rows a .. b-1 at steps 0 .. T-1 have labels at a+1 .. b-1+T.
                wanted.append((a + 1, min(b + self.ttt_steps, stop)))
        return rg.normalize(wanted)

    def document_bounds(self) -> tuple[Range, ...]:
        """Return the rows [start, stop) of each document."""
        return _bounds(self.starts)

    def file_rows(self, wanted: Sequence[Range]) -> list[tuple[int, Ranges]]:
        """Translate rows of the sequence to (document number, rows within that document), in order.

        Documents without wanted rows are left out.
        """
        parts = []
        for number, (start, stop) in enumerate(self.document_bounds()):
            inside = rg.clip(wanted, start, stop)
            if inside:
                parts.append((number, rg.shift(inside, -start)))
        return parts

    def ring_context(self, ring_rank: int) -> Ranges:
        """Return the context rows of all Ulysses ranks of ``ring_rank``, sorted."""
        return self._ring_share(self.context, ring_rank)

    def ring_queries(self, ring_rank: int) -> Ranges:
        """Return the query rows of all Ulysses ranks of ``ring_rank``, sorted."""
        return self._ring_share(self.queries, ring_rank)

    def _ring_share(self, shares: tuple[Ranges, ...], ring_rank: int) -> Ranges:
        own = shares[ring_rank * self.ulysses : (ring_rank + 1) * self.ulysses]
        return tuple(r for share in own for r in share)

    def attention_work(self, ring_rank: int) -> int:
        """Count the query-key pairs of TTT step 0 that ``ring_rank`` computes, for one head."""
        return _attended_keys(self.ring_queries(ring_rank), self.document_bounds())

    @property
    def balance(self) -> dict[str, float]:
        """Busiest / mean: of the rows that each rank owns, and of the keys that each ring rank attends to."""
        return {
            "context": _imbalance([rg.count(r) for r in self.context]),
            "queries": _imbalance([rg.count(r) for r in self.queries]),
            "attention": _imbalance([self.attention_work(r) for r in range(self.ring)]),
        }

    @cached_property
    def digest(self) -> str:
        """A short hash of all fields. Ranks compare it."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]


def shard_sequence(
    documents: Sequence[Document], *, ulysses: int = 1, ring: int = 1, ring_mode: RingMode = "gather",
    ttt_steps: int = 7, alignment: Alignment = "serving", trained_rows_only: bool = True,
) -> SequenceSharding:
    """Split the concatenated ``documents`` over ulysses * ring ranks. Raises ValueError if there are none.

    With ``trained_rows_only`` False every row is a query row, and belongs to the rank that has it as context
    row.
    """
    if not documents:
        raise ValueError("a sequence needs at least one document")
    starts = _starts(documents)
    context = _split_context(starts[-1], ulysses, ring)
    queries = context
    if trained_rows_only:
        trained: list[Range] = []
        for document, start in zip(documents, starts, strict=False):  # starts has one entry more, the length
            trained += rg.shift(document.trained_rows(ttt_steps, alignment), start)
        queries = _split_queries(tuple(trained), _bounds(starts), ulysses, ring)
    return SequenceSharding(tuple(documents), ulysses, ring, ring_mode, ttt_steps, context, queries)


def _starts(documents: Sequence[Document]) -> tuple[int, ...]:
    """Return the first row of each document, and the total length."""
    starts = [0]
    for document in documents:
        starts.append(starts[-1] + document.num_tokens)
    return tuple(starts)


def _bounds(starts: Sequence[int]) -> tuple[Range, ...]:
    """Pair every entry with the next one: n + 1 borders -> n ranges."""
    return tuple(zip(starts[:-1], starts[1:], strict=True))


def _borders(total: int, pieces: int, align: int) -> list[int]:
    """Return ``pieces + 1`` borders that split [0, total) evenly, at multiples of ``align``."""
    units = -(-total // align)  # rounded up; the last unit may be short
    return [min(units * i // pieces * align, total) for i in range(pieces)] + [total]


def _split_context(num_tokens: int, ulysses: int, ring: int) -> tuple[Ranges, ...]:
    """Split all rows zigzag over ring ranks, then in equal runs over Ulysses ranks."""
    pieces = 2 * ring if ring > 1 else 1
    align = CHUNK_ROWS if num_tokens // (ulysses * ring) >= MIN_ALIGNED_SHARE else 1
    bounds = _bounds(_borders(num_tokens, pieces, align))
    shares: list[Ranges] = []
    for r in range(ring):
        # Piece r from the front and piece r from the back. They are one and the same where ring is 1.
        own = rg.normalize([bounds[r], bounds[pieces - 1 - r]])
        shares.extend(_split_evenly(own, ulysses, align))
    return tuple(shares)


def _split_evenly(own: Ranges, parts: int, align: int = 1) -> list[Ranges]:
    """Split the rows of ``own``, in order, into ``parts`` runs of equal length."""
    return [rg.take(own, a, b) for a, b in _bounds(_borders(rg.count(own), parts, align))]


def _split_queries(trained: Ranges, bounds: Sequence[Range], ulysses: int, ring: int) -> tuple[Ranges, ...]:
    """Deal pieces of the trained rows to ring ranks, smaller ones until their attention work balances."""
    per_rank = 2 if ring > 1 else 1
    while True:
        dealt = _deal(trained, bounds, ring, per_rank)
        balanced = _imbalance([_attended_keys(share, bounds) for share in dealt]) <= MAX_IMBALANCE
        too_small = rg.count(trained) < ring * per_rank * CHUNK_ROWS  # the pieces are below 64 rows already
        if balanced or too_small or per_rank >= MAX_PIECES_PER_RANK:
            break
        per_rank *= 2
    return tuple(part for share in dealt for part in _split_evenly(share, ulysses))


def _deal(trained: Ranges, bounds: Sequence[Range], ring: int, per_rank: int) -> list[Ranges]:
    """Split into equal pieces and give ``per_rank`` of them to each ring rank, balancing attention work.

    Greedy: the piece with the most work first, to the ring rank with the least work that still needs pieces.
    Equal pieces, equally many for each rank, also make row counts equal.
    """
    pieces = _split_evenly(trained, ring * per_rank)
    work = [_attended_keys(piece, bounds) for piece in pieces]
    owned: list[list[int]] = [[] for _ in range(ring)]
    load = [0] * ring
    # Ties go by piece and rank number: all ranks must come to the same result.
    for i in sorted(range(len(pieces)), key=lambda i: (-work[i], i)):
        rank = min((r for r in range(ring) if len(owned[r]) < per_rank), key=lambda r: (load[r], r))
        owned[rank].append(i)
        load[rank] += work[i]
    return [rg.normalize(r for i in mine for r in pieces[i]) for mine in owned]


def _attended_keys(rows: Ranges, bounds: Sequence[Range]) -> int:
    """Count the keys that ``rows`` attend to: those of the row's own document, up to the row itself."""
    total = 0
    for start, stop in bounds:
        for a, b in rg.clip(rows, start, stop):
            # Rows a .. b-1 see a-start+1, ..., b-start keys: an arithmetic series, rows * (first + last) / 2.
            total += (b - a) * (a - start + b - start + 1) // 2
    return total


def _imbalance(loads: Sequence[int]) -> float:
    """Return the largest load / the mean; 1 where all are 0."""
    mean = sum(loads) / len(loads)
    return max(loads) / mean if mean else 1.0
