r"""Partition the rows of a sequence into groups, each with its fastest kernels. Integers, on the host only.

cuDNN has the fastest kernels, but only for full rectangles (every row sees every key) and causal squares. It
builds an execution plan for each new shape, in 90 ms for forward and backward. So this partition uses few
shapes, whatever the lengths of documents and turns are. There are two kinds of groups:

    causal run                              staircase (trained turns, any other rows of a document)

      keys lo ->        own                   keys lo ->
    a +--------+--------+\                    +-----------+..
      |        |        | \                   |     1     |...   1  the rectangle that saves most
      | rect   | rect   |  \ causal           +-----------+---+. 2  the best one before it and after it
      |        |        |   \ square          |     1     | 2 |..
    b +--------+--------+----\                +-----------+---+..  .  uncovered keys: Triton

**Causal run**: consecutive rows p = a .. b-1 that see keys lo .. p. A causal square covers the last b - a
keys. Its side is a multiple of `square`, and so is its distance from lo. Rectangles cover the keys before it;
their sides are `square` times a power of two. A run longer than `max_run` is divided: 128K rows take 236 ms
forward on an H200 in pieces of 64K, and 260 ms in one square (docs/benchmarks/h200.md). The last rows of a
run are padded to a whole `square` if that adds at most half of one; otherwise they join the staircase.

**Staircase**: all other rows. Rows are sorted, so the ends of their key intervals rise like a staircase.
The area below it is covered greedily: take the rectangle that saves most time. Then do the same for the
rows before it, and for its own rows beyond its keys. Rectangles have a multiple of `key_multiple` keys, and
one of a few row counts. Triton attends to all keys outside of the rectangles; its kernels serve all shapes
with one binary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from eagle_ds.kernels.attention import KeyBounds

WIDE = 32  # query heads that the defaults of Partition were measured with
EVEN = 8  # multiples of min_rows up to this one are row counts of rectangles; then two sizes per doubling


class Rectangle(NamedTuple):
    """Query rows [start, stop), counted within the group, that all see the keys [first_key, last_key)."""

    start: int
    stop: int
    first_key: int
    last_key: int


class RowGroup(NamedTuple):
    """Query rows [start, stop), their rectangles of keys, and their causal square if they have one."""

    start: int
    stop: int
    # Those of one row follow each other without gaps, from the first key that the row sees.
    rectangles: tuple[Rectangle, ...] = ()
    square: int | None = None  # row i of the group also sees the keys [square, square + i], and no others
    padding: int = 0  # rows to append, so that the square's side is a multiple of `Partition.square`

    @property
    def size(self) -> int:
        """Number of rows, without padding."""
        return self.stop - self.start


@dataclass(frozen=True)
class Partition:
    """How to divide rows into groups. The defaults were measured on an H200 with 32 query heads, d = 128."""

    # Fewest rows of a rectangle under a staircase. 512 rows of 32 heads make 128 thread blocks, and a Hopper
    # GPU has 132 multiprocessors.
    min_rows: int = 512
    # Whether fewer heads need more rows. In a forward, rows * heads alone must fill the GPU. In a backward,
    # keys fill it too.
    by_heads: bool = True
    overhead_rows: int = 0  # cost of a rectangle apart from its rows, in equivalent query rows
    launch_pairs: int = 1 << 24  # cost of launching a rectangle's kernels, in (row, key) pairs over all heads
    triton_ratio: float = 1.4  # Triton time / cuDNN time
    key_multiple: int = 4096
    square: int = 4096  # smaller squares cost more in plans and passes over dK/dV than they save
    max_run: int = 65536  # rows of a causal square; also rows and keys of a run's rectangle
    max_keys: int = 32768  # of a rectangle: cuDNN's backward needs 512 bytes per query head and key

    def __post_init__(self) -> None:
        assert self.max_keys % self.key_multiple == 0 and self.triton_ratio > 1, self

    def for_heads(self, heads: int) -> Partition:
        """Return the partition for a rank with ``heads`` query heads; its costs are those of one head."""
        rows = self.min_rows * max(WIDE // heads, 1) if self.by_heads else self.min_rows
        return replace(self, min_rows=rows, launch_pairs=self.launch_pairs // heads)

    @cached_property
    def sizes(self) -> np.ndarray:
        """Possible row counts of a staircase's rectangle, ascending. Few, as each shape costs a plan."""
        sizes = [self.min_rows * i for i in range(1, EVEN + 1)]
        while sizes[-1] < self.max_run:
            sizes += [sizes[-1] * 3 // 2, sizes[-1] * 2]
        return np.array(sizes)

    def groups(self, bounds: KeyBounds) -> list[RowGroup]:
        """Divide all rows, in order, into one or more groups. Computed once for each ``bounds``."""
        if self not in bounds.memo:
            bounds.memo[self] = list(self._groups(bounds)) or [RowGroup(0, 0)]
        return bounds.memo[self]

    def _groups(self, bounds: KeyBounds) -> Iterator[RowGroup]:
        """Yield runs that are long enough, and the rows between them as staircases."""
        start = 0
        for a, b in bounds.causal_runs:
            if b - a < self.square:
                continue
            lo, own = int(bounds.lo[a]), int(bounds.hi[a]) - 1
            # Row a sees lo .. own. Skip rows until the square begins a multiple of `square` after lo.
            a += -(own - lo) % self.square
            # Drop the last rows if padding would have to add more than half a square.
            rest = (b - a) % self.square
            b -= rest if 2 * rest < self.square else 0
            if b > a:
                yield from self._staircase(bounds, start, a)
                yield from self._run(a, b, lo, int(bounds.hi[a]) - 1)
                start = b
        yield from self._staircase(bounds, start, len(bounds.lo))

    def _run(self, start: int, stop: int, lo: int, own: int) -> Iterator[RowGroup]:
        """Yield the rows [start, stop) in pieces of max_run; the first row's last key is ``own``.

        The last piece may have up to 1.5 * max_run rows. A separate short piece would have new shapes, and
        cuDNN's plans for those cost more time than it saves.
        """
        while start < stop:
            end = stop if stop - start <= self.max_run * 3 // 2 else start + self.max_run
            padding = -(end - start) % self.square
            rows, keys = list(self._sides(0, end - start + padding)), list(self._sides(lo, own))
            rectangles = tuple(Rectangle(*r, *k) for r in rows for k in keys)
            yield RowGroup(start, end, rectangles, own, padding)
            start, own = end, own + end - start

    def _sides(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Divide [start, stop) into lengths of ``square`` times a power of two, the largest first."""
        while start < stop:
            side = self.square
            while 2 * side <= min(stop - start, self.max_run):
                side *= 2
            yield start, start + side
            start += side

    def _staircase(self, bounds: KeyBounds, start: int, stop: int) -> Iterator[RowGroup]:
        """Yield the rows [start, stop) with each document's rectangles; one group unless windows overlap."""
        found: list[Rectangle] = []
        # ``edges`` divides rows into stretches with one first key. A sliding window moves the first key at
        # every row, so only stretches with enough rows for a rectangle are visited.
        edges = np.concatenate([[start], start + 1 + np.flatnonzero(np.diff(bounds.lo[start:stop])), [stop]])
        for i in np.flatnonzero(np.diff(edges) >= self.min_rows).tolist():
            a, b = int(edges[i]), int(edges[i + 1])
            for first, last, seen, shared in self._rectangles(bounds.hi, int(bounds.lo[a]), a, b):
                found += [Rectangle(first - start, last - start, key, min(key + self.max_keys, shared))
                          for key in range(seen, shared, self.max_keys)]  # fmt: skip
            # Triton needs first keys that do not decrease. If a later row's window begins before the end of a
            # rectangle, that row starts a new group.
            covered = max((r.last_key for r in found), default=0)
            if b < stop and bounds.lo[b] < covered:
                yield RowGroup(start, b, tuple(found))
                start, found = b, []
        if start < stop:
            yield RowGroup(start, stop, tuple(found))

    def _rectangles(
        self, hi: np.ndarray, lo: int, start: int, stop: int
    ) -> Iterator[tuple[int, int, int, int]]:
        """Yield (row start, row stop, key start, key stop) of rectangles under the staircase.

        Each begins at key ``lo`` or where an earlier one ends, and extends to the last of the rows it was
        chosen from. So the first uncovered key never decreases from row to row.
        """
        todo = [(start, stop, lo)]
        while todo:
            start, stop, seen = todo.pop()
            rows = self.sizes[self.sizes <= stop - start]
            if not len(rows):
                continue
            # A rectangle of the last n rows is as wide as its first row, stop - n, sees (hi ascends).
            shared = np.maximum(hi[stop - rows] - seen, 0) // self.key_multiple * self.key_multiple
            # Saved time in (row, key) pairs of cuDNN: Triton's extra time, less overheads of each launch.
            gain = ((self.triton_ratio - 1) * rows - self.overhead_rows) * shared
            saved = gain - self.launch_pairs * -(-shared // self.max_keys)
            best = int(saved.argmax())
            if saved[best] > 0:
                first, last_key = stop - int(rows[best]), seen + int(shared[best])
                yield first, stop, seen, last_key
                todo += [(start, first, seen), (first, stop, last_key)]


FORWARD = Partition()
# In a backward, a rectangle's dK and dV are written, read, and added to float32 sums. With four
# query heads per KV head that moves 56 bytes for each number of a key, for any number of rows:
# hence overhead_rows (docs/benchmarks/h200.md).
BACKWARD = Partition(by_heads=False, overhead_rows=192, triton_ratio=1.5)


def first_uncovered_keys(bounds: KeyBounds, group: RowGroup) -> np.ndarray:
    """Return the first key of each row that is in no rectangle, int64 [rows of the group]."""
    first = bounds.lo[group.start : group.stop].copy()
    for r in group.rectangles:  # in ascending order of keys for each row, so the last one counts
        first[r.start : r.stop] = r.last_key
    return first


def uncovered_bounds(bounds: KeyBounds, group: RowGroup) -> KeyBounds:
    """Return the bounds of the group's rows without the keys of its rectangles; remembered in ``bounds``."""
    if group not in bounds.memo:
        own = bounds.rows(group.start, group.stop)
        if group.rectangles:
            own = KeyBounds.make(first_uncovered_keys(bounds, group), own.hi, own.lo_device.device)
        bounds.memo[group] = own
    return bounds.memo[group]
