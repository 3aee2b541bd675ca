"""How the rows of a sequence are cut into parts, each with the kernels that are fastest for it. Integers on the host alone.

cuDNN's kernels are the fastest, but they know only rectangles and causal squares, and build a plan for each new shape
(90 ms for forward and backward). So:

    run      rows p = a .. b-1 that see keys lo .. p, at least ``min_run`` of them: one full block, keys [lo, a), and one
             causal square, keys [a, b). Very long runs are cut into pieces of ``LONG_RUN`` rows: 128K of them take 236 ms
             forward on an H200 instead of 260 in one square (docs/benchmarks/h200.md)
    stairs   rows of one document, however scattered: groups of them share a long run of keys, a full block, which is cut to
             a multiple of some number of keys so that few shapes occur. What is left of each row's keys is done the same way
             with smaller groups, and in the end left to Triton
    rows     anything else: Triton, which compiles no shape in
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np

from eagle_ds.model.attention import KeyBounds

LONG_RUN = 65536  # rows


class Block(NamedTuple):
    """Query rows [start, stop) of a part, all of which see the keys [first_key, last_key)."""

    start: int
    stop: int
    first_key: int
    last_key: int


class Part(NamedTuple):
    """Query rows [start, stop) and how they are attended."""

    start: int
    stop: int
    kind: Literal["causal run", "full run", "stairs", "rows"]
    blocks: tuple[Block, ...] = ()  # stairs: full blocks. Those of one row follow each other, from its document's first key on

    @property
    def size(self) -> int:
        """Rows."""
        return self.stop - self.start


@dataclass(frozen=True)
class Cut:
    """Sizes that decide. ``steps``: (rows of a group, keys that a block is a multiple of), each a multiple of the next."""

    min_run: int = 4096  # below it cuDNN's plan building and extra passes over dK/dV cost more than its kernels save
    steps: tuple[tuple[int, int], ...] = ((2048, 4096), (512, 4096))
    long_run: int = LONG_RUN

    def __post_init__(self) -> None:
        for coarse, fine in pairwise(self.steps):  # else a row might see fewer keys behind its blocks than the row before it
            assert all(a % b == 0 for a, b in zip(coarse, fine, strict=True)), self.steps

    def __call__(self, bounds: KeyBounds) -> Iterator[Part]:
        """Long runs, and between them stairs and other rows: all rows once, in order."""
        start = 0
        for a, b, causal in bounds.runs:
            if b - a >= self.min_run:
                yield from self._irregular(bounds, start, a)
                yield from self._pieces(a, b) if causal else [Part(a, b, "full run")]
                start = b
        yield from self._irregular(bounds, start, len(bounds.lo))

    def _pieces(self, start: int, stop: int) -> Iterator[Part]:
        """A causal run in pieces; the last is half as long again at most, as a short one would not pay for its shapes."""
        while stop - start > self.long_run * 3 // 2:
            yield Part(start, start + self.long_run, "causal run")
            start += self.long_run
        yield Part(start, stop, "causal run")

    def _irregular(self, bounds: KeyBounds, start: int, stop: int) -> Iterator[Part]:
        """Stairs of each document with rows enough, and the rows between them, joined."""
        edges = np.concatenate([[start], start + 1 + np.flatnonzero(np.diff(bounds.lo[start:stop])), [stop]])
        for i in np.flatnonzero(np.diff(edges) >= self.steps[-1][0]).tolist():  # a window has as many edges as rows
            a, b = int(edges[i]), int(edges[i + 1])
            blocks = list(_full_blocks(bounds.hi[a:b], int(bounds.lo[a]), 0, b - a, self.steps))
            if not blocks:
                continue
            first, last = min(block.start for block in blocks), max(block.stop for block in blocks)
            if a + first > start:
                yield Part(start, a + first, "rows")
            start = a + last
            own = tuple(block._replace(start=block.start - first, stop=block.stop - first) for block in blocks)
            yield Part(a + first, start, "stairs", own)
        if start < stop:
            yield Part(start, stop, "rows")


FORWARD = Cut()
BACKWARD = Cut(steps=((8192, 4096), (4096, 4096), *FORWARD.steps))  # dK and dV of a block are summed once for all its rows


def _full_blocks(hi: np.ndarray, seen: int, start: int, stop: int, steps: Sequence[tuple[int, int]]) -> Iterator[Block]:
    """Blocks of the rows [start, stop) beyond the key ``seen``, by groups of the first step; inside each group, and of the
    rows that are left over, by the next."""
    (rows, keys), finer = steps[0], steps[1:]
    ends = range(start + rows, stop + 1, rows)
    for end in ends:
        shared = max(int(hi[end - rows]) - seen, 0) // keys * keys
        if shared:
            yield Block(end - rows, end, seen, seen + shared)
        if finer:
            yield from _full_blocks(hi, seen + shared, end - rows, end, finer)
    if finer:
        yield from _full_blocks(hi, seen, ends[-1] if ends else start, stop, finer)


def keys_behind(bounds: KeyBounds, part: Part) -> np.ndarray:
    """int64 [rows of the part]: the first key of each row that is in no block."""
    first = bounds.lo[part.start : part.stop].copy()
    for block in part.blocks:
        first[block.start : block.stop] = block.last_key
    return first


def run_blocks(bounds: KeyBounds, causal: bool) -> Iterator[tuple[slice, bool]]:
    """(keys, whether it is a causal square) of the rows of one run."""
    lo, first, last = int(bounds.lo[0]), int(bounds.hi[0]), int(bounds.hi[-1])
    if last <= lo:
        return
    if not causal:
        yield slice(lo, last), False
        return
    if lo < first - 1:
        yield slice(lo, first - 1), False
    yield slice(first - 1, last), True
