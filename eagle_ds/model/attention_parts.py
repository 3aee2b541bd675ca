"""How the rows of a sequence are cut into parts, each with the kernels that are fastest for it. Integers on the host alone.

cuDNN's kernels are the fastest, but they know only rectangles and causal squares, and build a plan for each new shape
(90 ms for forward and backward). So rows are cut into few shapes, the same ones whatever the lengths of documents and turns:

    run      rows p = a .. b-1 that see keys lo .. p: a causal square, a multiple of ``square`` rows that begins such a multiple
             behind lo, and in front of it rectangles whose sides are that times a power of two. Very long runs come in
             pieces of ``long_run`` rows: 128K of them take 236 ms forward on an H200 instead of 260 in one square
             (docs/benchmarks/h200.md). Rows that are left over at the end, if more than half a square, are padded to one
    stairs   any other rows of one document, however scattered: the largest rectangle below the line of their last keys is a full
             block, then the largest one before it and the largest one behind it, and so on. Keys come in multiples of ``keys``;
             rows as they do, but the kernel is given a few more, so that their number is a round one. What is left of each row's
             keys is left to Triton, which compiles no shape in
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from eagle_ds.model.attention import KeyBounds

WIDE = 32  # heads that the sizes below were chosen with
UNIT, COARSE = 256, 2048  # rows that a kernel is given of stairs: a multiple, and beyond this many powers of two


class Block(NamedTuple):
    """Query rows [start, stop) of a part, all of which see the keys [first_key, last_key)."""

    start: int
    stop: int
    first_key: int
    last_key: int
    outer_start: int  # rows [outer_start, outer_stop) are what a kernel is given; what it makes of the others does not count
    outer_stop: int

    @property
    def inner(self) -> slice:
        """Those that count among those that a kernel is given."""
        return slice(self.start - self.outer_start, self.stop - self.outer_start)

    @property
    def is_padded(self) -> bool:
        """Whether there are others."""
        return (self.start, self.stop) != (self.outer_start, self.outer_stop)


class Part(NamedTuple):
    """Query rows [start, stop) and how they are attended: by full blocks, and behind them a causal square or single intervals."""

    start: int
    stop: int
    blocks: tuple[Block, ...] = ()  # those of one row follow each other, from its document's first key on
    square: int | None = None  # row i of the part also sees the keys [square, square + i], and has none left then
    padding: int = 0  # rows that kernels are given behind the part's own, where its square needs them

    @property
    def size(self) -> int:
        """Rows."""
        return self.stop - self.start


@dataclass(frozen=True)
class Cut:
    """Sizes that decide."""

    least_rows: int = 384  # of a block of stairs: fewer do not fill a GPU
    keys: int = 4096  # that such a block is a multiple of
    square: int = 4096  # below it cuDNN's plan building and extra passes over dK/dV cost more than its kernels save
    long_run: int = 65536  # rows, and keys of a run's rectangle
    long_block: int = 32768  # keys of a block of stairs: beside it cuDNN's backward needs 512 bytes a query head and key
    unit: int = UNIT

    def __post_init__(self) -> None:
        assert self.least_rows >= self.unit and self.long_block % self.keys == 0, self

    def of_heads(self, heads: int) -> Cut:
        """More rows for fewer heads: both together are all that can fill a GPU in a forward; a backward has keys."""
        return replace(self, least_rows=self.least_rows * max(WIDE // heads, 1))

    def __call__(self, bounds: KeyBounds) -> Iterator[Part]:
        """Runs, and between them other rows: all rows once, in order."""
        start = 0
        for a, b, causal in bounds.runs:
            if not causal or b - a < self.square:
                continue
            lo, own = int(bounds.lo[a]), int(bounds.hi[a]) - 1
            a += -(own - lo) % self.square
            rest = (b - a) % self.square
            whole = b - rest
            if whole > a:
                yield from self._stairs(bounds, start, a)
                yield from self._run(a, whole, lo, int(bounds.hi[a]) - 1)
                start = whole
            if 2 * rest >= self.square:
                yield from self._stairs(bounds, start, whole)
                yield self._rest(whole, b, lo, int(bounds.hi[whole]) - 1)
                start = b
        yield from self._stairs(bounds, start, len(bounds.lo))

    def _run(self, start: int, stop: int, lo: int, own: int) -> Iterator[Part]:
        """The rows [start, stop), the first of which stands at the key ``own``, in pieces; the last is half as long again at most,
        as a short one would not pay for its shapes."""
        while start < stop:
            end = stop if stop - start <= self.long_run * 3 // 2 else start + self.long_run
            rows, keys = list(self._sides(0, end - start)), list(self._sides(lo, own))
            yield Part(start, end, tuple(Block(*r, *k, *r) for r in rows for k in keys), own)
            start, own = end, own + end - start

    def _rest(self, start: int, stop: int, lo: int, own: int) -> Part:
        """The rows [start, stop), the first of which stands at the key ``own``, padded to one square."""
        blocks = tuple(Block(0, stop - start, *keys, 0, self.square) for keys in self._sides(lo, own))
        return Part(start, stop, blocks, own, self.square - (stop - start))

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
        for i in np.flatnonzero(np.diff(edges) >= self.least_rows).tolist():  # a window has as many edges as rows
            a, b = int(edges[i]), int(edges[i + 1])
            for first, last, seen, shared in self._rectangles(bounds.hi, int(bounds.lo[a]), a, b):
                keys = [(key, min(key + self.long_block, shared)) for key in range(seen, shared, self.long_block)]
                rows = list(self._rows(first - start, last - start, stop - start))
                blocks += [Block(*inner, *k, *outer) for inner, outer in rows for k in keys]
            if blocks and b < stop and bounds.lo[b] < blocks[-1].last_key:  # keys behind blocks must not begin earlier from row to row
                yield Part(start, b, tuple(blocks))
                start, blocks = b, []
        if start < stop:
            yield Part(start, stop, tuple(blocks))

    def _rectangles(self, hi: np.ndarray, lo: int, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """(first row, last row, first key, last key) of the largest rectangle that the rows [start, stop) see beyond the key ``lo``, of
        the largest one among the rows before it, of the largest one behind it, and so on. All end with the rows that they are cut
        from, so no row has fewer keys left to see from an earlier key on than the row before it."""
        todo = [(start, stop, lo)]
        while todo:
            start, stop, seen = todo.pop()
            candidates = np.arange(start, stop - self.least_rows + 1)
            if not len(candidates):
                continue
            shared = np.maximum(hi[candidates] - seen, 0) // self.keys * self.keys
            rows = stop - candidates
            best = int(((rows - -rows % self.unit) * shared).argmax())  # what a kernel works on in vain counts against a rectangle
            first, last_key = start + best, seen + int(shared[best])
            if last_key > seen:
                yield first, stop, seen, last_key
                todo += [(start, first, seen), (first, stop, last_key)]

    def _rows(self, start: int, stop: int, rows: int) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
        """[start, stop) of ``rows`` rows in pieces: those that count, and round numbers of rows around them."""
        while start < stop:
            left, size = stop - start, COARSE
            while 2 * size <= min(left, self.long_run):
                size *= 2
            if left < COARSE:
                size = min(-(-left // self.unit) * self.unit, rows // self.unit * self.unit)
            first = min(start, rows - size)
            yield (start, min(first + size, stop)), (first, first + size)
            start = first + size


FORWARD = BACKWARD = Cut()


def keys_behind(bounds: KeyBounds, part: Part) -> np.ndarray:
    """int64 [rows of the part]: the first key of each row that is in no block."""
    first = bounds.lo[part.start : part.stop].copy()
    for block in part.blocks:
        first[block.start : block.stop] = block.last_key
    return first
