"""What is in a store, or in one file of it: counts, lengths, compression, soundness; and the way back to a peer's files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import torch

from eagle_ds.store.format import SMALL_DTYPES, WIDE_NAMES, Header
from eagle_ds.store.manifest import STORE_JSON, SampleEntry, StoreError, StoreInfo
from eagle_ds.store.processes import fork_server
from eagle_ds.store.reader import SampleReader
from eagle_ds.store.store import Damage, Store, verify_file

SIZED_FILES = 200  # files opened to learn the compression of each dataset
HISTOGRAM_BINS = 12
GROUP_SIZE = 5000  # samples a folder, as the peer has it


@dataclass
class DatasetSize:
    """A dataset's bytes in memory and on disk, over the files that were opened."""

    raw_bytes: int = 0
    stored_bytes: int = 0

    @property
    def saved(self) -> float:
        return 1 - self.stored_bytes / self.raw_bytes if self.raw_bytes else 0.0


@dataclass
class Report:
    """A store or a file at a glance."""

    path: Path
    info: StoreInfo | None  # None for a lone file
    header: Header | None  # of the lone file, or of the store's first sound one
    lengths: np.ndarray  # int64 [samples], tokens
    trained: np.ndarray  # int64 [samples], trained tokens
    stored_bytes: int
    sizes: dict[str, DatasetSize] = field(default_factory=dict)
    sized_files: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def trained_fraction(self) -> float:
        return float(self.trained.sum() / max(1, self.lengths.sum()))


def inspect(path: str | Path) -> Report:
    """Look at a store folder or at one file. Raises ValueError where there is neither."""
    path = Path(path)
    if path.is_dir():
        if not (path / STORE_JSON).exists():
            raise ValueError(f"{path} is not a hidden-state store: it has no {STORE_JSON}; give a store, or one .h5 file of it")
        return _inspect_store(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist; give a store, or one .h5 file of it")
    return _inspect_file(path)


def _inspect_store(root: Path) -> Report:
    store = Store(root)
    lengths = np.array([entry.num_tokens for entry in store.entries], np.int64)
    trained = np.array([entry.num_trained for entry in store.entries], np.int64)
    report = Report(root, store.info, None, lengths, trained, sum(entry.bytes for entry in store.entries))
    step = max(1, len(store.entries) // SIZED_FILES)
    for entry in store.entries[::step]:
        try:
            with store.reader(entry, threads=1) as reader:
                header = reader.header
            report.header = report.header or header
            _add_sizes(report, root / entry.path)
        except StoreError as error:
            report.problems.append(str(error))
    return report


def _inspect_file(path: Path) -> Report:
    with SampleReader(path) as reader:
        header, mask = reader.header, reader.read_small("loss_mask")
    assert mask is not None
    lengths, trained = np.array([header.num_tokens], np.int64), np.array([int(mask.sum())], np.int64)
    report = Report(path, None, header, lengths, trained, path.stat().st_size)
    _add_sizes(report, path)
    return report


def _add_sizes(report: Report, path: Path) -> None:
    with h5py.File(path, "r", locking=False) as file:
        for name in (*WIDE_NAMES, *SMALL_DTYPES):
            if name in file:
                size = report.sizes.setdefault(name, DatasetSize())
                size.raw_bytes += file[name].size * file[name].id.get_type().get_size()  # nbytes counts bfloat16 as float32
                size.stored_bytes += file[name].id.get_storage_size()
    report.sized_files += 1


def histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """(from, to, count) over bins that double in width, as lengths do; empty ends are left out."""
    if not len(lengths):
        return []
    low = max(0, int(lengths.min()).bit_length() - 1)
    high = int(lengths.max()).bit_length()
    halves = 1 if high - low >= HISTOGRAM_BINS // 2 else 2
    edges = sorted({round(2 ** (low + step / halves)) for step in range((high - low) * halves + 1)})
    counts, _ = np.histogram(lengths, np.array(edges, np.float64))
    return [(edges[i], edges[i + 1], int(count)) for i, count in enumerate(counts)]


def verify(path: str | Path, workers: int = 1) -> Iterator[tuple[Path, list[Damage]]]:
    """(file, its damages) for every file, by processes; an empty list means that every chunk is sound."""
    path = Path(path)
    if not path.is_dir():
        yield path, verify_file(path)
        return
    store = Store(path)
    check = partial(_verify_entry, path, store.info)
    if workers == 1:
        yield from map(check, store.entries)
        return
    with ProcessPoolExecutor(workers, fork_server()) as pool:
        yield from pool.map(check, store.entries, chunksize=4)


def _verify_entry(root: Path, info: StoreInfo, entry: SampleEntry) -> tuple[Path, list[Damage]]:
    return root / entry.path, verify_file(root / entry.path, entry, info)


def unlisted_files(root: str | Path) -> list[Path]:
    """Files that no manifest line speaks of: what a killed writer left, to be written again or deleted."""
    root = Path(root)
    listed = {entry.path for entry in Store(root).entries}
    return [path for path in sorted((root / "samples").glob("*/*.h5")) if path.relative_to(root).as_posix() not in listed]


def export_checkpoints(path: str | Path, out: str | Path, ids: Sequence[str] | None = None) -> Iterator[Path]:
    """Write samples as SpecForge keeps them, ``rows_0-5000/data_0.ckpt`` and on, and hand out each file's path.

    Samples are numbered in the manifest's order. Optional datasets have no place in that format and are left out. Raises
    ValueError for an id that is not in the store.
    """
    path, out = Path(path), Path(out)
    for number, reader in _readers(path, ids):
        start = number // GROUP_SIZE * GROUP_SIZE
        target = out / f"rows_{start}-{start + GROUP_SIZE}" / f"data_{number}.ckpt"
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_suffix(f".{os.getpid()}.tmp")
        try:
            with reader:
                tensors = _peer_dict(reader)
            try:
                torch.save(tensors, temporary)
            except RuntimeError as error:  # torch's words for a full disk
                raise OSError(f"{temporary} cannot be written ({str(error)[:200]}); is the disk full?") from error
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        yield target


def _readers(path: Path, ids: Sequence[str] | None) -> Iterator[tuple[int, SampleReader]]:
    if not path.is_dir():
        yield 0, SampleReader(path)
        return
    store = Store(path)
    known = {entry.id for entry in store.entries}
    if unknown := [name for name in ids or () if name not in known]:
        raise ValueError(f"{unknown[0]!r} is not a sample of {path}; its ids look like {sorted(known)[:3]}")
    for number, entry in enumerate(store.entries):
        if ids is None or entry.id in ids:
            yield number, store.reader(entry)


def _peer_dict(reader: SampleReader) -> dict[str, torch.Tensor]:
    whole = [(0, reader.header.num_tokens)]
    ids, mask = reader.read_small("input_ids"), reader.read_small("loss_mask")
    assert ids is not None and mask is not None
    return {
        "input_ids": ids.to(torch.int64),
        "loss_mask": mask.to(torch.int64),
        "hidden_state": reader.read_rows("hidden_state", whole)[None],
        "aux_hidden_state": reader.read_rows("aux_hidden_state", whole)[None],
    }
