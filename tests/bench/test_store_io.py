"""In the I/O benchmark every format returns the right rows, and each rank reads its own."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from eagle_ds.bench import conversion
from eagle_ds.bench.plots import io_figure
from eagle_ds.bench.store_io import RankRows, as_record, goals, measure_all
from eagle_ds.bench.synthetic_data import make_sample
from eagle_ds.store.manifest import StoreInfo
from tests.store_cases import write_store

WIDTH, TOKENS = 32, 1024


@pytest.fixture(scope="module")
def states() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(100, 3 * WIDTH, generator=generator).bfloat16(), torch.randn(
        100, WIDTH, generator=generator
    ).bfloat16()


@pytest.mark.parametrize(("num_tokens", "ranks"), [(131_072, 8), (4096, 8), (1000, 3), (64, 8)])
def test_ranks_share_the_rows_and_read_the_target_rows_after_their_own(num_tokens: int, ranks: int) -> None:
    shares = [RankRows.of(rank, ranks, num_tokens) for rank in range(ranks)]
    covered = [row for share in shares for row in range(*share.aux_hidden_state)]
    assert covered == list(range(num_tokens))
    for share in shares:
        assert share.aux_hidden_state[0] % 64 == 0
        assert share.hidden_state == (
            share.aux_hidden_state[0], min(num_tokens, share.aux_hidden_state[1] + 7)
        )


def test_every_second_turn_is_trained(states: tuple[torch.Tensor, torch.Tensor]) -> None:
    mask = make_sample(states, 8192).loss_mask
    assert int(mask.sum()) == 4096
    assert [int(mask[n].item()) for n in (0, 2047, 2048, 4095, 4096)] == [0, 0, 1, 1, 0]


def test_every_format_is_measured_and_returns_the_right_rows(
    states: tuple[torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    info = StoreInfo("t", "h", "k", WIDTH, (0, 1, 2), 40_000)
    results = list(measure_all(states, info, TOKENS, ranks=4, threads=2, tries=1, folder=tmp_path))
    assert [result.name for result in results] == [
        "gzip_torch", "mmap_torch", "hdf5_gzip", "store_h5py", "store"
    ]
    assert not list(tmp_path.iterdir())
    by_name = {result.name: result for result in results}
    assert by_name["gzip_torch"].rank_bytes_read == by_name["gzip_torch"].file_bytes
    assert 0.2 < by_name["store"].rank_bytes_read / by_name["store"].file_bytes < 0.35
    assert by_name["store"].amplification == by_name["store_h5py"].amplification < 1.2
    assert {goal.text for goal in goals(by_name)} >= {"saved against raw bytes", "bytes inflated / used"}
    document = {
        "width": WIDTH, "hardware": "here", "date": "today",
        "measurements": [as_record(result) for result in results]
    }
    assert io_figure(document).startswith(b"\x89PNG")


def test_a_short_sample_stores_only_its_own_rows(states: tuple[torch.Tensor, torch.Tensor]) -> None:
    sample = make_sample(states, 30)
    assert sample.hidden_state.untyped_storage().nbytes() == sample.hidden_state.nbytes


def test_conversion_is_timed_for_whole_folder_trees(
    states: tuple[torch.Tensor, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = StoreInfo("t", "h", "k", WIDTH, (0, 1, 2), 40_000)
    tool, runs = conversion._run, []

    def run(title: str, tree: conversion.Tree, *rest: object) -> float:
        runs.append((title, len(tree.paths), tree.source_bytes))
        return 1.0 + tool(title, tree, *rest) if title.startswith("an almost") else fake_run(tree)

    def fake_run(tree: conversion.Tree) -> float:
        write_store(conversion._store_of(tree), info, make_sample(states, 200))
        return 100.0

    monkeypatch.setattr(conversion, "_run", run)
    found = list(conversion.measure_conversions(states, info, 8, 200, 1, tmp_path))
    assert [(result.files, result.gzipped) for result in found] == [(8, False)] * 3 + [(2, True)]
    assert [count for _, count, _ in runs] == [1, 8, 8, 8, 2]
    for result in found:
        assert result.raw_bytes == result.files * 200 * 4 * WIDTH * 2
        assert result.gzipped or result.raw_bytes < result.source_bytes < 1.3 * result.raw_bytes
        assert result.source_mb_per_s == pytest.approx(
            result.source_bytes / 1e8
        ) and result.sustained_mb_per_s > result.source_mb_per_s
        assert conversion.as_record(result)["sustained_mb_per_s"] == result.sustained_mb_per_s
    # only plain files have promises, and 100 s is far too slow
    assert [goal.met for goal in conversion.goals(found)] == [False, False]
    assert found[0].disk_mb_per_s is None and found[1].disk_mb_per_s == found[2].disk_mb_per_s > 0
    assert not (tmp_path / "copies").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith("_store")] == ["small_store"]


def test_a_slow_disk_changes_the_promise_to_a_share_of_its_speed() -> None:
    made = conversion.Conversion(
        "plain", False, 1, 1_000_000_000, 1, 1, seconds=6.0, start_s=1.0, disk_mb_per_s=240.0
    )
    (goal,) = conversion.goals([made])
    assert goal.met and goal.limit == 0.8 and goal.value == pytest.approx(200 / 240)
    (goal,) = conversion.goals([dataclasses.replace(made, disk_mb_per_s=900.0)])
    assert not goal.met and goal.limit == 250
