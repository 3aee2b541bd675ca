"""How the rows of a sequence are cut into parts, each with the kernels that are fastest for it. Integers on the host alone.

cuDNN's kernels are the fastest, but they know only rectangles and causal squares, and build a plan for each new shape
(90 ms for forward and backward). So rows are cut into few shapes, the same ones whatever the lengths of documents and turns:

    run      rows p = a .. b-1 that see keys lo .. p: a causal square, a multiple of ``square`` rows that begins such a multiple
             behind lo, and in front of it rectangles whose sides are that times a power of two. Very long runs come in
             pieces of ``long_run`` rows: 128K of them take 236 ms forward on an H200 instead of 260 in one square
             (docs/benchmarks/h200.md). At the end they are padded, if by no more than half of ``square``, or left to stairs
    stairs   any other rows of one document, however scattered: of the rectangles below the line of their last keys, the one that
             saves most is a full block, then the best one before it and the best one behind it, and so on. Keys come in
             multiples of ``keys``, rows in numbers that fill a GPU evenly. What is left of each row's keys is left to Triton, which
             compiles no shape in
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from eagle_ds.kernels.attention import KeyBounds

WIDE = 32  # heads that the sizes below were chosen with
EVEN = 8  # so many multiples of a least number of rows are sizes of blocks; beyond them there are two sizes an octave


class Block(NamedTuple):
    """Query rows [start, stop) of a part, padding included, all of which see the keys [first_key, last_key)."""

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
    padding: int = 0  # rows that kernels are given behind the part's own, where its square needs them

    @property
    def size(self) -> int:
        """Rows."""
        return self.stop - self.start


@dataclass(frozen=True)
class Cut:
    """Sizes that decide."""

    rows: int = 512  # least of a block of stairs: with 32 heads, 128 blocks of threads for a Hopper GPU's 132 multiprocessors
    by_heads: bool = True  # more of them for fewer heads: both together are all that can fill a GPU in a forward; a backward has keys
    beside: int = 0  # so many more rows would take as long as what a block costs beside its rows
    call: int = 1 << 24  # so many pairs of row and key, over all heads, are taken to cost what starting a block's kernels does
    triton: float = 1.4  # times as long as cuDNN does Triton take
    keys: int = 4096  # that a block of stairs is a multiple of
    square: int = 4096  # below it cuDNN's plan building and extra passes over dK/dV cost more than its kernels save
    long_run: int = 65536  # rows, and keys of a run's rectangle
    long_block: int = 32768  # keys of a block of stairs: beside it cuDNN's backward needs 512 bytes a query head and key

    def __post_init__(self) -> None:
        assert self.long_block % self.keys == 0 and self.triton > 1, self

    def of_heads(self, heads: int) -> Cut:
        """For a rank that holds so many query heads; numbers are then those of one head."""
        rows = self.rows * max(WIDE // heads, 1) if self.by_heads else self.rows
        return replace(self, rows=rows, call=self.call // heads)

    @cached_property
    def sizes(self) -> np.ndarray:
        """Rows of blocks of stairs, ascending: few, because every shape costs a plan."""
        sizes = [self.rows * i for i in range(1, EVEN + 1)]
        while sizes[-1] < self.long_run:
            sizes += [sizes[-1] * 3 // 2, sizes[-1] * 2]
        return np.array(sizes)

    def __call__(self, bounds: KeyBounds) -> Iterator[Part]:
        """Runs, and between them other rows: all rows once, in order."""
        start = 0
        for a, b in bounds.causal_runs:
            if b - a < self.square:
                continue
            lo, own = int(bounds.lo[a]), int(bounds.hi[a]) - 1
            a += -(own - lo) % self.square
            rest = (b - a) % self.square
            b -= rest if 2 * rest < self.square else 0
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
            padding = -(end - start) % self.square
            rows, keys = list(self._sides(0, end - start + padding)), list(self._sides(lo, own))
            yield Part(start, end, tuple(Block(*r, *k) for r in rows for k in keys), own, padding)
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
        for i in np.flatnonzero(np.diff(edges) >= self.rows).tolist():  # a window has as many edges as rows
            a, b = int(edges[i]), int(edges[i + 1])
            for first, last, seen, shared in self._rectangles(bounds.hi, int(bounds.lo[a]), a, b):
                for key in range(seen, shared, self.long_block):
                    blocks.append(Block(first - start, last - start, key, min(key + self.long_block, shared)))
            behind = max((block.last_key for block in blocks), default=0)
            if b < stop and bounds.lo[b] < behind:  # keys behind blocks must not begin earlier from row to row
                yield Part(start, b, tuple(blocks))
                start, blocks = b, []
        if start < stop:
            yield Part(start, stop, tuple(blocks))

    def _rectangles(self, hi: np.ndarray, lo: int, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """(first row, last row, first key, last key) of the rectangle that saves most among those that the rows [start, stop) see beyond
        the key ``lo``, of the best one among the rows before it, of the best one behind it, and so on. All end with the rows that
        they are cut from, so no row has fewer keys left to see from an earlier key on than the row before it."""
        todo = [(start, stop, lo)]
        while todo:
            start, stop, seen = todo.pop()
            rows = self.sizes[self.sizes <= stop - start]
            if not len(rows):
                continue
            shared = np.maximum(hi[stop - rows] - seen, 0) // self.keys * self.keys
            saved = ((self.triton - 1) * rows - self.beside) * shared - self.call * -(-shared // self.long_block)
            best = int(saved.argmax())
            if saved[best] > 0:
                first, last_key = stop - int(rows[best]), seen + int(shared[best])
                yield first, stop, seen, last_key
                todo += [(start, first, seen), (first, stop, last_key)]


FORWARD = Cut()
BACKWARD = Cut(by_heads=False, beside=192, triton=1.5)
"""In a backward, 56 bytes for each number of a key are moved beside the matmuls of a block, where four query heads share it: what they
give to dK and dV is written, read and summed, and added in float32 (docs/benchmarks/h200.md)."""


def keys_behind(bounds: KeyBounds, part: Part) -> np.ndarray:
    """int64 [rows of the part]: the first key of each row that is in no block."""
    first = bounds.lo[part.start : part.stop].copy()
    for block in part.blocks:
        first[block.start : block.stop] = block.last_key
    return first
