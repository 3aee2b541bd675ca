"""Sorted, disjoint half-open row ranges: the integers that the sharding plan and the store speak in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

Range = tuple[int, int]
Ranges = tuple[Range, ...]


def normalize(ranges: Iterable[Range]) -> Ranges:
    """Union of any ranges: sorted, disjoint, touching ones joined, empty ones dropped."""
    joined: list[Range] = []
    for start, stop in sorted(r for r in ranges if r[0] < r[1]):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return tuple(joined)


def count(ranges: Iterable[Range]) -> int:
    """Number of rows."""
    return sum(stop - start for start, stop in ranges)


def clip(ranges: Iterable[Range], start: int, stop: int) -> Ranges:
    """The part of ``ranges`` inside [start, stop)."""
    return tuple((max(a, start), min(b, stop)) for a, b in ranges if max(a, start) < min(b, stop))


def shift(ranges: Iterable[Range], offset: int) -> Ranges:
    """Every row moved by ``offset``."""
    return tuple((a + offset, b + offset) for a, b in ranges)


def take(ranges: Iterable[Range], start: int, stop: int) -> Ranges:
    """Rows number ``start`` to ``stop`` (exclusive) of ``ranges`` laid end to end."""
    taken, seen = [], 0
    for a, b in ranges:
        first, last = max(start - seen, 0), min(stop - seen, b - a)
        if first < last:
            taken.append((a + first, a + last))
        seen += b - a
    return tuple(taken)


def rows(ranges: Sequence[Range]) -> np.ndarray:
    """The row numbers themselves, int64 [count(ranges)]."""
    if not ranges:
        return np.empty(0, dtype=np.int64)
    return np.concatenate([np.arange(a, b, dtype=np.int64) for a, b in ranges])


def index_in(members: Sequence[Range], ranges: Sequence[Range]) -> np.ndarray:
    """Where each row of ``members`` lies in ``ranges`` laid end to end, int64; members must be a subset."""
    return rank_of(rows(members), ranges)


def rank_of(values: np.ndarray, ranges: Sequence[Range]) -> np.ndarray:
    """How many rows of ``ranges`` lie below each of ``values`` (int64, any order)."""
    if not ranges:
        return np.zeros(len(values), dtype=np.int64)
    starts = np.array([a for a, _ in ranges], dtype=np.int64)
    lengths = np.array([b - a for a, b in ranges], dtype=np.int64)
    before = np.concatenate([[0], np.cumsum(lengths)])
    piece = np.searchsorted(starts, values, side="right") - 1
    inside = np.clip(values - starts[np.maximum(piece, 0)], 0, lengths[np.maximum(piece, 0)])
    return np.where(piece < 0, 0, before[np.maximum(piece, 0)] + inside)
