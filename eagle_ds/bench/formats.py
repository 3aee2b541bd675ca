"""Ways of keeping a sample's hidden states in a file, and of reading from it what one rank needs."""

from __future__ import annotations

import gzip
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import h5py
import torch

from eagle_ds.store.chunks import RowRange
from eagle_ds.store.format import CHUNK_ROWS, WIDE_NAMES, Sample, raw_view, storage_type
from eagle_ds.store.manifest import StoreInfo
from eagle_ds.store.reader import SampleReader, read_rows_h5py
from eagle_ds.store.store import Store, StoreWriter

GZIP_LEVEL = 6


@dataclass(frozen=True)
class RankRows:
    """What one rank reads: context rows of the aux states; of the hidden states those and the T rows that steps look ahead to."""

    aux_hidden_state: RowRange
    hidden_state: RowRange

    @staticmethod
    def of(rank: int, ranks: int, num_tokens: int, ttt_steps: int = 7) -> RankRows:
        """An equal share of contiguous rows, cut at multiples of 64."""
        cuts = [num_tokens * n // ranks // CHUNK_ROWS * CHUNK_ROWS for n in range(ranks)] + [num_tokens]
        start, stop = cuts[rank], cuts[rank + 1]
        return RankRows((start, stop), (start, min(num_tokens, stop + ttt_steps)))

    def ranges(self) -> Iterator[tuple[str, RowRange]]:
        """Dataset and its rows."""
        for name in WIDE_NAMES:
            yield name, getattr(self, name)


@dataclass
class RankRead:
    """Rows that were read, and how many bytes of the file and of inflated data that took."""

    rows: dict[str, torch.Tensor]
    bytes_read: int
    bytes_inflated: int


class Format(ABC):
    """One way of keeping a sample."""

    name: str
    title: str

    @abstractmethod
    def write(self, sample: Sample, folder: Path, info: StoreInfo) -> Path:
        """Durably; returns the file."""

    @abstractmethod
    def read(self, path: Path, rows: RankRows) -> RankRead:
        """One rank's rows in tensors of their own."""


class GzipTorch(Format):
    """The peer's compressed files: ``torch.save`` through gzip, and the whole file inflated to read any of it."""

    name, title = "gzip_torch", "torch file, gzip -6, read whole"

    def write(self, sample: Sample, folder: Path, info: StoreInfo) -> Path:
        path = folder / "data_0.ckpt.gz"
        with _synced(path), gzip.open(path, "wb", compresslevel=GZIP_LEVEL) as file:
            torch.save(_as_dict(sample), file)
        return path

    def read(self, path: Path, rows: RankRows) -> RankRead:
        with gzip.open(path, "rb") as file:
            content = file.read()
        data = torch.load(io.BytesIO(content), weights_only=True)
        parts = {name: data[name][0, start:stop].clone() for name, (start, stop) in rows.ranges()}
        return RankRead(parts, path.stat().st_size, len(content))


class MappedTorch(Format):
    """The peer's plain files: ``torch.save``, and a memory map to read from."""

    name, title = "mmap_torch", "torch file, uncompressed, memory map"

    def write(self, sample: Sample, folder: Path, info: StoreInfo) -> Path:
        path = folder / "data_0.ckpt"
        with _synced(path):
            torch.save(_as_dict(sample), path)
        return path

    def read(self, path: Path, rows: RankRows) -> RankRead:
        data = torch.load(path, weights_only=True, mmap=True)
        parts = {name: data[name][0, start:stop].clone() for name, (start, stop) in rows.ranges()}
        used = sum(part.nbytes for part in parts.values())
        return RankRead(parts, used, used)


class FilteredHdf5(Format):
    """What h5py does on its own: the same chunks under HDF5's shuffle and gzip -6."""

    name, title = "hdf5_gzip", "h5py, shuffle + gzip -6"

    def write(self, sample: Sample, folder: Path, info: StoreInfo) -> Path:
        path = folder / "plain.h5"
        with _synced(path), h5py.File(path, "w", libver=("v110", "v110")) as file:
            for name in WIDE_NAMES:
                values = raw_view(getattr(sample, name))
                dataset = file.create_dataset(
                    name,
                    values.shape,
                    h5py.Datatype(storage_type(info.dtype)),
                    chunks=(CHUNK_ROWS, info.hidden_size),
                    shuffle=True,
                    compression="gzip",
                    compression_opts=GZIP_LEVEL,
                )
                dataset.id.write(h5py.h5s.ALL, h5py.h5s.ALL, values, dataset.id.get_type())
        return path

    def read(self, path: Path, rows: RankRows) -> RankRead:
        return _read_by_h5py(path, rows)


class OurStore(Format):
    """Our encoder and our reader."""

    name, title = "store", "our store, our reader"

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def write(self, sample: Sample, folder: Path, info: StoreInfo) -> Path:
        with StoreWriter(folder, info, workers=self.threads) as writer:
            return folder / writer.add(sample).path

    def read(self, path: Path, rows: RankRows) -> RankRead:
        store = Store(path.parents[2])
        with store.reader(store.entries[0], threads=self.threads) as reader:
            return _read_by_us(reader, rows)


class OurStoreByH5py(OurStore):
    """Our files in the hands of somebody who has h5py alone."""

    name, title = "store_h5py", "our store, plain h5py"

    def read(self, path: Path, rows: RankRows) -> RankRead:
        return _read_by_h5py(path, rows)


def _read_by_us(reader: SampleReader, rows: RankRows) -> RankRead:
    reader.read_small("input_ids")
    opened = reader.stats
    parts = {name: reader.read_rows(name, [wanted]) for name, wanted in rows.ranges()}
    return RankRead(parts, reader.stats.bytes_read, reader.stats.bytes_inflated - opened.bytes_inflated)


def _read_by_h5py(path: Path, rows: RankRows) -> RankRead:
    parts = {name: read_rows_h5py(path, name, [wanted]) for name, wanted in rows.ranges()}
    stored = inflated = 0
    with h5py.File(path, locking=False) as file:
        for name, (start, stop) in rows.ranges():
            dataset = file[name]
            for row in range(start - start % CHUNK_ROWS, stop, CHUNK_ROWS):
                for column in range(0, dataset.shape[1], dataset.chunks[1]):
                    stored += dataset.id.get_chunk_info_by_coord((row, column)).size
                    inflated += dataset.chunks[0] * dataset.chunks[1] * dataset.id.get_type().get_size()
    return RankRead(parts, stored, inflated)


def _as_dict(sample: Sample) -> dict[str, torch.Tensor]:
    return {
        "input_ids": sample.input_ids.long(),
        "loss_mask": sample.loss_mask.long(),
        "hidden_state": sample.hidden_state.unsqueeze(0),
        "aux_hidden_state": sample.aux_hidden_state.unsqueeze(0),
    }


@contextmanager
def _synced(path: Path) -> Iterator[None]:
    """Everybody's file is on the disk when writing it counts as done."""
    yield
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
