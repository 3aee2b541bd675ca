"""d2t and t2d describe the same tokens: those that are trained most often."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle_ds.data.vocab import VocabMap, build_vocab_map, count_trained_tokens, load_or_build, vocab_path
from eagle_ds.store.store import Sample, Store, StoreInfo, StoreWriter

V = 50


@given(counts=st.lists(st.integers(0, 5), min_size=V, max_size=V), size=st.integers(1, V))
@settings(max_examples=50, deadline=None)
def test_d2t_and_t2d_are_inverse(counts, size):
    vocab = build_vocab_map(torch.tensor(counts), size)
    ids = vocab.target_ids
    assert len(ids) == size and torch.equal(ids, torch.sort(ids).values)
    assert torch.equal(torch.nonzero(vocab.t2d)[:, 0], ids)
    assert torch.equal(vocab.d2t, ids - torch.arange(size))


@given(counts=st.lists(st.integers(0, 5), min_size=V, max_size=V), size=st.integers(1, V - 1))
@settings(max_examples=50, deadline=None)
def test_no_skipped_token_is_trained_more_than_a_chosen_one(counts, size):
    vocab = build_vocab_map(torch.tensor(counts), size)
    taken, left = torch.tensor(counts)[vocab.t2d], torch.tensor(counts)[~vocab.t2d]
    assert int(taken.min()) >= int(left.max())


def test_ties_go_to_the_lower_id():
    assert build_vocab_map(torch.tensor([0, 3, 1, 1, 1]), 3).target_ids.tolist() == [1, 2, 3]


def test_the_whole_vocabulary_is_the_identity():
    vocab = build_vocab_map(torch.zeros(V, dtype=torch.int64), V)
    assert not vocab.d2t.any() and vocab.t2d.all()


def test_a_draft_vocabulary_larger_than_the_targets_is_refused():
    with pytest.raises(ValueError, match="use at most 50"):
        build_vocab_map(torch.zeros(V), V + 1)


def test_only_trained_tokens_are_counted():
    ids, mask = torch.tensor([4, 4, 7, 9], dtype=torch.int32), torch.tensor([0, 1, 1, 0], dtype=torch.uint8)
    counts = count_trained_tokens([(ids, mask), (ids, mask)], V)
    assert counts[4] == 2 and counts[7] == 2 and counts.sum() == 4
    with pytest.raises(ValueError, match="token id 7 does not fit the target vocabulary of 5"):
        count_trained_tokens([(ids, mask)], 5)


def test_saved_maps_come_back(tmp_path):
    vocab = VocabMap.from_target_ids(torch.tensor([9, 2, 30]), V)
    vocab.save(tmp_path / "vocab.safetensors")
    loaded = VocabMap.load(tmp_path / "vocab.safetensors")
    assert torch.equal(loaded.d2t, vocab.d2t) and torch.equal(loaded.t2d, vocab.t2d)
    assert [path.name for path in tmp_path.iterdir()] == ["vocab.safetensors"]


def test_maps_that_disagree_are_refused():
    with pytest.raises(ValueError, match="do not describe the same draft vocabulary"):
        VocabMap(torch.tensor([0, 1]), torch.ones(V, dtype=torch.bool))


def add_sample(root, name: str, tokens: list[int]) -> Store:
    info = StoreInfo("t", "hash", "hash", hidden_size=8, aux_layer_ids=(0, 1, 2), vocab_size=V)
    length = len(tokens)
    with StoreWriter(root, info) as writer:
        states = torch.zeros(length, 32, dtype=torch.bfloat16)
        mask = torch.ones(length, dtype=torch.uint8)
        writer.add(
            Sample(
                name,
                torch.tensor(tokens, dtype=torch.int32),
                mask,
                states[:, :24].contiguous(),
                states[:, :8].contiguous(),
            )
        )
    return Store(root)


def test_a_store_keeps_its_map_until_it_grows(tmp_path):
    store = add_sample(tmp_path, "a", [5, 5, 6])
    assert load_or_build(store, 2).target_ids.tolist() == [5, 6]
    written = vocab_path(tmp_path, 2).stat().st_mtime_ns
    assert (
        load_or_build(store, 2).target_ids.tolist() == [5, 6]
        and vocab_path(tmp_path, 2).stat().st_mtime_ns == written
    )
    assert load_or_build(add_sample(tmp_path, "b", [8, 8, 8]), 2).target_ids.tolist() == [5, 8]
