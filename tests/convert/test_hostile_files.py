"""Damaged, odd and hostile source files are either read correctly or rejected by name."""

from __future__ import annotations

import gzip
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle_ds.convert import Completer, Hdf5Map, Reason, Rejected, iter_source
from eagle_ds.convert.completion import check_finite
from tests.convert.test_sources import BITS, assert_same, rejection_of
from tests.peer_files import (
    GROUPED_MAP,
    HIDDEN,
    features,
    specforge_dict,
    write_grouped_hdf5,
    write_modelopt,
    write_specforge,
)

EXPONENT = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F800000}


# -- numbers -------------------------------------------------------------------------------------------------


@settings(max_examples=120, deadline=None)
@given(
    dtype=st.sampled_from(list(EXPONENT)),
    rows=st.integers(1, 40),
    width=st.integers(1, 70),
    at=st.integers(0, 10**6),
    payload=st.integers(0, 2**31 - 1),
    negative=st.booleans(),
)
def test_a_single_nan_or_inf_is_found_anywhere_and_with_any_payload(
    dtype: torch.dtype, rows: int, width: int, at: int, payload: int, negative: bool
) -> None:
    states = torch.randn(rows, width).to(dtype)
    exponent = EXPONENT[dtype]
    mantissa = payload % (exponent & -exponent)  # 0: Inf; else a NaN, quiet or signalling
    bits = exponent | mantissa | (-(1 << (8 * dtype.itemsize - 1)) if negative else 0)
    states.view(BITS[dtype]).view(-1)[at % states.numel()] = bits
    with pytest.raises(Rejected, match=f"row {at % states.numel() // width},"):
        check_finite("hidden_state", states)


@pytest.mark.parametrize("dtype", list(EXPONENT))
def test_extreme_values_and_both_zeros_count_as_finite(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    values = [info.max, info.min, info.tiny, info.smallest_normal / 2, 0.0, -0.0]
    check_finite("hidden_state", torch.tensor([values], dtype=dtype))


def test_a_cast_that_overflows_is_rejected_with_that_reason(tmp_path: Path) -> None:
    made = features(70)
    made.last[65, 2] = 1e5
    path = write_specforge(tmp_path, 0, made)
    rejected = rejection_of(path, Completer(dtype="float16", cast=True))
    assert rejected.reason == Reason.NOT_FINITE
    assert "row 65, once cast: its value is beyond float16" in rejected.detail
    made.last[65, 2] = 65504
    write_specforge(tmp_path, 0, made)
    with pytest.raises(Rejected, match="beyond float16"):
        next(iter_source(path)).load(Completer(dtype="float16", cast=True))  # 65504 is 65536 in bfloat16
    made.last[65, 2] = 65280
    write_specforge(tmp_path, 0, made)
    assert next(iter_source(path)).load(Completer(dtype="float16", cast=True)).hidden_state[65, 2] == 65280


# -- shapes and tensors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("gzipped", [False, True])
def test_a_sample_of_one_token_is_read(tmp_path: Path, gzipped: bool) -> None:
    made = features(1)
    assert_same(next(iter_source(write_specforge(tmp_path, 0, made, gzipped))).load(), made)
    assert_same(next(iter_source(write_modelopt(tmp_path, "one", made))).load(), made)


@pytest.mark.parametrize("dtype", list(EXPONENT))
def test_transposed_strided_and_expanded_tensors_are_read_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    made = features(90, dtype=dtype)
    wide = torch.stack([made.last, made.last], -1)  # every second number of a wider tensor
    mask = torch.ones(1, dtype=torch.int64).expand(90)
    odd = replace(made, aux=made.aux.t().contiguous().t(), last=wide[..., 1], loss_mask=mask)
    assert not odd.aux.is_contiguous() and not odd.last.is_contiguous()
    path = write_specforge(tmp_path, 0, odd)
    assert not torch.load(path)["aux_hidden_state"].is_contiguous()
    assert_same(next(iter_source(path)).load(), odd)


STRANGE = {
    "sparse": lambda t: t.update(hidden_state=t["hidden_state"].to_sparse()),
    "quantized": lambda t: t.update(
        hidden_state=torch.quantize_per_tensor(t["hidden_state"].float(), 0.1, 0, torch.qint8)
    ),
    "meta": lambda t: t.update(aux_hidden_state=t["aux_hidden_state"].to("meta")),
    "sparse mask": lambda t: t.update(loss_mask=t["loss_mask"].to_sparse()),
    "complex mask": lambda t: t.update(loss_mask=t["loss_mask"].to(torch.complex64)),
    "float8": lambda t: t.update(hidden_state=t["hidden_state"].to(torch.float8_e4m3fn)),
    "a mask without a dimension": lambda t: t.update(loss_mask=torch.tensor(1)),
    "ids without a dimension": lambda t: t.update(input_ids=torch.tensor(1)),
    "no width": lambda t: t.update(
        hidden_state=t["hidden_state"][..., :0], aux_hidden_state=t["aux_hidden_state"][..., :0]
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", STRANGE)
def test_tensors_that_no_capture_writes_are_rejected(tmp_path: Path, kind: str) -> None:
    tensors = specforge_dict(features(24))
    STRANGE[kind](tensors)
    torch.save(tensors, tmp_path / "data_0.ckpt")
    assert rejection_of(tmp_path / "data_0.ckpt", Completer(hidden_size=HIDDEN)).detail


def test_a_loss_mask_of_none_counts_as_missing(tmp_path: Path) -> None:
    torch.save({**specforge_dict(features(24)), "loss_mask": None}, tmp_path / "data_0.ckpt")
    assert rejection_of(tmp_path / "data_0.ckpt").reason == Reason.MISSING_KEY


def test_target_tokens_mapped_from_the_wrong_dataset_are_rejected(tmp_path: Path) -> None:
    path = write_grouped_hdf5(tmp_path / "dump.h5", [features(5)])
    for wrong in ("data/*/low@bf16", "data/*/mask"):
        mapping = Hdf5Map.parse(f"{GROUPED_MAP},target_token_id={wrong}")
        with pytest.raises(Rejected, match=r"target_token_id is .*, expected torch.int64 \[5\]; check --map"):
            next(iter_source(path, mapping)).load()


# -- files ---------------------------------------------------------------------------------------------------


def test_a_file_name_that_is_wrong_about_gzip_is_reported(tmp_path: Path) -> None:
    made = features(9)
    plain = write_specforge(tmp_path, 0, made)
    misnamed = plain.rename(plain.with_suffix(".ckpt.gz"))
    rejected = rejection_of(misnamed)
    assert rejected.reason == Reason.CORRUPT
    assert "begins with b'PK', expected b'\\x1f\\x8b'" in rejected.detail
    misnamed = write_specforge(tmp_path, 1, made, gzipped=True)
    rejected = rejection_of(misnamed.rename(misnamed.with_suffix("")))
    assert rejected.reason == Reason.UNREADABLE and "it is gzip-compressed" in rejected.detail


@pytest.mark.parametrize("content", [b"", gzip.compress(b"")], ids=["no bytes", "nothing inside"])
def test_an_empty_gzip_file_is_truncated(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "data_0.ckpt.gz"
    path.write_bytes(content)
    assert rejection_of(path).reason == Reason.TRUNCATED


def test_links_are_followed_once_and_a_broken_link_is_rejected(tmp_path: Path) -> None:
    made = features(9)
    write_specforge(tmp_path / "far", 0, made)
    source = tmp_path / "src"
    source.mkdir()
    (source / "rows").symlink_to(tmp_path / "far" / "rows_0-5000")
    (source / "rows" / "loop").symlink_to(source)
    (source / "data_1.ckpt").symlink_to(source / "rows" / "data_0.ckpt")
    (source / "data_2.ckpt").symlink_to(tmp_path / "gone.ckpt")
    items = {item.id: item for item in iter_source(source)}
    assert set(items) == {"rows/data_0", "data_1", "data_2"}
    assert_same(items["rows/data_0"].load(), made)
    assert_same(items["data_1"].load(), made)
    with pytest.raises(Rejected, match="a link to nowhere"):
        items["data_2"].load()


@pytest.mark.parametrize("name", ["pipe.ckpt", "pipe.safetensors", "pipe.h5"])
def test_a_pipe_is_rejected_without_waiting_for_its_writer(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    for mapping in (None, Hdf5Map.parse(GROUPED_MAP)):
        (item,) = iter_source(tmp_path, mapping)
        with pytest.raises(Rejected, match="expected a regular file"):
            item.load()


def test_file_names_that_are_not_utf8_or_have_odd_digits_can_be_printed(tmp_path: Path) -> None:
    made = features(9)
    for name in (
        b"caf\xe9.ckpt", "data_\u00b2.ckpt".encode(), "data_\u0663.ckpt".encode(), b"two\nlines.ckpt"
    ):
        write_specforge(tmp_path, 0, made).rename(
            os.fsdecode(os.fsencode(tmp_path / "rows_0-5000") + b"/" + name)
        )
    items = list(iter_source(tmp_path))
    assert len(items) == 4 and "rows_0-5000/caf\\xe9" in [item.id for item in items]
    for item in items:
        assert item.id.encode()
        assert_same(item.load(), made)
        rejected = Rejected(Reason.EMPTY, "", item.place)
        assert str(rejected).encode()


@pytest.mark.parametrize("kind", ["grouped", "own"])
def test_no_flipped_bit_of_an_hdf5_source_raises_anything_but_a_rejection(tmp_path: Path, kind: str) -> None:
    """Plain HDF5 has no checksum for its metadata: a flip may go unnoticed, but raises no other error."""
    from tests.store_cases import make_info, make_sample, write_store

    if kind == "grouped":
        path, mapping = write_grouped_hdf5(tmp_path / "dump.h5", [features(5)]), Hdf5Map.parse(GROUPED_MAP)
    else:
        info = make_info()
        sample = make_sample("s", 40, info)
        sample.aux_hidden_state, sample.hidden_state = torch.randn(
            40, 24
        ).bfloat16(), torch.randn(40, 8).bfloat16()
        store = write_store(tmp_path / "store", info, sample)
        path, mapping = store.root / store.entries[0].path, None
    content = path.read_bytes()
    noticed = 0
    for bit in random.Random(0).sample(range(8 * len(content)), 300):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        for item in iter_source(path, mapping):
            try:
                item.load()
            except Rejected as error:
                assert str(path) in str(error)
                noticed += 1
    assert noticed > 30
