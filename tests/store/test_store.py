"""Writing a store and reading it back: the manifest, resuming, locks, identity checks, verification."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from eagle_ds.store import sink
from eagle_ds.store.manifest import (
    MANIFEST_NAME,
    STORE_JSON,
    check_same_store,
    read_store_info,
    sample_path,
    write_store_info,
)
from eagle_ds.store.store import Sample, SampleReader, Store, StoreError, StoreInfo, StoreWriter
from eagle_ds.store.verification import verify_file
from tests.store_cases import assert_stored, make_info, make_sample, same_bits, write_store

INFO = make_info()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return write_store(
        tmp_path / "store", INFO, *(make_sample(f"s{n}", 70 + n, INFO, seed=n) for n in range(3))
    )


def test_the_manifest_lists_lengths_spans_and_sizes_in_writing_order(store: Store) -> None:
    assert [entry.id for entry in store.entries] == ["s0", "s1", "s2"]
    for number, entry in enumerate(store.entries):
        mask = make_sample("", 70 + number, INFO, seed=number).loss_mask
        rebuilt = torch.zeros_like(mask)
        for start, end in entry.trained_spans:
            assert end > start
            rebuilt[start:end] = 1
        assert torch.equal(rebuilt, mask)
        assert entry.num_trained == int(mask.sum())
        assert entry.num_tokens == 70 + number
        assert entry.bytes == (store.root / entry.path).stat().st_size


def test_store_json_comes_back_and_head_size_defaults_to_the_vocabulary(store: Store) -> None:
    assert store.info == INFO
    assert store.info.head_size == INFO.vocab_size
    written = json.loads((store.root / STORE_JSON).read_text())
    assert written["target"] == "some/target"
    assert written["aux_layer_ids"] == [0, 1, 2]


def test_a_store_json_without_template_variables_is_that_of_earlier_versions(tmp_path: Path) -> None:
    variables = {"enable_thinking": False, "tags": ["é"]}
    for info in (INFO, dataclasses.replace(INFO, template_kwargs=variables)):
        write_store_info(tmp_path, info)
        assert read_store_info(tmp_path) == info
        written = json.loads((tmp_path / STORE_JSON).read_text())
        assert written.get("template_kwargs", {}) == info.template_kwargs
        assert ("template_kwargs" in written) == bool(info.template_kwargs)
    with pytest.raises(ValueError, match=r"template_kwargs is \{.*\} there, \{\} here"):
        check_same_store(tmp_path, INFO)


@pytest.mark.parametrize("count", [1, 2, 65])
def test_masks_of_all_ones_and_all_zeros_give_one_span_and_none(tmp_path: Path, count: int) -> None:
    ones, zeros = (make_sample(name, count, INFO) for name in ("ones", "zeros"))
    ones.loss_mask.fill_(1)
    zeros.loss_mask.fill_(0)
    store = write_store(tmp_path, INFO, ones, zeros)
    assert [entry.trained_spans for entry in store.entries] == [((0, count),), ()]


def test_a_writer_continues_where_the_last_one_stopped(store: Store) -> None:
    with StoreWriter(store.root, INFO) as writer:
        assert writer.done_ids == {"s0", "s1", "s2"}
        writer.add(make_sample("s3", 5, INFO))
    assert [entry.id for entry in Store(store.root).entries] == ["s0", "s1", "s2", "s3"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"target_hash": "other"}, "target_hash is 'target-hash' there, 'other' here"),
        ({"aux_layer_ids": (1, 2, 3)}, r"aux_layer_ids is \(0, 1, 2\) there"),
        ({"dtype": "float32"}, "dtype is 'bfloat16' there"),
        ({"vocab_size": 7, "head_size": 7}, "vocab_size is 1000 there, 7 here; head_size"),
    ],
)
def test_a_writer_of_other_data_is_refused_and_each_difference_is_listed(
    store: Store, change: dict, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        StoreWriter(store.root, dataclasses.replace(INFO, **change))
    with StoreWriter(store.root, dataclasses.replace(INFO, encoder="a later version")) as writer:
        assert writer.done_ids


def test_a_second_writer_at_the_same_time_is_refused(store: Store) -> None:
    with StoreWriter(store.root, INFO), pytest.raises(ValueError, match="another writer is at work"):
        StoreWriter(store.root, INFO)
    StoreWriter(store.root, INFO).close()


def test_an_id_that_is_stored_already_is_refused(store: Store) -> None:
    with (
        StoreWriter(store.root, INFO) as writer,
        pytest.raises(ValueError, match="'s1' is already in the store"),
    ):
        writer.add(make_sample("s1", 9, INFO))


def test_a_deleted_or_truncated_file_is_written_again_at_its_place_in_the_manifest(store: Store) -> None:
    gone, cut, _ = store.entries
    (store.root / gone.path).unlink()
    with (store.root / cut.path).open("r+b") as file:
        file.truncate(100)
    fresh = make_sample("s0", 33, INFO, seed=9)
    with StoreWriter(store.root, INFO) as writer:
        assert writer.done_ids == {"s2"}
        writer.add(fresh)
        writer.add(make_sample("s1", 71, INFO, seed=1))
    mended = Store(store.root)
    assert [(entry.id, entry.num_tokens) for entry in mended.entries] == [("s0", 33), ("s1", 71), ("s2", 72)]
    assert_stored(mended.reader(mended.entries[0]), fresh)
    assert mended.manifest_hash != store.manifest_hash


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_tensors_with_any_strides_are_stored(tmp_path: Path, dtype: str) -> None:
    info = make_info(dtype=dtype)
    sample = make_sample("s", 150, info)
    odd = dataclasses.replace(
        sample,
        input_ids=sample.input_ids.repeat_interleave(2)[::2],
        aux_hidden_state=sample.aux_hidden_state.t().contiguous().t(),
        hidden_state=torch.stack([sample.hidden_state] * 2, -1)[..., 1],
    )
    assert (
        not odd.aux_hidden_state.is_contiguous()
        and not odd.hidden_state.is_contiguous()
        and not odd.input_ids.is_contiguous()
    )
    store = write_store(tmp_path, info, odd)
    assert_stored(store.reader(store.entries[0]), sample)


def test_dropping_written_pages_does_not_change_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sink, "FLUSH_BYTES", 5000)
    advised: list[tuple[int, int]] = []
    real = os.posix_fadvise
    monkeypatch.setattr(
        os,
        "posix_fadvise",
        lambda fd, start, size, advice: advised.append((start, size)) or real(fd, start, size, advice),
    )
    sample = make_sample("s", 1000, INFO)
    store = write_store(tmp_path, INFO, sample)
    assert_stored(store.reader(store.entries[0]), sample)
    assert len(advised) > 5 and all(start >= 0 and size >= 5000 for start, size in advised)
    assert (
        advised[2][0] <= advised[1][0] + advised[1][1]
    )  # each call covers the range that the call before started to write


def test_several_threads_can_add_at_once(tmp_path: Path) -> None:
    samples = [make_sample(f"s{n}", 40 + 10 * n, INFO, seed=n) for n in range(8)]
    with StoreWriter(tmp_path, INFO) as writer, ThreadPoolExecutor(4) as pool:
        list(pool.map(writer.add, samples))
    store = Store(tmp_path)
    entries = {entry.id: entry for entry in store.entries}
    assert len(entries) == 8
    for sample in samples:
        assert_stored(store.reader(entries[sample.id]), sample)


def test_unfinished_files_of_a_killed_writer_are_deleted(store: Store) -> None:
    (store.root / "writing" / "half.h5").write_bytes(b"half a sample")
    StoreWriter(store.root, INFO).close()
    assert not list((store.root / "writing").iterdir())


def test_an_incomplete_last_line_is_ignored_by_readers_and_removed_by_the_next_writer(store: Store) -> None:
    manifest = store.root / MANIFEST_NAME
    whole = manifest.read_bytes()
    manifest.write_bytes(whole + b'{"id": "s3", "path": "sam')
    assert Store(store.root).manifest_hash == store.manifest_hash
    with StoreWriter(store.root, INFO) as writer:
        assert manifest.read_bytes() == whole
        writer.add(make_sample("s3", 5, INFO))
    assert len(Store(store.root)) == 4


def test_a_file_without_a_manifest_line_is_written_again(tmp_path: Path) -> None:
    sample = make_sample("orphan", 20, INFO)
    orphan = tmp_path / sample_path("orphan")
    orphan.parent.mkdir(parents=True)
    orphan.write_bytes(b"renamed into place, but its writer died before the manifest line")
    store = write_store(tmp_path, INFO, sample)
    assert_stored(store.reader(store.entries[0]), sample)


def test_equal_stores_have_equal_hashes_and_different_stores_do_not(store: Store, tmp_path: Path) -> None:
    copy = shutil.copytree(store.root, tmp_path / "copy")
    assert Store(copy).manifest_hash == store.manifest_hash
    lines = (copy / MANIFEST_NAME).read_text().splitlines(keepends=True)
    (copy / MANIFEST_NAME).write_text("".join(reversed(lines)))
    assert Store(copy).manifest_hash != store.manifest_hash
    (copy / MANIFEST_NAME).write_text("".join(lines[:2]))
    assert Store(copy).manifest_hash != store.manifest_hash


def test_store_and_reader_can_be_pickled_after_reading(store: Store) -> None:
    sample = make_sample("s2", 72, INFO, seed=2)
    reader = store.reader(store.entries[2])
    assert_stored(reader, sample)
    assert_stored(pickle.loads(pickle.dumps(reader)), sample)
    copy = pickle.loads(pickle.dumps(store))
    assert_stored(copy.reader(copy.entries[2]), sample)


def test_opening_a_folder_that_is_not_a_store_names_it(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"is not a hidden-state store: it has no store\.json"):
        Store(tmp_path)


BAD_SAMPLES = {
    "has no tokens": {"input_ids": torch.empty(0, dtype=torch.int32)},
    r"input_ids is torch\.int64 \[5\], this store holds torch\.int32 \[5\]": {
        "input_ids": torch.zeros(5, dtype=torch.int64)
    },
    r"input_ids leave the target's vocabulary 0\.\.999": {
        "input_ids": torch.full((5,), 1000, dtype=torch.int32)
    },
    "input_ids leave the target's vocabulary": {"input_ids": torch.full((5,), -1, dtype=torch.int32)},
    "loss_mask holds 2": {"loss_mask": torch.full((5,), 2, dtype=torch.uint8)},
    r"loss_mask is torch\.uint8 \[4\]": {"loss_mask": torch.zeros(4, dtype=torch.uint8)},
    r"hidden_state is torch\.float32 .* nothing is cast": {"hidden_state": torch.zeros(5, 8)},
    r"aux_hidden_state is torch\.bfloat16 \[5, 16\]": {
        "aux_hidden_state": torch.zeros(5, 16, dtype=torch.bfloat16)
    },
    "target_logsumexp is": {"target_logsumexp": torch.zeros(6)},
}


@pytest.mark.parametrize("said", BAD_SAMPLES)
def test_a_sample_that_does_not_fit_is_refused_and_nothing_of_it_is_stored(tmp_path: Path, said: str) -> None:
    bad = dataclasses.replace(make_sample("bad", 5, INFO), **BAD_SAMPLES[said])
    with StoreWriter(tmp_path, INFO) as writer:
        with pytest.raises(ValueError, match=said):
            writer.add(bad)
        assert not writer.done_ids
        writer.add(make_sample("bad", 5, INFO))
    assert len(Store(tmp_path)) == 1


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="dtype is 'int8', a store holds bfloat16, float16 or float32"):
        make_info(dtype="int8")


def test_a_file_in_the_place_of_another_is_detected(store: Store) -> None:
    first, second, _ = store.entries
    shutil.copy(store.root / first.path, store.root / second.path)
    with pytest.raises(StoreError, match=r"holds 's0' of 70 tokens|bytes long, the manifest says"):
        store.reader(second).read_small("input_ids")
    disguised = dataclasses.replace(second, bytes=first.bytes)
    with pytest.raises(StoreError, match="holds 's0' of 70 tokens, expected 's1' of 71"):
        store.reader(disguised).read_small("input_ids")


@pytest.mark.parametrize("field", ["target", "target_hash", "tokenizer_hash", "aux_layer_ids"])
def test_a_file_from_another_store_is_detected(store: Store, tmp_path: Path, field: str) -> None:
    value = (5, 6, 7) if field == "aux_layer_ids" else "x" * len(getattr(INFO, field))
    other_info: StoreInfo = dataclasses.replace(INFO, **{field: value})
    other = write_store(tmp_path / "other", other_info, make_sample("s0", 70, INFO))
    shutil.copy(other.root / other.entries[0].path, store.root / store.entries[0].path)
    entry = dataclasses.replace(store.entries[0], bytes=other.entries[0].bytes)
    with pytest.raises(StoreError, match=f"{field} is .*, the store's is"):
        store.reader(entry).read_small("input_ids")


def test_a_mask_that_differs_from_the_manifest_is_detected(store: Store) -> None:
    entry = dataclasses.replace(store.entries[0], trained_spans=((0, 1),))
    with pytest.raises(StoreError, match="its loss_mask is not the one in the manifest"):
        store.reader(entry).read_small("loss_mask")


def test_a_missing_file_is_named(store: Store) -> None:
    path = store.root / store.entries[0].path
    path.unlink()
    with pytest.raises(StoreError, match=f"{path}: the file is missing"):
        store.reader(store.entries[0]).read_small("input_ids")


def test_unknown_dataset_names_are_refused(store: Store) -> None:
    reader: SampleReader = store.reader(store.entries[0])
    with pytest.raises(ValueError, match="'hidden_state' is not a small dataset"):
        reader.read_small("hidden_state")
    with pytest.raises(ValueError, match="'input_ids' is not a hidden-state dataset"):
        reader.read_rows("input_ids", [(0, 1)])


def test_verify_accepts_an_intact_file_and_names_the_damaged_rows_of_another(store: Store) -> None:
    entry = store.entries[2]
    path = store.root / entry.path
    assert verify_file(path, entry, store.info) == []
    with store.reader(entry) as reader:
        index = reader._open().wide["hidden_state"]
    content = bytearray(path.read_bytes())
    content[int(index.offsets[1, 0]) + 40] ^= 1
    path.write_bytes(content)
    (damage,) = verify_file(path, entry, store.info)
    assert (damage.dataset, damage.rows) == ("hidden_state", (64, 72))
    assert "layer 0" in damage.reason
    assert str(path) in damage.reason


def test_labels_are_optional(tmp_path: Path) -> None:
    sample: Sample = make_sample("bare", 12, INFO, labels=False)
    store = write_store(tmp_path, INFO, sample)
    reader = store.reader(store.entries[0])
    assert reader.read_small("target_token_id") is None
    assert reader.read_small("target_logsumexp") is None
    assert same_bits(reader.read_rows("hidden_state", [(3, 9)]), sample.hidden_state[3:9])
