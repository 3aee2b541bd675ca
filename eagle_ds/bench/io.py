"""Size, write time and one rank's read time of each format, over the same realistic sample, in one run."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import torch

from eagle_ds.bench.formats import FilteredHdf5, Format, GzipTorch, MappedTorch, OurStore, OurStoreByH5py, RankRead, RankRows
from eagle_ds.bench.states import States, make_sample
from eagle_ds.store.format import Sample, raw_view
from eagle_ds.store.manifest import StoreInfo

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cost:
    """Of doing something once. Processor time counts all threads."""

    wall_s: float
    cpu_s: float


@dataclass(frozen=True)
class Measurement:
    """One format at one length. Reads are the mean over the ranks of the best of several tries each."""

    name: str
    title: str
    num_tokens: int
    ranks: int
    raw_bytes: int  # hidden states as they are in memory
    file_bytes: int
    write: Cost
    read_warm: Cost  # the file is in the page cache: what decoding costs
    read_cold: Cost  # the file comes from the disk
    rank_bytes: int  # used by one rank (mean)
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
    """A promise about a ratio, and what came out."""

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
    """Every format in turn; only one file and one copy of the sample exist at a time."""
    for kind in (GzipTorch(), MappedTorch(), FilteredHdf5(), OurStoreByH5py(threads), OurStore(threads)):
        logger.info("%d tokens: %s", num_tokens, kind.title)
        place = folder / kind.name
        place.mkdir(parents=True)
        try:
            yield _measure(kind, states, info, num_tokens, ranks, tries, place)
        finally:
            shutil.rmtree(place)


def goals(results: dict[str, Measurement]) -> list[Goal]:
    """What the store promises at this length, from measurements by format name."""
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
    """For JSON."""
    return {**asdict(measurement), "saved": measurement.saved, "amplification": measurement.amplification}


def _measure(kind: Format, states: States, info: StoreInfo, num_tokens: int, ranks: int, tries: int, folder: Path) -> Measurement:
    path, raw_bytes, write = _write(kind, make_sample(states, num_tokens), folder, info)
    whole = isinstance(kind, GzipTorch)  # reads the same whoever asks: one rank stands for all
    plans = [RankRows.of(rank, ranks, num_tokens) for rank in range(1 if whole else ranks)]
    reads = [_read(kind, path, wanted, states, tries) for wanted in plans]
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
    """One rank's reads: the first from the disk, the best of the others from the page cache."""

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
    return _Reads(cold.cost, min(warm, key=lambda cost: cost.wall_s), used, read.bytes_read, read.bytes_inflated)


class _Watch:
    """Times a block."""

    def __enter__(self) -> _Watch:
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.cost = Cost(time.perf_counter() - self._wall, time.process_time() - self._cpu)


def _mean(costs: list[Cost]) -> Cost:
    return Cost(mean(cost.wall_s for cost in costs), mean(cost.cpu_s for cost in costs))


def forget(path: Path) -> None:
    """Drop the file from the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _check(read: RankRead, wanted: RankRows, states: States) -> None:
    """A benchmark of wrong rows is worth nothing."""
    for (name, (start, stop)), whole in zip(wanted.ranges(), states, strict=True):
        expected = whole[torch.arange(start, stop) % len(whole)]
        assert (raw_view(read.rows[name]) == raw_view(expected)).all(), f"{name} rows {start}:{stop} came back wrong"
