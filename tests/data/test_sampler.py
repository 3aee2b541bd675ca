"""The order of training: equal on every rank, each sample once per epoch, resumable from the step number."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle_ds.data.packing import TrainSample
from eagle_ds.data.sampler import GlobalBatch, Sampler
from eagle_ds.sharding.sequence import Document
from eagle_ds.store.manifest import SampleEntry


def sample(number: int, num_tokens: int, query_rows: int = 1) -> TrainSample:
    span = ((0, min(num_tokens, query_rows + 2)),)
    return TrainSample(
        SampleEntry(f"s{number}", "x", num_tokens, 1, span, 1), Document(num_tokens, span), query_rows
    )


def samples(count: int) -> list[TrainSample]:
    return [sample(n, 5 + 7 * n % 31) for n in range(count)]


def flat(global_batch: GlobalBatch) -> list[int]:
    """Return the sample numbers of a global batch."""
    return [n for packs in global_batch.packs for pack in packs for n in pack]


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(8, 40),
    dp=st.sampled_from([1, 2, 4]),
    accumulation=st.sampled_from([1, 2]),
    pack_tokens=st.sampled_from([None, 40]),
    seed=st.integers(0, 5),
)
def test_an_epoch_trains_no_sample_twice(
    count: int, dp: int, accumulation: int, pack_tokens: int | None, seed: int
) -> None:
    if pack_tokens is not None and count < 32:
        count = 40
    sampler = Sampler(samples(count), dp=dp, accumulation=accumulation, pack_tokens=pack_tokens, seed=seed)
    for epoch in (0, 1):
        packs = sampler.epoch_packs(epoch)
        assert sorted(n for pack in packs for n in pack) == list(range(count))
        assert 0 <= len(packs) - sampler.steps_in(epoch) * dp * accumulation < dp * accumulation
    trained = list(itertools.chain.from_iterable(map(flat, sampler.global_batches(0, sampler.steps_in(0)))))
    assert len(trained) == len(set(trained))


@pytest.mark.parametrize("pack_tokens", [None, 40])
def test_resuming_at_any_step_gives_the_same_global_batches(pack_tokens: int | None) -> None:
    def fresh() -> Sampler:
        return Sampler(samples(23), dp=2, accumulation=2, pack_tokens=pack_tokens, seed=3)

    whole = list(fresh().global_batches(0, 17))
    assert [step.number for step in whole] == list(range(17)) and whole[-1].epoch > 2
    for start in range(17):
        assert list(fresh().global_batches(start, 17)) == whole[start:]


def test_epochs_differ_and_seeds_differ() -> None:
    sampler = Sampler(samples(30), dp=1, pack_tokens=40)
    assert sampler.epoch_packs(0) != sampler.epoch_packs(1)
    assert sampler.epoch_packs(0) != Sampler(samples(30), dp=1, pack_tokens=40, seed=1).epoch_packs(0)
    assert sampler.epoch_packs(0) == Sampler(samples(30), dp=1, pack_tokens=40).epoch_packs(0)


@pytest.mark.parametrize("pack_tokens", [None, 40])
def test_the_number_of_steps_is_that_of_the_epochs_at_most_max_steps(pack_tokens: int | None) -> None:
    sampler = Sampler(samples(23), dp=2, accumulation=2, pack_tokens=pack_tokens)
    total = sum(sampler.steps_in(epoch) for epoch in range(3))
    assert sampler.count_steps(3) == total
    assert sampler.count_steps(3, 2) == 2
    assert sampler.count_steps(3, 1000) == total
    assert {step.epoch for step in sampler.global_batches(0, total)} == {0, 1, 2}


def test_data_parallel_ranks_get_packs_of_similar_cost() -> None:
    lengths = [10, 1000, 11, 1001, 500, 501]
    sampler = Sampler([sample(n, length) for n, length in enumerate(lengths)], dp=2)
    for step in sampler.global_batches(0, 3):
        assert abs(lengths[step.packs[0][0][0]] - lengths[step.packs[0][1][0]]) == 1


def test_too_few_sequences_for_one_step_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"dp 4 \* gradient_accumulation 2 = 8 sequences, but the store yields 5"
    ):
        Sampler(samples(5), dp=4, accumulation=2)
