"""Compare file formats of hidden states: size, time to write, and time for one rank to read its rows.

All formats hold the same realistic sample (``synthetic_data.capture_states``) and are measured in one run.
"""

from __future__ import annotations

import gzip
import io
import logging
import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import h5py
import torch

from eagle_ds.bench.synthetic_data import States, make_sample
from eagle_ds.store.chunks import RowRange
from eagle_ds.store.format import CHUNK_ROWS, WIDE_NAMES, Sample, raw_view, storage_type
from eagle_ds.store.manifest import StoreInfo
from eagle_ds.store.reader import SampleReader, read_rows_h5py
from eagle_ds.store.store import Store, StoreWriter

GZIP_LEVEL = 6

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankRows:
    """The rows that one rank reads.

    Of the aux states its context rows; of the last hidden states also the T rows after them, which TTT steps
    read.
    """

    aux_hidden_state: RowRange
    hidden_state: RowRange

    @staticmethod
    def of(rank: int, ranks: int, num_tokens: int, ttt_steps: int = 7) -> RankRows:
        """Return the contiguous rows of ``rank``, an equal share that begins at a multiple of 64."""
        starts = [num_tokens * n // ranks // CHUNK_ROWS * CHUNK_ROWS for n in range(ranks)]
        start, stop = [*starts, num_tokens][rank : rank + 2]
        return RankRows((start, stop), (start, min(num_tokens, stop + ttt_steps)))

    def ranges(self) -> Iterator[tuple[str, RowRange]]:
        """Yield each dataset's name and its rows."""
        for name in WIDE_NAMES:
            yield name, getattr(self, name)


@dataclass
class RankRead:
    """Rows that were read, the bytes of the file that were read, and the bytes that were decompressed."""

    rows: dict[str, torch.Tensor]
    bytes_read: int
    bytes_inflated: int


class Format(ABC):
    """One file format."""

    name: str
    title: str

    @abstractmethod
    def write(self, sample: Sample, folder: Path, info: StoreInfo) -> Path:
        """Write the sample durably; return the file."""

    @abstractmethod
    def read(self, path: Path, rows: RankRows) -> RankRead:
        """Read one rank's rows into new tensors."""


class GzipTorch(Format):
    """SpecForge's compressed files: ``torch.save`` through gzip. Any read decompresses the whole file."""

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
    """SpecForge's plain files: ``torch.save``, read through a memory map."""

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
    """HDF5's own filters, as h5py offers them: the same chunks with shuffle and gzip -6."""

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
    """Our store, written and read by our code."""

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
    """Our store, read by h5py without our code."""

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
    """Sync the file at the end, so that every format is timed until its data are on the disk."""
    yield
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Cost:
    """Wall time and processor time (of all threads) of one operation."""

    wall_s: float
    cpu_s: float


@dataclass(frozen=True)
class Measurement:
    """Measurements of one format at one length.

    Each rank reads several times and its best time counts; the figures are the mean over ranks.
    """

    name: str
    title: str
    num_tokens: int
    ranks: int
    raw_bytes: int  # hidden states as they are in memory
    file_bytes: int
    write: Cost
    read_warm: Cost  # from the page cache: the cost of decoding
    read_cold: Cost  # from the disk
    rank_bytes: int  # that one rank needs (mean)
    rank_bytes_read: int
    rank_bytes_inflated: int

    @property
    def saved(self) -> float:
        return 1 - self.file_bytes / self.raw_bytes

    @property
    def amplification(self) -> float:
        return self.rank_bytes_inflated / self.rank_bytes


@dataclass(frozen=True)
class Goal:
    """A promise about a figure, and the measured value."""

    text: str
    value: float
    limit: float
    at_least: bool = True

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit


def measure_all(
    states: States, info: StoreInfo, num_tokens: int, ranks: int, threads: int, tries: int, folder: Path
) -> Iterator[Measurement]:
    """Measure every format in turn. Only one file and one copy of the sample exist at a time.

    Args:
        states: to repeat along the sample.
        info: of the store.
        num_tokens: length of the sample.
        ranks: that share the sequence.
        threads: of our encoder and our reader.
        tries: reads from the page cache per rank; the best one counts.
        folder: for the files, on the disk to measure; left empty.
    """
    for kind in (GzipTorch(), MappedTorch(), FilteredHdf5(), OurStoreByH5py(threads), OurStore(threads)):
        logger.info("%d tokens: %s", num_tokens, kind.title)
        place = folder / kind.name
        place.mkdir(parents=True)
        try:
            yield _measure(kind, states, info, num_tokens, ranks, tries, place)
        finally:
            shutil.rmtree(place)


def goals(results: dict[str, Measurement]) -> list[Goal]:
    """Return the promises of the store at this length with the measured values, by format name."""
    peer, ours, plain = results["gzip_torch"], results["store"], results["store_h5py"]
    short = ours.num_tokens < 65_536
    promised = [
        Goal("saved against raw bytes", ours.saved, 0.30),
        Goal("smaller than gzip -6 torch files", 1 - ours.file_bytes / peer.file_bytes, 0.13),
        Goal("written faster per core", peer.write.cpu_s / ours.write.cpu_s, 10),
        Goal("bytes inflated / used", ours.amplification, 1.12 if short else 1.02, at_least=False),
    ]
    if not short:
        promised += [
            Goal("rank's read faster, plain h5py", peer.read_warm.wall_s / plain.read_warm.wall_s, 15),
            Goal("rank's read faster, our reader", peer.read_warm.wall_s / ours.read_warm.wall_s, 50),
            Goal("bytes read / peer's", ours.rank_bytes_read / peer.rank_bytes_read, 1 / 7, at_least=False),
        ]
    return promised


def as_record(measurement: Measurement) -> dict[str, object]:
    """Return the measurement for JSON."""
    return {**asdict(measurement), "saved": measurement.saved, "amplification": measurement.amplification}


def _measure(
    kind: Format, states: States, info: StoreInfo, num_tokens: int, ranks: int, tries: int, folder: Path
) -> Measurement:
    path, raw_bytes, write = _write(kind, make_sample(states, num_tokens), folder, info)
    # Every rank reads a gzipped file whole, so one rank's time holds for all.
    measured_ranks = 1 if isinstance(kind, GzipTorch) else ranks
    shares = [RankRows.of(rank, ranks, num_tokens) for rank in range(measured_ranks)]
    reads = [_read(kind, path, wanted, states, tries) for wanted in shares]
    return Measurement(
        name=kind.name,
        title=kind.title,
        num_tokens=num_tokens,
        ranks=ranks,
        raw_bytes=raw_bytes,
        file_bytes=path.stat().st_size,
        write=write,
        read_warm=_mean([read.warm for read in reads]),
        read_cold=_mean([read.cold for read in reads]),
        rank_bytes=round(mean(read.used for read in reads)),
        rank_bytes_read=round(mean(read.from_file for read in reads)),
        rank_bytes_inflated=round(mean(read.inflated for read in reads)),
    )


def _write(kind: Format, sample: Sample, folder: Path, info: StoreInfo) -> tuple[Path, int, Cost]:
    with _Watch() as watch:
        path = kind.write(sample, folder, info)
    return path, sample.aux_hidden_state.nbytes + sample.hidden_state.nbytes, watch.cost


@dataclass(frozen=True)
class _Reads:
    """Reads of one rank: the first from the disk, then the best of several from the page cache."""

    cold: Cost
    warm: Cost
    used: int
    from_file: int
    inflated: int


def _read(kind: Format, path: Path, wanted: RankRows, states: States, tries: int) -> _Reads:
    forget(path)
    with _Watch() as cold:
        read = kind.read(path, wanted)
    _check(read, wanted, states)
    used = sum(part.nbytes for part in read.rows.values())
    read.rows.clear()
    warm = []
    for _ in range(tries):
        with _Watch() as watch:
            kind.read(path, wanted)
        warm.append(watch.cost)
    return _Reads(
        cold.cost, min(warm, key=lambda cost: cost.wall_s), used, read.bytes_read, read.bytes_inflated
    )


class _Watch:
    """Context manager that measures the cost of its block."""

    def __enter__(self) -> _Watch:
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.cost = Cost(time.perf_counter() - self._wall, time.process_time() - self._cpu)


def _mean(costs: list[Cost]) -> Cost:
    return Cost(mean(cost.wall_s for cost in costs), mean(cost.cpu_s for cost in costs))


def forget(path: Path) -> None:
    """Remove the file from the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _check(read: RankRead, wanted: RankRows, states: States) -> None:
    """Check the rows that were read; a fast reader of wrong rows would be worthless."""
    for (name, (start, stop)), whole in zip(wanted.ranges(), states, strict=True):
        expected = whole[torch.arange(start, stop) % len(whole)]
        assert (
            raw_view(read.rows[name]) == raw_view(expected)
        ).all(), f"{name} rows {start}:{stop} came back wrong"
