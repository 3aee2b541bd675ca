"""Any HDF5 reader understands the files, and a row range costs only the chunks that hold it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eagle_ds.store import reader as reader_module
from eagle_ds.store.chunks import ChunkIndex, chunk_reads
from eagle_ds.store.format import CHUNK_ROWS, SMALL_DTYPES, TORCH_DTYPES, WIDE_NAMES
from eagle_ds.store.reader import read_rows_h5py
from eagle_ds.store.store import ReadStats, SampleReader, Store, StoreError
from tests.store_cases import assert_stored, inflated_per_used, make_info, make_sample, same_bits, write_store

TOKENS = 5 * CHUNK_ROWS + 11
DTYPES = list(TORCH_DTYPES)
BF16 = make_info()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return write_store(tmp_path_factory.mktemp("store"), BF16, make_sample("s", TOKENS, BF16))


@pytest.fixture
def reader(store: Store) -> SampleReader:
    return store.reader(store.entries[0], threads=1)


def file_of(store: Store) -> Path:
    return store.root / store.entries[0].path


def row_ranges() -> st.SearchStrategy[list[tuple[int, int]]]:
    cut = st.integers(0, TOKENS)
    return st.lists(st.tuples(cut, cut).map(lambda pair: (min(pair), max(pair))), max_size=6)


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    num_tokens=st.integers(1, 3 * CHUNK_ROWS),
    hidden_size=st.integers(1, 20),
    num_aux=st.integers(1, 4),
    seed=st.integers(0, 99),
)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shape_and_any_bits_come_back(
    tmp_path_factory: pytest.TempPathFactory,
    dtype: str,
    num_tokens: int,
    hidden_size: int,
    num_aux: int,
    seed: int,
) -> None:
    info = make_info(hidden_size, num_aux, dtype)
    sample = make_sample("any", num_tokens, info, seed, labels=seed % 2 == 0)
    store = write_store(tmp_path_factory.mktemp("any"), info, sample)
    assert_stored(store.reader(store.entries[0]), sample)
    for name in WIDE_NAMES:
        assert same_bits(read_rows_h5py(file_of(store), name, [(0, num_tokens)]), getattr(sample, name))


@pytest.mark.parametrize("name", WIDE_NAMES)
@given(ranges=row_ranges(), threads=st.sampled_from([1, 3]))
@settings(max_examples=60, deadline=None)
def test_ranges_in_any_order_and_overlapping_equal_slices(
    store: Store, name: str, ranges: list[tuple[int, int]], threads: int
) -> None:
    rows = getattr(make_sample("s", TOKENS, BF16), name)
    expected = torch.cat([rows[start:stop] for start, stop in ranges]) if ranges else rows[:0]
    with store.reader(store.entries[0], threads=threads) as reader:
        assert same_bits(reader.read_rows(name, ranges), expected)
    assert same_bits(read_rows_h5py(file_of(store), name, ranges), expected)


def test_plain_h5py_reads_the_right_numbers(tmp_path: Path) -> None:
    sample = make_sample("s", 100, BF16)
    sample.hidden_state = torch.randn(100, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    store = write_store(tmp_path, BF16, sample)
    with h5py.File(file_of(store)) as file:
        assert (file["hidden_state"][()] == sample.hidden_state.float().numpy()).all()
        assert (file["hidden_state"][60:70, 3] == sample.hidden_state[60:70, 3].float().numpy()).all()
        for name in SMALL_DTYPES:
            assert (file[name][()] == getattr(sample, name).numpy()).all()


def test_the_type_is_a_true_bfloat16(store: Store) -> None:
    with h5py.File(file_of(store)) as file:
        kind = file["hidden_state"].id.get_type()
    assert isinstance(kind, h5py.h5t.TypeFloatID)
    assert (kind.get_size(), kind.get_fields(), kind.get_ebias()) == (2, (15, 7, 8, 0, 7), 127)
    assert kind.get_order() == h5py.h5t.ORDER_LE


@pytest.mark.skipif(shutil.which("h5dump") is None, reason="needs h5dump (hdf5-tools)")
def test_h5dump_prints_the_numbers(tmp_path: Path) -> None:
    sample = make_sample("s", 3, BF16)
    sample.hidden_state = torch.arange(24).view(3, 8).bfloat16() / 4
    store = write_store(tmp_path, BF16, sample)
    shown = subprocess.run(
        ["h5dump", "-d", "hidden_state", "-y", "-w", "200", file_of(store)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75" in shown.stdout


def test_hidden_states_are_chunked_by_layer_and_filtered_by_shuffle_and_gzip(store: Store) -> None:
    with h5py.File(file_of(store)) as file:
        for name in WIDE_NAMES:
            dataset, plist = file[name], file[name].id.get_create_plist()
            assert dataset.chunks == (CHUNK_ROWS, BF16.hidden_size)
            assert (dataset.shuffle, dataset.compression) == (True, "gzip")
            assert plist.get_nfilters() == 2
            assert plist.get_filter(0)[0] == h5py.h5z.FILTER_SHUFFLE
            assert plist.get_fill_time() == h5py.h5d.FILL_TIME_NEVER
            assert dataset.id.get_num_chunks() == -(-TOKENS // CHUNK_ROWS) * (
                3 if name == "aux_hidden_state" else 1
            )


def test_the_header_describes_the_file(store: Store) -> None:
    with h5py.File(file_of(store)) as file:
        assert file.attrs["schema"] == 1
        assert file.attrs["complete"] == 1
        assert file.attrs["num_tokens"] == TOKENS
        assert file.attrs["hidden_size"] == BF16.hidden_size
        assert list(file.attrs["aux_layer_ids"]) == [0, 1, 2]
        assert file.attrs["target"] == b"some/target"
        assert file.attrs["encoder"].startswith(b"eagle_ds")


def test_each_chunk_is_read_and_inflated_once_for_any_ranges(
    reader: SampleReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    inflated: list[int] = []
    real = reader_module.inflate
    monkeypatch.setattr(
        reader_module,
        "inflate",
        lambda stream, size, crc32: inflated.append(size) or real(stream, size, crc32),
    )
    ranges = [(0, 3), (60, 70), (1, 2), (65, 66), (130, 130)]
    reader.read_small("input_ids")
    before = reader.stats
    rows = reader.read_rows("aux_hidden_state", ranges)
    chunk_bytes = CHUNK_ROWS * BF16.hidden_size * 2
    assert inflated == [chunk_bytes] * 6  # rows 0..63 and 64..127 of three layers
    assert reader.stats.bytes_inflated - before.bytes_inflated == 6 * chunk_bytes
    assert reader.stats.bytes_used - before.bytes_used == rows.nbytes


def test_the_statistics_count_the_bytes_read_from_the_file(
    reader: SampleReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[int] = []
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda *call: fetched.append(len(block := real(*call))) or block)
    reader.read_small("input_ids")
    before = reader.stats.bytes_read
    reader.read_rows("hidden_state", [(0, TOKENS)])
    assert len(fetched) <= 2  # adjacent chunks come in one call; HDF5 puts its chunk index after the first
    assert reader.stats.bytes_read - before == sum(fetched)
    assert sum(fetched) < 1.2 * TOKENS * BF16.hidden_size * 2


def test_stats_add_up() -> None:
    total = ReadStats(1, 30, 3) + ReadStats(10, 30, 57)
    assert total == ReadStats(11, 60, 60)
    assert inflated_per_used(total) == 1.0
    assert inflated_per_used(ReadStats()) == 0.0


@pytest.mark.parametrize(("num_tokens", "most"), [(4096, 1.12), (131_072, 1.02)])
def test_a_rank_of_eight_inflates_little_more_than_its_rows(num_tokens: int, most: float) -> None:
    """A rank reads its context rows of the aux states, and as many target rows plus the seven after them."""
    grid = (num_tokens // CHUNK_ROWS, 3)
    aux = ChunkIndex(np.arange(grid[0] * 3).reshape(grid), np.ones(grid, np.int64), None, CHUNK_ROWS)
    hidden = ChunkIndex(np.arange(grid[0]).reshape(-1, 1), np.ones((grid[0], 1), np.int64), None, CHUNK_ROWS)
    share = num_tokens // 8
    for rank in range(8):
        start, stop = rank * share, (rank + 1) * share
        ahead = min(num_tokens, stop + 7)
        reads = [
            read
            for batch in chunk_reads(aux, [(start, stop)]) + chunk_reads(hidden, [(start, ahead)])
            for read in batch
        ]
        assert len(reads) * CHUNK_ROWS / (3 * share + ahead - start) <= most


def test_rows_are_read_directly_into_the_given_tensor(reader: SampleReader) -> None:
    out = torch.zeros(20, BF16.hidden_size, dtype=torch.bfloat16)
    rows = reader.read_rows("hidden_state", [(0, 6), (70, 74)], out[5:15])
    assert rows.data_ptr() == out[5:].data_ptr()
    assert same_bits(out[5:15], reader.read_rows("hidden_state", [(0, 6), (70, 74)]))
    assert not out[:5].any()
    assert not out[15:].any()


@pytest.mark.parametrize(
    "out",
    [torch.empty(9, 8, dtype=torch.bfloat16), torch.empty(10, 8), torch.empty(10, 24, dtype=torch.bfloat16)],
)
def test_a_destination_that_does_not_fit_is_refused(reader: SampleReader, out: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"out is .*, expected torch\.bfloat16 \[10, 8\] on the CPU"):
        reader.read_rows("hidden_state", [(0, 10)], out)


@pytest.mark.parametrize("wrong", [(-1, 3), (5, 4), (0, TOKENS + 1)])
def test_rows_outside_the_sample_are_refused(reader: SampleReader, wrong: tuple[int, int]) -> None:
    with pytest.raises(
        ValueError, match=rf"rows {wrong[0]}:{wrong[1]} of hidden_state are outside 0:{TOKENS}"
    ):
        reader.read_rows("hidden_state", [wrong])


@pytest.mark.gpu
def test_rows_can_be_read_into_pinned_memory(reader: SampleReader) -> None:
    out = torch.empty(TOKENS, BF16.hidden_size, dtype=torch.bfloat16, pin_memory=True)
    rows = reader.read_rows("hidden_state", [(0, TOKENS)], out)
    assert rows.is_pinned()
    assert same_bits(rows.cuda().cpu(), make_sample("s", TOKENS, BF16).hidden_state)


def rewritten(store: Store, path: Path, **options: object) -> SampleReader:
    """Copy the file as another program might: h5py creates its hidden-state datasets with ``options``."""
    with h5py.File(file_of(store), locking=False) as source, h5py.File(path, "w") as copy:
        for key, value in source.attrs.items():
            copy.attrs[key] = value
        for name, dataset in source.items():
            kind = dataset.id.get_type()
            wide = name in WIDE_NAMES
            rows = (
                read_rows_h5py(file_of(store), name, [(0, TOKENS)]).view(torch.int16).numpy()
                if wide
                else dataset[()]
            )
            settings = {"compression": "gzip", **(options if wide else {})}
            target = copy.create_dataset(name, dataset.shape, dtype=h5py.Datatype(kind), **settings)
            target.id.write(h5py.h5s.ALL, h5py.h5s.ALL, rows, kind)
    return SampleReader(path)


@pytest.mark.parametrize(
    "options", [{}, {"shuffle": True}, {"fletcher32": True}, {"chunks": (10, 8), "compression_opts": 1}]
)
def test_files_rewritten_with_another_gzip_pipeline_are_read_by_plain_h5py(
    store: Store, tmp_path: Path, options: dict
) -> None:
    assert_stored(rewritten(store, tmp_path / "copy.h5", **options), make_sample("s", TOKENS, BF16))


def test_files_without_a_checksum_are_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is not gzip-filtered, so no checksum protects it"):
        rewritten(store, tmp_path / "plain.h5", compression=None).read_rows("hidden_state", [(0, 1)])


def test_a_chunk_stored_without_its_filters_is_refused(store: Store, tmp_path: Path) -> None:
    path = shutil.copy(file_of(store), tmp_path / "mask.h5")
    with h5py.File(path, "r+") as file:
        raw = bytes(CHUNK_ROWS * BF16.hidden_size * 2)
        file["hidden_state"].id.write_direct_chunk((64, 0), raw, filter_mask=3)
    with pytest.raises(StoreError, match="hidden_state rows from 64: not compressed"):
        SampleReader(Path(path)).read_rows("hidden_state", [(0, 1)])


def edit(file: h5py.File, change: str) -> None:
    """Make one change after which the file must be refused."""
    if change == "unfinished":
        file.attrs["complete"] = np.uint8(0)
    elif change == "schema":
        file.attrs["schema"] = 2
    elif change == "no schema":
        del file.attrs["schema"]
    elif change == "attribute":
        del file.attrs["tokenizer_hash"]
    elif change == "dataset":
        del file["loss_mask"]
    elif change == "shape":
        file.attrs["num_tokens"] = TOKENS - 1
    elif change == "type":
        del file["input_ids"]
        file.create_dataset("input_ids", data=np.zeros(TOKENS, np.int64), compression="gzip")
    elif change == "dtype":
        file.attrs["dtype"] = np.bytes_(b"float16")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("unfinished", "never completed"),
        ("schema", "schema is 2, this version reads 1"),
        ("no schema", "no readable schema attribute"),
        ("attribute", "attributes are missing: tokenizer_hash"),
        ("dataset", "dataset loss_mask is missing"),
        ("shape", rf"aux_hidden_state has shape \[{TOKENS}, 24\], expected \[{TOKENS - 1}, 24\]"),
        ("type", "input_ids has another type than int32"),
        ("dtype", "aux_hidden_state has another type than float16"),
    ],
)
def test_a_file_of_another_kind_is_refused_with_the_reason(
    store: Store, tmp_path: Path, change: str, said: str
) -> None:
    path = Path(shutil.copy(file_of(store), tmp_path / "other.h5"))
    with h5py.File(path, "r+") as file:
        edit(file, change)
    with pytest.raises(StoreError, match=said) as caught:
        SampleReader(path).read_small("input_ids")
    assert str(path) in str(caught.value)
