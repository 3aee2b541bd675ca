"""The codec: every bit comes back, damage is detected, and any zlib reads the streams of any backend."""

from __future__ import annotations

import logging
import sys
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from eagle_ds.store import codec
from eagle_ds.store.codec import Bytes, DamagedChunk, inflate, merge_planes, split_planes

UNSIGNED = [np.uint16, np.uint32]


@pytest.fixture(params=["isal", "zlib"])
def any_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "zlib":
        monkeypatch.setattr(codec, "backend", codec.zlib_backend)
    else:
        pytest.importorskip("isal")
    return request.param


@pytest.fixture
def without_isal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "isal", None)
    codec.backend.cache_clear()
    yield
    codec.backend.cache_clear()


def encode(rows: np.ndarray, chunk_rows: int | None = None) -> bytes:
    """Return the zlib stream of a chunk."""
    return codec.encode_chunk(rows, chunk_rows).stream


def decode_chunk(stream: Bytes, out: np.ndarray) -> np.ndarray:
    """Inverse of `encode`: fill ``out`` (unsigned, the padded chunk's shape). Raises DamagedChunk."""
    return merge_planes(inflate(stream, out.nbytes).reshape(out.itemsize, *out.shape), out)


def chunks(max_rows: int = 6, max_width: int = 40) -> st.SearchStrategy[np.ndarray]:
    shape = st.tuples(st.integers(1, max_rows), st.integers(1, max_width))
    return st.sampled_from(UNSIGNED).flatmap(lambda kind: arrays(kind, shape))


def states(rows: int = 64, width: int = 256, seed: int = 0) -> np.ndarray:
    """Return bfloat16 bits of numbers whose channels differ in scale, as hidden states do."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((rows, width)) * np.exp(rng.standard_normal(width))
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


@given(rows=chunks(), padding=st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_any_bits_come_back_and_padding_is_zero(rows: np.ndarray, padding: int) -> None:
    height = len(rows) + padding
    out = np.full((height, rows.shape[1]), 0xAB, rows.dtype)
    decode_chunk(encode(rows, height), out)
    assert (out[: len(rows)] == rows).all()
    assert not out[len(rows) :].any()


@given(rows=chunks())
@settings(max_examples=100, deadline=None)
def test_the_stream_inflates_to_what_hdf5s_shuffle_filter_produces(rows: np.ndarray) -> None:
    shuffled = rows.view(np.uint8).reshape(-1, rows.itemsize).T.tobytes()
    assert zlib.decompress(encode(rows)) == shuffled


@pytest.mark.parametrize(
    "rows", [states(), states(3, 5), np.zeros((64, 256), np.uint16), np.full((64, 256), 0x7FC1, np.uint16)]
)
def test_each_backend_reads_the_streams_of_the_other(
    any_backend: str, rows: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = encode(rows)
    monkeypatch.undo()
    assert (decode_chunk(stream, np.empty_like(rows)) == rows).all()
    assert zlib.decompress(stream)


def test_a_full_chunk_of_noise_grows_by_less_than_a_thousandth() -> None:
    rows = np.random.default_rng(0).integers(0, 1 << 16, (64, 4096), dtype=np.uint16)
    stream = encode(rows)
    assert len(stream) < rows.nbytes * 1.001
    assert (decode_chunk(stream, np.empty_like(rows)) == rows).all()


def test_uneven_exponents_shrink_more_than_under_gzip() -> None:
    rows = states(width=4096)
    assert len(encode(rows)) < 0.75 * rows.nbytes
    assert len(encode(rows)) < len(zlib.compress(rows.tobytes(), 6))


@pytest.mark.parametrize("kind", UNSIGNED)
def test_zero_planes_and_padding_cost_almost_nothing(kind: type) -> None:
    width = 4096
    assert len(encode(np.zeros((64, width), kind))) < 2000
    one_row = np.random.default_rng(0).integers(0, 1 << 16, (1, width), dtype=np.uint16).astype(kind)
    assert len(encode(one_row, 64)) < 2 * width + 3000


def test_float32_holding_bfloat16_values_costs_as_much_as_bfloat16() -> None:
    rows = states(width=1024)
    widened = rows.astype(np.uint32) << 16
    assert len(encode(widened)) < 1.01 * len(encode(rows))


def test_rows_may_be_columns_of_a_wider_array_and_so_may_the_destination() -> None:
    wide = states(64, 96)
    out = np.zeros_like(wide)
    decode_chunk(encode(wide[:, 32:64]), out[:, 32:64])
    assert (out[:, 32:64] == wide[:, 32:64]).all()
    assert not out[:, :32].any()
    assert not out[:, 64:].any()


@pytest.mark.parametrize("kind", UNSIGNED)
def test_merging_inverts_splitting(kind: type) -> None:
    rows = np.random.default_rng(1).integers(0, np.iinfo(kind).max, (7, 33), dtype=kind)
    planes = split_planes(rows, padding=2)
    assert planes.shape == (rows.itemsize, 9 * 33)
    merged = merge_planes(planes.reshape(rows.itemsize, 9, 33)[:, :7], np.empty_like(rows))
    assert (merged == rows).all()


def test_every_flipped_bit_is_detected_or_harmless(any_backend: str) -> None:
    rows = states(16, 16)
    stream = encode(rows)
    detected = 0
    for bit in range(8 * len(stream)):
        damaged = bytearray(stream)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            assert (decode_chunk(bytes(damaged), np.empty_like(rows)) == rows).all(), (
                f"bit {bit} changed the rows undetected"
            )
        except DamagedChunk:
            detected += 1
    assert detected > 0.98 * 8 * len(stream)  # the others are unused bits in the headers of stored blocks


def test_every_truncation_is_an_error(any_backend: str) -> None:
    stream = encode(states(8, 16))
    for size in range(len(stream)):
        with pytest.raises(DamagedChunk, match="damaged"):
            inflate(stream[:size], 8 * 16 * 2)


def test_a_stream_of_the_wrong_length_is_an_error(any_backend: str) -> None:
    with pytest.raises(DamagedChunk, match="holds 64 bytes, expected 128"):
        inflate(encode(states(2, 16)), 128)


def test_without_isal_zlib_is_used_and_one_warning_is_logged(
    without_isal: None, caplog: pytest.LogCaptureFixture
) -> None:
    rows = states()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert (decode_chunk(encode(rows), np.empty_like(rows)) == rows).all()
    assert [record.message for record in caplog.records if "isal" in record.message] == [caplog.messages[0]]
