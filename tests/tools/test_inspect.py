"""tools/inspect_hdf5.py shows a store's contents, finds and names damage, and exports SpecForge's files."""

from __future__ import annotations

import importlib.util
import resource
import sys
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import ModuleType

import h5py
import numpy as np
import pytest
import torch

from eagle_ds.convert import iter_source
from eagle_ds.convert.options import ConvertOptions
from eagle_ds.convert.run import convert
from eagle_ds.store.store import Store
from eagle_ds.store.summary import histogram, summarize
from tests.peer_files import AUX_IDS, VOCAB, Features, features, write_specforge

TOOL = Path(__file__).resolve().parents[2] / "tools" / "inspect_hdf5.py"
LENGTHS = [40, 200, 300, 1000, 5, 64]


@pytest.fixture(scope="session")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("inspect_hdf5", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the tool in this process; return its exit code and its output with white space collapsed."""

    def call(*arguments: str | Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments), "--workers", "1"])
        code = tool.main()
        printed = capsys.readouterr()
        return code, " ".join((printed.out + printed.err).split())

    return call


@pytest.fixture
def store(tmp_path: Path) -> Path:
    for number, length in enumerate(LENGTHS):
        write_specforge(tmp_path / "src", number, features(length, seed=number, hidden=64))
    options = ConvertOptions(
        tmp_path / "src",
        tmp_path / "store",
        1,
        target_name="tiny-8B",
        aux_layer_ids=AUX_IDS,
        vocab_size=VOCAB,
    )
    assert convert(options).converted == len(LENGTHS)
    return tmp_path / "store"


def entry_of(store: Path, number: int):
    (entry,) = [entry for entry in Store(store).entries if entry.id.endswith(f"data_{number}")]
    return entry


def flip(path: Path, name: str, row: int) -> None:
    """Flip one bit in the middle of the chunk that holds ``row`` of the dataset's last layer."""
    with h5py.File(path, "r", locking=False) as file:
        dataset = file[name]
        chunks = [dataset.id.get_chunk_info(number) for number in range(dataset.id.get_num_chunks())]
        (chunk,) = [c for c in chunks if c.chunk_offset == (row // 64 * 64, dataset.shape[1] - 64)]
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset + chunk.size // 2] ^= 1
    path.write_bytes(content)


def test_the_summary_of_a_store_shows_counts_target_and_datasets(store: Path, run) -> None:
    code, text = run(store)
    trained = sum(sum(1 for row in range(length) if row % 16 >= 8) for length in LENGTHS)
    assert code == 0
    for words in (
        "samples │ 6",
        f"{sum(LENGTHS):,}",
        f"{trained:,}, {trained / sum(LENGTHS):.1%}",
        "tiny-8B",
        "1, 3, 4",
        "64, bfloat16",
    ):
        assert words in text, words
    for name in ("input_ids", "loss_mask", "aux_hidden_state", "hidden_state"):
        assert name in text


def test_compression_is_measured_from_the_files(store: Path) -> None:
    summary = summarize(store)
    assert summary.sized_files == len(LENGTHS)
    assert summary.sizes["hidden_state"].raw_bytes == sum(LENGTHS) * 64 * 2
    assert summary.sizes["aux_hidden_state"].raw_bytes == 3 * summary.sizes["hidden_state"].raw_bytes
    assert 0.15 < summary.sizes["aux_hidden_state"].saved < 0.4
    assert sum(size.stored_bytes for size in summary.sizes.values()) < summary.stored_bytes


def test_one_file_is_summarized_too(store: Path, run) -> None:
    code, text = run(store / entry_of(store, 3).path)
    assert code == 0 and "1,000" in text and "tiny-8B" in text


@pytest.mark.parametrize(
    "lengths", [[1], [5, 5], [1, 2, 3, 1000], [2048] * 9, list(range(1, 5000, 7)), [131072, 20]]
)
def test_the_histogram_counts_every_sample_once(lengths: list[int]) -> None:
    bins = histogram(np.array(lengths))
    assert sum(count for *_, count in bins) == len(lengths)
    assert bins[0][0] <= min(lengths) and max(lengths) <= bins[-1][1] and len(bins) <= 24
    assert all(low < high for low, high, _ in bins)


def test_the_histogram_is_drawn_as_text_and_as_a_picture(store: Path, run, tmp_path: Path) -> None:
    code, text = run(store, "--plot", tmp_path / "lengths.png")
    assert code == 0 and "lengths" in text and "####" in text
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_an_output_that_cannot_be_written_is_refused_before_the_store_is_read(
    store: Path, tmp_path: Path, run
) -> None:
    (tmp_path / "file").touch()
    for option, path in (("--plot", tmp_path / "file" / "lengths.png"), ("--export-ckpt", tmp_path / "file")):
        code, text = run(store, option, path)
        assert code == 1 and text.startswith(
            f"error: {option} {path}: {tmp_path / 'file'} is a file, where a folder was expected"
        )


def test_an_intact_store_passes_verify(store: Path, run) -> None:
    code, text = run(store, "--verify")
    assert code == 0 and "6 files verified, 0 damaged" in text


@pytest.mark.parametrize(
    ("name", "row", "rows"), [("aux_hidden_state", 700, "640 to 704"), ("hidden_state", 0, "0 to 64")]
)
def test_verify_names_the_damaged_file_and_rows_and_continues(
    store: Path, run, name: str, row: int, rows: str
) -> None:
    path = store / entry_of(store, 3).path
    flip(path, name, row)
    code, text = run(store, "--verify")
    assert code == 3 and "6 files verified, 1 damaged" in text
    assert f"damaged: {path}: {name} rows {rows}" in text
    code, text = run(path, "--verify")
    assert code == 3 and f"{name} rows {rows}" in text


def test_verify_finds_missing_truncated_and_exchanged_files(store: Path, run) -> None:
    first, second, third = (store / entry_of(store, number).path for number in (0, 1, 2))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-100])
    third.write_bytes((store / entry_of(store, 3).path).read_bytes())
    code, text = run(store, "--verify")
    assert code == 3 and "6 files verified, 3 damaged" in text
    assert all(str(path) in text for path in (first, second, third))


def test_missing_and_truncated_files_are_named_without_verify_too(store: Path, run) -> None:
    paths = [store / entry_of(store, number).path for number in (3, 5)]
    paths[0].unlink()
    paths[1].write_bytes(paths[1].read_bytes()[:-100])
    code, text = run(store)
    assert (
        code == 3 and f"damaged: {paths[0]}: the file is missing" in text and f"damaged: {paths[1]}: " in text
    )
    assert "over 4 files" in text


def test_an_export_to_a_full_disk_is_a_one_line_error_and_leaves_no_partial_file(
    store: Path, run, tmp_path: Path
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (300_000, limits[1])
    )  # the sample of 1000 tokens needs half a megabyte
    try:
        code, text = run(store, "--export-ckpt", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1 and "cannot be written" in text and "Traceback" not in text
    assert [path.name for path in sorted((tmp_path / "out").rglob("*.*"))] == [
        "data_0.ckpt",
        "data_1.ckpt",
        "data_2.ckpt",
    ]


def test_a_damaged_small_dataset_is_found(store: Path, run) -> None:
    path = store / entry_of(store, 3).path
    with h5py.File(path, "r", locking=False) as file:
        chunk = file["loss_mask"].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset + chunk.size // 2] ^= 1
    path.write_bytes(content)
    code, text = run(store, "--verify")
    assert code == 3 and str(path) in text
    code, text = run(path)
    assert code == 3 and "damaged" in text


def test_a_file_without_a_manifest_line_is_pointed_out(store: Path, run) -> None:
    orphan = store / entry_of(store, 0).path.replace(".h5", "0.h5")
    orphan.write_bytes((store / entry_of(store, 0).path).read_bytes())
    code, text = run(store, "--verify")
    assert code == 0 and f"{orphan} is not in the manifest" in text


def test_exported_checkpoints_come_back_bit_for_bit(store: Path, run, tmp_path: Path) -> None:
    code, text = run(store, "--export-ckpt", tmp_path / "out")
    assert code == 0 and "6 samples written" in text
    for number, item in enumerate(iter_source(tmp_path / "out")):
        raw = torch.load(item.path, weights_only=True)
        made: Features = features(LENGTHS[number], seed=number, hidden=64)
        assert item.id == f"rows_0-5000/data_{number}" and list(raw) == [
            "input_ids",
            "loss_mask",
            "hidden_state",
            "aux_hidden_state",
        ]
        assert torch.equal(raw["input_ids"], made.input_ids) and torch.equal(raw["loss_mask"], made.loss_mask)
        assert torch.equal(raw["hidden_state"], made.last[None]) and torch.equal(
            raw["aux_hidden_state"], made.aux[None]
        )
    again = ConvertOptions(
        tmp_path / "out",
        tmp_path / "again",
        1,
        target_name="tiny-8B",
        aux_layer_ids=AUX_IDS,
        vocab_size=VOCAB,
    )
    assert convert(again).converted == len(LENGTHS)
    assert {e.id: e.trained_spans for e in Store(tmp_path / "again").entries} == {
        e.id: e.trained_spans for e in Store(store).entries
    }


def test_chosen_samples_are_exported_and_unknown_ones_refused(store: Path, run, tmp_path: Path) -> None:
    code, _ = run(
        store, "--export-ckpt", tmp_path / "out", "--ids", "rows_0-5000/data_2", "rows_0-5000/data_4"
    )
    assert code == 0 and [item.path.name for item in iter_source(tmp_path / "out")] == [
        "data_2.ckpt",
        "data_4.ckpt",
    ]
    code, text = run(store, "--export-ckpt", tmp_path / "out", "--ids", "data_2")
    assert code == 1 and "'data_2' is not a sample" in text and "rows_0-5000/data_0" in text


def test_a_killed_process_of_verify_is_a_one_line_error(
    store: Path, run, tool: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> Iterator[None]:
        raise BrokenProcessPool
        yield

    monkeypatch.setattr(tool, "verify", killed)
    code, text = run(store, "--verify")
    assert code == 1 and "use fewer --workers" in text and "Traceback" not in text


def test_a_path_that_is_not_a_store_is_a_one_line_error(tmp_path: Path, run) -> None:
    for path, words in ((tmp_path, "not a hidden-state store"), (tmp_path / "x.h5", "does not exist")):
        code, text = run(path)
        assert code == 1 and words in text and "Traceback" not in text
    (tmp_path / "x.h5").write_text("text")
    code, text = run(tmp_path / "x.h5")
    assert code == 3 and "x.h5" in text
    (tmp_path / "store.json").write_text("{}")
    code, text = run(tmp_path / "store.json")
    assert code == 1 and "store.json is a file of another kind; give a store" in text
