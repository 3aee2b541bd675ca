"""Sorted, disjoint, half-open ranges of rows: how the sharding and the store name sets of rows.

Example: ((0, 3), (7, 9)) is the rows 0, 1, 2, 7, 8. Their *places* in this set are 0, 1, 2, 3, 4.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

Range = tuple[int, int]
Ranges = tuple[Range, ...]


def normalize(ranges: Iterable[Range]) -> Ranges:
    """Return the union of any ranges: sorted, disjoint, adjacent ones joined, empty ones dropped."""
    joined: list[Range] = []
    for start, stop in sorted(r for r in ranges if r[0] < r[1]):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return tuple(joined)


def count(ranges: Iterable[Range]) -> int:
    """Return the number of rows."""
    return sum(stop - start for start, stop in ranges)


def clip(ranges: Iterable[Range], start: int, stop: int) -> Ranges:
    """Return the rows of ``ranges`` that are in [start, stop)."""
    return tuple((max(a, start), min(b, stop)) for a, b in ranges if max(a, start) < min(b, stop))


def shift(ranges: Iterable[Range], offset: int) -> Ranges:
    """Add ``offset`` to every row."""
    return tuple((a + offset, b + offset) for a, b in ranges)


def take(ranges: Iterable[Range], start: int, stop: int) -> Ranges:
    """Return the rows of ``ranges`` whose places are in [start, stop)."""
    taken, seen = [], 0  # seen: rows of the ranges before [a, b), so the place of row a
    for a, b in ranges:
        first, last = max(start - seen, 0), min(stop - seen, b - a)
        if first < last:
            taken.append((a + first, a + last))
        seen += b - a
    return tuple(taken)


def rows(ranges: Sequence[Range]) -> np.ndarray:
    """Return the row numbers themselves, int64 [count(ranges)]."""
    if not ranges:
        return np.empty(0, dtype=np.int64)
    return np.concatenate([np.arange(a, b, dtype=np.int64) for a, b in ranges])


def index_in(members: Sequence[Range], ranges: Sequence[Range]) -> np.ndarray:
    """Return the place in ``ranges`` of each row of ``members``, int64; members must be a subset."""
    return places_before(rows(members), ranges)


def places_before(values: np.ndarray, ranges: Sequence[Range]) -> np.ndarray:
    """Count the rows of ``ranges`` below each of ``values`` (int64, in any order): the value's place."""
    if not ranges:
        return np.zeros(len(values), dtype=np.int64)
    starts = np.array([a for a, _ in ranges], dtype=np.int64)
    lengths = np.array([b - a for a, b in ranges], dtype=np.int64)
    before = np.concatenate([[0], np.cumsum(lengths)])  # rows in the ranges before each one
    # The last range that starts at or below the value; -1 where even the first starts above it.
    piece = np.searchsorted(starts, values, side="right") - 1
    # Rows below the value within that range: all of them if the value is beyond the range's end.
    inside = np.clip(values - starts[np.maximum(piece, 0)], 0, lengths[np.maximum(piece, 0)])
    return np.where(piece < 0, 0, before[np.maximum(piece, 0)] + inside)
