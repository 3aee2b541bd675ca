"""Row ranges hold the promises that sharding and the store rely on, checked against sets of row numbers."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from eagle_ds.sharding import ranges as rg

ROWS = 60
PAIRS = st.lists(st.tuples(st.integers(0, ROWS), st.integers(0, ROWS)), max_size=8)
BOUND = st.integers(0, ROWS)


def members(ranges: rg.Ranges) -> set[int]:
    """The row numbers, by plain counting."""
    return {row for start, stop in ranges for row in range(start, stop)}


@given(PAIRS)
def test_normalize_is_the_sorted_disjoint_union(pairs: list[rg.Range]) -> None:
    normal = rg.normalize(pairs)
    assert members(normal) == members(tuple(pairs))
    assert all(start < stop for start, stop in normal)
    assert all(left[1] < right[0] for left, right in zip(normal[:-1], normal[1:], strict=True))


@given(PAIRS, BOUND, BOUND)
def test_count_clip_and_rows_agree_with_counting(pairs: list[rg.Range], start: int, stop: int) -> None:
    ranges = rg.normalize(pairs)
    assert rg.count(ranges) == len(members(ranges))
    assert members(rg.clip(ranges, start, stop)) == members(ranges) & set(range(start, stop))
    assert rg.rows(ranges).tolist() == sorted(members(ranges))


@given(PAIRS, BOUND, BOUND)
def test_take_is_a_slice_of_the_rows(pairs: list[rg.Range], start: int, stop: int) -> None:
    ranges = rg.normalize(pairs)
    assert rg.rows(rg.take(ranges, start, stop)).tolist() == rg.rows(ranges)[start:stop].tolist()


@given(PAIRS, PAIRS)
def test_index_in_finds_every_member(pairs: list[rg.Range], kept: list[rg.Range]) -> None:
    ranges = rg.normalize(pairs)
    subset = rg.normalize(r for a, b in rg.normalize(kept) for r in rg.clip(ranges, a, b))
    found = rg.rows(ranges)[rg.index_in(subset, ranges)]
    assert found.tolist() == rg.rows(subset).tolist()


@given(PAIRS, st.lists(st.integers(-3, ROWS + 3), max_size=20))
def test_places_before_counts_the_rows_below(pairs: list[rg.Range], values: list[int]) -> None:
    ranges = rg.normalize(pairs)
    expected = [sum(row < value for row in members(ranges)) for value in values]
    assert rg.places_before(np.array(values, dtype=np.int64), ranges).tolist() == expected
