"""How the rows of a sequence are cut into parts, each with the kernels that are fastest for it. Integers on the host alone.

cuDNN's kernels are the fastest, but they know only rectangles and causal squares, and build a plan for each new shape
(90 ms for forward and backward). So rows are cut into few shapes, the same ones whatever the lengths of documents and turns:

    run      rows p = a .. b-1 that see keys lo .. p: a causal square, a multiple of ``square`` rows that begins such a multiple
             behind lo, and in front of it rectangles whose sides are that times a power of two. Very long runs come in
             pieces of ``long_run`` rows: 128K of them take 236 ms forward on an H200 instead of 260 in one square
             (docs/benchmarks/h200.md)
    stairs   any other rows of one document, however scattered: groups of them share a long run of keys, full blocks, cut to a
             multiple of some number of keys. What is left of each row's keys is done the same way with smaller groups, and in
             the end left to Triton, which compiles no shape in
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from eagle_ds.model.attention import KeyBounds

WIDE = 32  # heads that the steps below were chosen with


class Block(NamedTuple):
    """Query rows [start, stop) of a part, all of which see the keys [first_key, last_key)."""

    start: int
    stop: int
    first_key: int
    last_key: int


class Part(NamedTuple):
    """Query rows [start, stop) and how they are attended: by full blocks, and behind them a causal square or single intervals."""

    start: int
    stop: int
    blocks: tuple[Block, ...] = ()  # those of one row follow each other, from its document's first key on
    square: int | None = None  # row i of the part also sees the keys [square, square + i], and has none left then

    @property
    def size(self) -> int:
        """Rows."""
        return self.stop - self.start


@dataclass(frozen=True)
class Cut:
    """Sizes that decide. ``steps`` of stairs: (rows of a group, keys that a block is a multiple of), each a multiple of the next."""

    steps: tuple[tuple[int, int], ...] = ((2048, 4096), (512, 4096))
    square: int = 4096  # below it cuDNN's plan building and extra passes over dK/dV cost more than its kernels save
    long_run: int = 65536  # rows, and keys of a run's rectangle
    long_block: int = 32768  # keys of a group's block: beside it cuDNN's backward needs 512 bytes a query head and key

    def __post_init__(self) -> None:
        for coarse, fine in pairwise(self.steps):  # else a row might see fewer keys behind its blocks than the row before it
            assert all(a % b == 0 for a, b in zip(coarse, fine, strict=True)), self.steps
        assert not any(self.long_block % keys for _, keys in self.steps), self

    def of_heads(self, heads: int) -> Cut:
        """Larger groups for fewer heads: a forward's rows and heads are all that can fill a GPU."""
        scale = max(WIDE // heads, 1)
        return replace(self, steps=tuple((rows * scale, keys) for rows, keys in self.steps))

    def __call__(self, bounds: KeyBounds) -> Iterator[Part]:
        """Runs, and between them other rows: all rows once, in order."""
        start = 0
        for a, b, causal in bounds.runs:
            if not causal or b - a < self.square:
                continue
            lo, own = int(bounds.lo[a]), int(bounds.hi[a]) - 1
            a += -(own - lo) % self.square
            b -= (b - a) % self.square
            if b > a:
                yield from self._stairs(bounds, start, a)
                yield from self._run(a, b, lo, int(bounds.hi[a]) - 1)
                start = b
        yield from self._stairs(bounds, start, len(bounds.lo))

    def _run(self, start: int, stop: int, lo: int, own: int) -> Iterator[Part]:
        """The rows [start, stop), the first of which stands at the key ``own``, in pieces; the last is half as long again at most,
        as a short one would not pay for its shapes."""
        while start < stop:
            end = stop if stop - start <= self.long_run * 3 // 2 else start + self.long_run
            rows, keys = list(self._sides(0, end - start)), list(self._sides(lo, own))
            yield Part(start, end, tuple(Block(*r, *k) for r in rows for k in keys), own)
            start, own = end, own + end - start

    def _sides(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """[start, stop) in powers of two times ``square``, the largest first."""
        while start < stop:
            side = self.square
            while 2 * side <= min(stop - start, self.long_run):
                side *= 2
            yield start, start + side
            start += side

    def _stairs(self, bounds: KeyBounds, start: int, stop: int) -> Iterator[Part]:
        """The rows [start, stop), with the full blocks of each document in them; in one part, unless windows overlap."""
        blocks: list[Block] = []
        edges = np.concatenate([[start], start + 1 + np.flatnonzero(np.diff(bounds.lo[start:stop])), [stop]])
        for i in np.flatnonzero(np.diff(edges) >= self.steps[-1][0]).tolist():  # a window has as many edges as rows
            a, b = int(edges[i]), int(edges[i + 1])
            blocks += _full_blocks(bounds.hi[start:b], int(bounds.lo[a]), a - start, b - start, self.steps, self.long_block)
            if blocks and b < stop and bounds.lo[b] < blocks[-1].last_key:  # keys behind blocks must not begin earlier from row to row
                yield Part(start, b, tuple(blocks))
                start, blocks = b, []
        if start < stop:
            yield Part(start, stop, tuple(blocks))


FORWARD = Cut()
BACKWARD = Cut(steps=((8192, 4096), (4096, 4096), *FORWARD.steps))  # dK and dV of a block are summed once for all its rows


def _full_blocks(hi: np.ndarray, seen: int, start: int, stop: int, steps: Sequence[tuple[int, int]], longest: int) -> Iterator[Block]:
    """Blocks of the rows [start, stop) beyond the key ``seen``, by groups of the first step; inside each group, and of the rows
    left over, by the next. These stand in front, where they see the fewest keys: in the end they are left to slower kernels."""
    (rows, keys), finer = steps[0], steps[1:]
    first = stop - (stop - start) // rows * rows
    if finer and first > start:
        yield from _full_blocks(hi, seen, start, first, finer, longest)
    for group in range(first, stop, rows):
        shared = seen + max(int(hi[group]) - seen, 0) // keys * keys
        for key in range(seen, shared, longest):
            yield Block(group, group + rows, key, min(key + longest, shared))
        if finer:
            yield from _full_blocks(hi, shared, group, group + rows, finer, longest)


def keys_behind(bounds: KeyBounds, part: Part) -> np.ndarray:
    """int64 [rows of the part]: the first key of each row that is in no block."""
    first = bounds.lo[part.start : part.stop].copy()
    for block in part.blocks:
        first[block.start : block.stop] = block.last_key
    return first
