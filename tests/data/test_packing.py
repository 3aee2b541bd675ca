"""Screening and packing: each usable sample is packed once, in a fixed order; skipped samples are counted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle_ds.data.packing import first_fit, screen
from eagle_ds.store.manifest import SampleEntry


def entry(number: int, num_tokens: int, *spans: tuple[int, int]) -> SampleEntry:
    return SampleEntry(f"s{number}", f"s{number}.h5", num_tokens, sum(b - a for a, b in spans), spans, 1)


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60), budget=st.integers(1, 80))
def test_packs_hold_every_sample_once_within_the_budget(lengths: list[int], budget: int) -> None:
    packs = first_fit(range(len(lengths)), np.array(lengths), budget)
    assert sorted(n for pack in packs for n in pack) == list(range(len(lengths)))
    for pack in packs:
        assert len(pack) == 1 or sum(lengths[n] for n in pack) <= budget


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), min_size=2, max_size=60), budget=st.integers(50, 80))
def test_first_fit_leaves_no_two_packs_that_would_fit_in_one(lengths: list[int], budget: int) -> None:
    packs = first_fit(range(len(lengths)), np.array(lengths), budget)
    sizes = [sum(lengths[n] for n in pack) for pack in packs]
    assert sum(1 for size in sizes if 2 * size <= budget) <= 1


def test_samples_go_longest_first_into_the_first_pack_with_space() -> None:
    assert first_fit([0, 1, 2, 3, 4], np.array([3, 9, 5, 2, 7]), 10) == [(1,), (4, 0), (2, 3)]
    assert first_fit([3, 0, 1], np.array([4, 4, 1, 4]), 8) == [(3, 0), (1,)]  # ties as given
    assert first_fit([0, 1], np.array([30, 2]), 10) == [(0,), (1,)]  # longer than the budget: alone


def test_a_long_sample_is_truncated_or_skipped_and_counted() -> None:
    entries = [entry(0, 100, (40, 60), (80, 100)), entry(1, 50, (10, 30))]
    settings_ = {"max_length": 50, "ttt_steps": 3, "alignment": "serving"}
    samples, counts = screen(entries, overlong="truncate", **settings_)
    assert [s.document.num_tokens for s in samples] == [50, 50]
    assert samples[0].document.trained_spans == ((40, 50),)
    assert (counts.kept, counts.truncated, counts.overlong) == (2, 1, 0)
    samples, counts = screen(entries, overlong="skip", **settings_)
    assert [s.entry.id for s in samples] == ["s1"]
    assert (counts.kept, counts.truncated, counts.overlong) == (1, 0, 1)


def test_samples_without_a_trained_row_are_left_out_and_counted() -> None:
    entries = [entry(0, 20), entry(1, 20, (19, 20)), entry(2, 20, (10, 20)), entry(3, 90, (80, 90))]
    samples, counts = screen(entries, max_length=50, overlong="truncate", ttt_steps=3, alignment="serving")
    assert [s.entry.id for s in samples] == ["s2"] and samples[0].query_rows == 9
    assert counts.untrained == 3
    assert "3 without a trained row" in str(counts)


def test_a_store_without_trained_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to train on: 0 of 1 samples"):
        screen([entry(0, 20)], max_length=50, overlong="truncate", ttt_steps=3, alignment="serving")
