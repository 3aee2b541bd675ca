"""Every other project's file is read bit for bit or rejected with the right reason; no code in it is run."""

from __future__ import annotations

import gzip
import os
import pickle
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle_ds.convert import Completer, Hdf5Map, Reason, Rejected, iter_source
from eagle_ds.convert.completion import FinalRmsNorm, check_finite, token_labels
from tests.peer_files import (
    GROUPED_MAP,
    HIDDEN,
    VOCAB,
    Features,
    features,
    specforge_dict,
    write_grouped_hdf5,
    write_modelopt,
    write_specforge,
    write_speculators,
)

BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def assert_same(sample, made: Features) -> None:
    assert sample.input_ids.dtype == torch.int32 and torch.equal(sample.input_ids.long(), made.input_ids)
    assert sample.loss_mask.dtype == torch.uint8 and torch.equal(sample.loss_mask.long(), made.loss_mask)
    for ours, theirs in ((sample.aux_hidden_state, made.aux), (sample.hidden_state, made.last)):
        assert ours.dtype == theirs.dtype and torch.equal(
            ours.view(BITS[ours.dtype]), theirs.view(BITS[theirs.dtype])
        )


def rejection_of(path: Path, completer: Completer | None = None) -> Rejected:
    with pytest.raises(Rejected) as caught:
        next(iter_source(path)).load(completer)
    assert str(path) in str(caught.value)
    return caught.value


# -- what is read --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gzipped", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_specforge_files_are_read_bit_for_bit(tmp_path: Path, gzipped: bool, dtype: torch.dtype) -> None:
    made = features(100, dtype=dtype)
    path = write_specforge(tmp_path, 7, made, gzipped)
    (item,) = iter_source(tmp_path)
    assert item.id == "rows_0-5000/data_7" and item.path == path
    assert_same(item.load(), made)


def test_model_optimizer_files_are_read_bit_for_bit(tmp_path: Path) -> None:
    made = features(33)
    write_modelopt(tmp_path, "conv-1", made)
    (item,) = iter_source(tmp_path)
    assert item.id == "conv-1"
    assert_same(item.load(), made)


def test_old_torch_files_without_a_zip_are_read(tmp_path: Path) -> None:
    made = features(20)
    write_specforge(tmp_path, 0, made, _use_new_zipfile_serialization=False)
    assert_same(next(iter_source(tmp_path)).load(), made)


def test_another_hdf5_schema_is_read_by_its_map_with_one_sample_in_each_group(tmp_path: Path) -> None:
    made = [features(10 + number, seed=number) for number in range(12)]
    path = write_grouped_hdf5(tmp_path / "dump.h5", made)
    items = list(iter_source(path, Hdf5Map.parse(GROUPED_MAP)))
    assert [item.id for item in items[:3]] == ["dump/s0", "dump/s1", "dump/s2"] and items[-1].id == "dump/s11"
    for item, expected in zip(items, made, strict=True):
        assert_same(item.load(), expected)


def test_a_true_bfloat16_type_in_hdf5_is_read_as_its_bits(tmp_path: Path) -> None:
    from eagle_ds.store.format import storage_type

    made = features(9)
    with h5py.File(tmp_path / "one.h5", "w") as file:
        file["input_ids"], file["loss_mask"] = made.input_ids.numpy(), made.loss_mask.numpy()
        for name, states in (("aux_hidden_state", made.aux), ("hidden_state", made.last)):
            kind = storage_type("bfloat16")
            dataset = h5py.h5d.create(
                file.id, name.encode(), kind, h5py.h5s.create_simple(tuple(states.shape))
            )
            dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, states.view(torch.int16).numpy(), kind)
    assert_same(next(iter_source(tmp_path)).load(), made)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.binary(min_size=8, max_size=64), st.booleans())
def test_any_finite_bit_pattern_survives(num_tokens: int, noise: bytes, gzipped: bool) -> None:
    import tempfile

    made = features(num_tokens, hidden=4)
    bits = np.resize(
        np.frombuffer(noise, np.uint8), num_tokens * 24
    ).view(np.uint16).reshape(num_tokens, 12).copy()
    bits[(bits & 0x7F80) == 0x7F80] ^= 0x4000  # not Inf, not NaN
    made.aux = torch.from_numpy(bits).view(torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        write_specforge(Path(folder), 0, made, gzipped)
        assert_same(next(iter_source(folder)).load(), made)


def test_files_are_listed_in_natural_order_and_other_files_ignored(tmp_path: Path) -> None:
    for number in (10, 2, 5001):
        write_specforge(tmp_path, number, features(4))
    (tmp_path / "README.md").write_text("hello")
    (tmp_path / "rows_0-5000" / ".data_3.ckpt").write_text("half a download")
    assert [item.id for item in iter_source(tmp_path)] == [
        "rows_0-5000/data_2", "rows_0-5000/data_10", "rows_5000-10000/data_5001"
    ]


# -- what is rejected ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("gzipped", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.999])
def test_a_truncated_file_is_called_truncated(tmp_path: Path, gzipped: bool, share: float) -> None:
    path = write_specforge(tmp_path, 0, features(400), gzipped)
    os.truncate(path, int(path.stat().st_size * share))
    reasons = (
        Reason.TRUNCATED, Reason.CORRUPT, Reason.UNREADABLE
    ) if 0 < share < 0.1 else (Reason.TRUNCATED,)
    assert rejection_of(path).reason in reasons


@pytest.mark.parametrize("gzipped", [False, True])
@pytest.mark.parametrize("share", [0.002, 0.2, 0.5, 0.8])
def test_a_flipped_bit_is_noticed(tmp_path: Path, gzipped: bool, share: float) -> None:
    path = write_specforge(tmp_path, 0, features(400), gzipped)
    content = bytearray(path.read_bytes())
    content[int(len(content) * share)] ^= 16
    path.write_bytes(content)
    assert rejection_of(path).reason == Reason.CORRUPT


def test_a_torch_file_saved_without_checksums_is_not_called_corrupt(tmp_path: Path) -> None:
    made = features(50)
    torch.serialization.set_crc32_options(False)
    try:
        write_specforge(tmp_path, 0, made)
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(next(iter_source(tmp_path)).load(), made)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_is_never_run(tmp_path: Path, legacy: bool) -> None:
    marker = tmp_path / "it_ran"

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(marker),))

    path = tmp_path / "data_0.ckpt"
    torch.save(
        {**specforge_dict(features(4)), "extra": Evil()}, path, _use_new_zipfile_serialization=not legacy
    )
    assert rejection_of(path).reason == Reason.UNSAFE
    path.write_bytes(pickle.dumps(Evil()))
    assert rejection_of(path).reason in (Reason.UNSAFE, Reason.UNREADABLE)
    assert not marker.exists()


def broken(change) -> dict:
    tensors = specforge_dict(features(24))
    change(tensors)
    return tensors


def poke(value: float, name: str):
    def change(tensors: dict) -> None:
        tensors[name][0, 17, 3] = value

    return change


CASES = {
    "no hidden_state": (lambda t: t.pop("hidden_state"), Reason.MISSING_KEY, "hidden_state"),
    "no loss_mask": (lambda t: t.pop("loss_mask"), Reason.MISSING_KEY, "--dataset"),
    "a mask that is too short": (
        lambda t: t.update(loss_mask=t["loss_mask"][:-1]), Reason.WRONG_SHAPE, "loss_mask 23"
    ),
    "ids that are too long": (
        lambda t: t.update(input_ids=torch.zeros(25, dtype=torch.int64)), Reason.WRONG_SHAPE, "input_ids 25"
    ),
    "two samples in a file": (
        lambda t: t.update(hidden_state=torch.zeros(2, 24, HIDDEN)), Reason.WRONG_SHAPE, "[2, 24, 32]"
    ),
    "aux of two layers": (
        lambda t: t.update(aux_hidden_state=t["aux_hidden_state"][..., :64]), Reason.WRONG_SHAPE, "64 wide"
    ),
    "a NaN": (
        poke(float("nan"), "hidden_state"), Reason.NOT_FINITE, "hidden_state has a NaN or Inf in row 17"
    ),
    "an Inf": (
        poke(float("-inf"), "aux_hidden_state"),
        Reason.NOT_FINITE,
        "aux_hidden_state has a NaN or Inf in row 17",
    ),
    "integer states": (lambda t: t.update(hidden_state=t["hidden_state"].long()), Reason.DTYPE, "int64"),
    "mixed dtypes": (lambda t: t.update(hidden_state=t["hidden_state"].float()), Reason.DTYPE, "float32"),
    "float ids": (lambda t: t.update(input_ids=t["input_ids"].float()), Reason.DTYPE, "input_ids"),
    "a weight in the mask": (lambda t: t.update(loss_mask=t["loss_mask"] * 0.5), Reason.MASK, "0.5"),
    "a token outside": (
        lambda t: t["input_ids"].__setitem__(3, VOCAB), Reason.TOKEN_RANGE, f"0 to {VOCAB - 1}"
    ),
    "a list in place of a tensor": (lambda t: t.update(hidden_state=[1.0]), Reason.DTYPE, "list"),
    "another hidden size": (
        lambda t: t.update(
            hidden_state=torch.zeros(1, 24, 16).bfloat16(), aux_hidden_state=torch.zeros(1, 24, 48).bfloat16()
        ),
        Reason.HIDDEN_SIZE,
        "16 wide",
    ),
    "no tokens": (lambda t: t.update(specforge_dict(features(0))), Reason.EMPTY, "S = 0"),
}


@pytest.mark.parametrize("case", CASES)
def test_each_fault_is_rejected_with_its_reason(tmp_path: Path, case: str) -> None:
    change, reason, words = CASES[case]
    path = tmp_path / "data_0.ckpt"
    torch.save(broken(change), path)
    rejected = rejection_of(path, Completer(hidden_size=HIDDEN, vocab_size=VOCAB))
    assert rejected.reason == reason and words in rejected.detail


def test_a_file_that_is_no_dict_or_no_torch_file_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "data_0.ckpt"
    torch.save(torch.zeros(3), path)
    assert rejection_of(path).reason == Reason.MISSING_KEY
    path.write_bytes(b"not a torch file at all, just some text that goes on")
    assert rejection_of(path).reason in (Reason.UNREADABLE, Reason.UNSAFE)
    gz = tmp_path / "data_1.ckpt.gz"
    gz.write_bytes(gzip.compress(b"no torch file inside"))
    assert rejection_of(gz).reason in (Reason.UNREADABLE, Reason.UNSAFE)
    gz.write_bytes(b"no gzip at all, whatever its name says")
    assert rejection_of(gz).reason == Reason.CORRUPT


def test_a_folder_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        list(iter_source(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="no file of a known format"):
        list(iter_source(tmp_path))


def test_a_truncated_safetensors_or_hdf5_file_is_rejected(tmp_path: Path) -> None:
    made = features(50)
    path = write_speculators(tmp_path, 0, made.input_ids, torch.randn(50, 4, HIDDEN).bfloat16())
    os.truncate(path, path.stat().st_size - 100)
    assert rejection_of(path).reason in (Reason.TRUNCATED, Reason.CORRUPT)
    path = write_grouped_hdf5(tmp_path / "dump.h5", [made])
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(Rejected) as caught:
        next(iter_source(path, Hdf5Map.parse(GROUPED_MAP))).load()
    assert caught.value.reason == Reason.TRUNCATED


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("input_ids", "NAME=PATH"),
        ("tokens=a,aux_hidden_state=b,hidden_state=c", "NAME one of input_ids"),
        ("input_ids=a,hidden_state=c", "aux_hidden_state"),
        ("input_ids=a,input_ids=b,aux_hidden_state=b,hidden_state=c", "twice"),
    ],
)
def test_a_wrong_map_is_refused_with_the_reason(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Hdf5Map.parse(text)


def test_a_map_that_does_not_fit_lists_what_the_file_holds(tmp_path: Path) -> None:
    path = write_grouped_hdf5(tmp_path / "dump.h5", [features(5)])
    mapping = Hdf5Map.parse(GROUPED_MAP.replace("/final", "/last"))
    with pytest.raises(Rejected, match=r"no dataset data/s0/last@bf16 for hidden_state") as caught:
        next(iter_source(path, mapping)).load()
    assert caught.value.reason == Reason.MISSING_KEY


# -- the parts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [0, 1023, 1024, 2999])
def test_the_first_row_that_is_not_finite_is_found(row: int) -> None:
    states = torch.zeros(3000, 8, dtype=torch.bfloat16)
    states[row, 5] = float("inf")
    with pytest.raises(Rejected, match=f"row {row},"):
        check_finite("hidden_state", states)


def test_token_labels_are_those_of_the_whole_logits_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    from eagle_ds.convert import completion

    monkeypatch.setattr(completion, "HEAD_VOCAB_ROWS", 11)
    monkeypatch.setattr(completion, "HEAD_LOGIT_BYTES", 4 * 11 * 7)
    hidden, head = torch.randn(23, 16).bfloat16(), torch.randn(50, 16).bfloat16()
    token, logsumexp = token_labels(hidden, head)
    logits = hidden.float() @ head.float().T
    assert token.dtype == torch.int32 and torch.equal(token.long(), logits.argmax(-1))
    torch.testing.assert_close(logsumexp, torch.logsumexp(logits, -1))


def test_the_final_norm_equals_that_of_transformers_bit_for_bit() -> None:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    states, weight = (torch.randn(2100, 64) * 30).bfloat16(), torch.rand(64).bfloat16()
    for theirs, one_plus in ((LlamaRMSNorm(64, 1e-5), False), (GemmaRMSNorm(64, 1e-5), True)):
        theirs.weight.data = weight
        assert torch.equal(FinalRmsNorm(weight, 1e-5, one_plus)(states), theirs(states))


def test_gzip_files_are_read_without_isal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from eagle_ds.convert import torch_files

    made = features(40)
    path = write_specforge(tmp_path, 0, made, gzipped=True)
    monkeypatch.setitem(sys.modules, "isal", None)
    torch_files._gzip_library.cache_clear()
    try:
        assert_same(next(iter_source(path)).load(), made)
        os.truncate(path, path.stat().st_size // 2)
        assert rejection_of(path).reason == Reason.TRUNCATED
    finally:
        torch_files._gzip_library.cache_clear()


def test_reading_does_not_change_the_source(tmp_path: Path) -> None:
    path = write_specforge(tmp_path, 0, features(64))
    shutil.copy(path, tmp_path / "copy")
    sample = next(iter_source(path)).load()
    sample.hidden_state.zero_()  # a private mapping: writes to it do not reach the file
    assert path.read_bytes() == (tmp_path / "copy").read_bytes()
