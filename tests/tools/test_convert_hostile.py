"""A conversion of odd trees, on full disks, with wrong requests, and with sources that must be kept."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import h5py
import pytest

from eagle_ds.convert import Completer, iter_source
from eagle_ds.convert import run as conversion
from eagle_ds.convert.worker import ConverterProcess, Job, Worker
from eagle_ds.store.store import Store, StoreInfo, StoreWriter
from tests.peer_files import (
    AUX_IDS,
    FLAGS,
    GROUPED_MAP,
    HIDDEN,
    VOCAB,
    features,
    write_grouped_hdf5,
    write_specforge,
)
from tests.tools.test_convert import TOOL, assert_same, rejects, run, stored, tool, words_of

__all__ = ["run", "tool"]  # fixtures


def tree(root: Path, files: int = 4) -> Path:
    """``files`` good samples."""
    for number in range(files):
        write_specforge(root, number, features(50, seed=number))
    return root


def snapshot(root: Path) -> dict[str, tuple[int, int]]:
    """Every file below ``root`` with its size and time of change."""
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in sorted(root.rglob("*"))}


# -- odd trees -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", ["1", "2"])
def test_links_pipes_and_odd_names_do_not_stop_the_conversion(tmp_path: Path, run, workers: str) -> None:
    source = tree(tmp_path / "src") / "rows_0-5000"
    (source / "data_4.ckpt").symlink_to(tmp_path / "gone")
    os.mkfifo(source / "data_5.ckpt")
    (source / "data_6.ckpt.gz").write_bytes(b"")
    one = write_specforge(tmp_path / "src", 7, features(1, seed=7))
    one.rename(os.fsdecode(os.fsencode(source) + b"/caf\xe9.ckpt"))
    assert run(tmp_path / "src", tmp_path / "dst", *FLAGS, "--workers", workers) == 3
    assert rejects(tmp_path / "dst") == {
        "data_4.ckpt": "unreadable", "data_5.ckpt": "unreadable", "data_6.ckpt.gz": "truncated"
    }
    assert len(Store(tmp_path / "dst")) == 5
    assert_same(stored(tmp_path / "dst", "rows_0-5000/caf\\xe9"), features(1, seed=7))
    # Its printable id finds the stored sample again.
    assert run(tmp_path / "src", tmp_path / "dst", *FLAGS, "--workers", workers, "--verify") == 3


def test_an_unexpected_error_rejects_one_file(tmp_path: Path, run, monkeypatch: pytest.MonkeyPatch) -> None:
    complete = Completer.complete

    def fail(self: Completer, sample_id: str, raw):
        if sample_id.endswith("data_2"):
            raise MemoryError("cannot allocate")
        return complete(self, sample_id, raw)

    monkeypatch.setattr(Completer, "complete", fail)
    assert run(tree(tmp_path / "src"), tmp_path / "dst", *FLAGS) == 3
    assert rejects(tmp_path / "dst") == {
        "data_2.ckpt": "conversion failed"
    } and len(Store(tmp_path / "dst")) == 3


def test_a_worker_that_dies_between_two_files_is_replaced(tmp_path: Path) -> None:
    items = list(iter_source(tree(tmp_path / "src")))
    info = StoreInfo("tiny", "", "", HIDDEN, AUX_IDS, VOCAB)
    with StoreWriter(tmp_path / "dst", info, workers=1):
        process = ConverterProcess(Worker(tmp_path / "dst", info, Completer(), False, 1))
        process.begin(Job(items[0]))
        outcomes = [process.outcome()]
        process.begin(Job(items[1]))
        assert process.connection.poll(60)  # it has finished the second file and is idle
        process.child.process.kill()
        process.child.process.join()
        outcomes.append(process.outcome())  # it lies in the pipe and is not lost
        for item in items[2:]:
            process.begin(Job(item))
            outcomes.append(process.outcome())
        process.stop()
    assert [outcome.entry is not None for outcome in outcomes] == [True] * 4


# -- progress, help and start --------------------------------------------------------------------------------


def test_progress_shows_speed_and_remaining_time(tool: ModuleType) -> None:
    half = conversion.Progress(
        done_bytes=500_000_000, total_bytes=2_000_000_000, done_files=3, total_files=12, rejected=1
    )
    assert tool.progress_line(
        half, 10.0
    ) == "3/12 files, 0.50 GB of 2.00 GB, 50 MB/s, ETA 0:00:30, 1 rejected"


def test_help_does_not_import_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported to show the help')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    shown = subprocess.run(
        [sys.executable, str(TOOL), "--help"], capture_output=True, text=True, env=environment, check=True
    )
    assert "exit codes" in shown.stdout


def test_workers_start_from_any_current_folder(tmp_path: Path) -> None:
    """The fork server does not know this project's folder, but must find what it preloads."""
    source = tree(tmp_path / "src")
    command = [sys.executable, str(TOOL), str(source), "dst", *FLAGS, "--workers", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(Store(tmp_path / "dst")) == 4


# -- what a refused run leaves alone -------------------------------------------------------------------------


def test_a_refused_run_changes_nothing_on_disk(tmp_path: Path, run) -> None:
    source = tree(tmp_path / "src")
    assert run(source, tmp_path / "new" / "dst") == 1
    assert not (tmp_path / "new").exists()
    (source / "rows_0-5000" / "data_9.ckpt").write_bytes(b"nonsense")
    assert run(source, tmp_path / "dst", *FLAGS) == 3
    assert rejects(tmp_path / "dst") == {"data_9.ckpt": "unreadable"}
    before = snapshot(tmp_path)
    assert run(source, tmp_path / "dst", "--target-name", "another") == 1
    with StoreWriter(tmp_path / "dst", Store(tmp_path / "dst").info):
        held = snapshot(tmp_path)
        assert run(source, tmp_path / "dst", *FLAGS) == 1  # another writer is at work
        assert snapshot(tmp_path) == held
    assert {path: info for path, info in snapshot(tmp_path).items() if Path(path).is_file()} == {
        path: info for path, info in before.items() if Path(path).is_file()
    }


@pytest.mark.parametrize(("flags", "code"), [(FLAGS, 0), (["--target-name", "another"], 1), ([], 0)])
def test_a_dry_run_over_a_store_checks_the_flags_and_writes_nothing(
    tmp_path: Path, run, flags: list[str], code: int
) -> None:
    source = tree(tmp_path / "src")
    assert run(source, tmp_path / "dst", *FLAGS) == 0
    write_specforge(source, 8, features(50))
    before = snapshot(tmp_path)
    assert run(source, tmp_path / "dst", *flags, "--dry-run") == code
    assert snapshot(tmp_path) == before


def test_files_that_a_store_did_not_write_are_never_deleted(
    tmp_path: Path, run, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tree(tmp_path / "src")
    mine = tmp_path / "home" / "writing" / "thesis.h5"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"ten years")
    assert run(source, tmp_path / "home", *FLAGS) == 1
    assert mine.read_bytes() == b"ten years" and "would be deleted" in words_of(capsys)
    assert run(source, tmp_path / "dst", *FLAGS) == 0
    tree(tmp_path / "dst" / "writing")
    before = snapshot(tmp_path / "dst")
    assert run(tmp_path / "dst" / "writing", tmp_path / "dst", *FLAGS) == 1
    assert snapshot(tmp_path / "dst") == before and "keeps its own files" in words_of(capsys)


# -- the machine fails ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_disk_that_fills_up_stops_with_one_sentence_and_the_next_run_continues(
    tmp_path: Path, run, workers: str
) -> None:
    """A file-size limit of 200 KB, too small for half of the samples, takes the error path of a full disk."""
    for number in range(6):
        write_specforge(
            tmp_path / "src", number, features(50 if number < 3 else 1500, seed=number, hidden=64)
        )
    flags = [*FLAGS, "--workers", workers]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))

    command = [
        sys.executable, str(TOOL), str(tmp_path / "src"), str(tmp_path / "dst"), *flags, "--delete-source"
    ]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 6, done.stderr
    assert "stopped: " in done.stderr and "File too large" in done.stderr and "Traceback" not in done.stderr
    store = Store(tmp_path / "dst")
    left = {item.id for item in iter_source(tmp_path / "src")}
    assert left == {
        f"rows_0-5000/data_{number}" for number in range(6)
    } - {entry.id for entry in store.entries}
    # With two workers a small sample may not be recorded yet when a large one fails.
    assert 3 - (workers == "2") <= len(store) <= 3
    assert run(tmp_path / "src", tmp_path / "dst", *flags) == 0
    assert_same(stored(tmp_path / "dst", "rows_0-5000/data_5"), features(1500, seed=5, hidden=64))
    assert not list((tmp_path / "dst" / "writing").iterdir())


def test_a_destination_that_cannot_be_written_gives_one_sentence(
    tmp_path: Path, run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tree(tmp_path / "src")
    (tmp_path / "file").write_text("no folder")
    assert run(source, tmp_path / "file" / "dst", *FLAGS) == 6
    assert "stopped: DST" in (
        said := words_of(capsys)
    ) and "is a file, where a folder was expected" in said and "kept" not in said

    def read_only(*_: object, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    for broken in ("mkdir", "_append"):
        with monkeypatch.context() as patch:
            patch.setattr(Path if broken == "mkdir" else StoreWriter, broken, read_only)
            assert run(source, tmp_path / "dst", *FLAGS) == 6
        assert "Read-only file system" in words_of(capsys)
    assert run(source, tmp_path / "dst", *FLAGS) == 0 and len(Store(tmp_path / "dst")) == 4


# -- sources that must be kept -------------------------------------------------------------------------------


def test_a_file_with_a_sample_of_a_duplicate_id_is_kept(tmp_path: Path, run) -> None:
    """Both files have a group s0 with different samples: the second one is stored nowhere."""
    source = tmp_path / "src"
    source.mkdir()
    write_grouped_hdf5(source / "dump.h5", [features(9)])
    write_grouped_hdf5(source / "dump.hdf5", [features(7, seed=1), features(11, seed=2)])
    assert run(source, tmp_path / "dst", *FLAGS, "--map", GROUPED_MAP, "--delete-source") == 3
    assert [path.name for path in source.iterdir()] == ["dump.hdf5"]
    assert rejects(tmp_path / "dst") == {"s0": "duplicate id"}
    with h5py.File(source / "dump.hdf5") as file:
        assert len(file["data/s0/tokens"]) == 7


def test_links_changed_files_and_undeletable_ones_are_kept(
    tmp_path: Path, run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tree(tmp_path / "src") / "rows_0-5000"
    (source / "data_4.ckpt").symlink_to(write_specforge(tmp_path / "far", 0, features(50, seed=4)))
    record, unlink = conversion._record_outcome, Path.unlink

    def touch_then_record(outcome, *rest: object) -> None:
        if outcome.job.item.id.endswith("data_1"):
            write_specforge(tmp_path / "src", 1, features(60, seed=9))
        record(outcome, *rest)

    def unlink_most(path: Path, missing_ok: bool = False) -> None:
        if path.name == "data_2.ckpt":
            raise PermissionError(errno.EPERM, "Operation not permitted")
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "_record_outcome", touch_then_record)
        patch.setattr(Path, "unlink", unlink_most)
        assert run(tmp_path / "src", tmp_path / "dst", *FLAGS, "--delete-source") == 0
    assert {path.name for path in source.iterdir()} == {"data_1.ckpt", "data_2.ckpt", "data_4.ckpt"}
    assert (source / "data_4.ckpt").resolve().exists() and len(Store(tmp_path / "dst")) == 5
    assert "source files deleted │ 2" in " ".join(capsys.readouterr().out.split())
