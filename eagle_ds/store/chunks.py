"""Which chunks hold the wanted rows, and where they lie in the file."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import h5py
import numpy as np

from eagle_ds.store.format import CHUNK_ROWS, Datasets, Header, crc32_name, filters, read_small
from eagle_ds.store.manifest import StoreError

logger = logging.getLogger(__name__)

RowRange = tuple[int, int]

SHUFFLE_GZIP = [h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE]
MAX_BATCH_BYTES = 4 << 20  # neighbours fetched by one system call


@dataclass(frozen=True)
class ChunkIndex:
    """Where the chunks of a wide dataset lie, by [chunk of rows, layer]."""

    offsets: np.ndarray  # int64
    sizes: np.ndarray  # int64
    crc32s: np.ndarray | None  # uint32, of the inflated planes
    chunk_rows: int


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) of a chunk, which go to the destination from row ``out_row`` on."""

    start: int
    stop: int
    out_row: int


@dataclass(frozen=True)
class ChunkJob:
    """One chunk to read and inflate, and where its rows go."""

    chunk: int
    layer: int
    offset: int
    size: int
    crc32: int | None
    pieces: list[Piece]

    @property
    def end(self) -> int:
        return self.offset + self.size


def chunk_index(datasets: Datasets, name: str, header: Header) -> ChunkIndex | None:
    """Chunk addresses of the wide dataset ``name``, each checked to be there and compressed; None for a gzip pipeline other
    than ours (h5py reads that)."""
    dataset = datasets[name]
    pipeline = filters(dataset)
    chunk_rows = min(CHUNK_ROWS, header.num_tokens)
    if h5py.h5z.FILTER_DEFLATE not in pipeline:
        raise StoreError(f"{name} is not gzip-filtered, so nothing guards its bytes; write this sample again")
    if pipeline != SHUFFLE_GZIP or dataset.chunks != (chunk_rows, header.hidden_size):
        logger.info("%s: filters %s, chunks %s; read by plain h5py", dataset.file.filename, pipeline, dataset.chunks)
        return None
    grid = (-(-header.num_tokens // chunk_rows), dataset.shape[1] // header.hidden_size)
    offsets, sizes = np.zeros(grid, np.int64), np.zeros(grid, np.int64)

    def note(chunk: h5py.h5d.StoreInfo) -> None:
        row, column = chunk.chunk_offset
        if chunk.filter_mask:
            raise StoreError(f"{name} rows from {row}: not compressed, so nothing guards them; write this sample again")
        at = row // chunk_rows, column // header.hidden_size
        offsets[at], sizes[at] = chunk.byte_offset, chunk.size

    dataset.id.chunk_iter(note)
    if not sizes.all():
        row, layer = np.argwhere(sizes == 0)[0].tolist()
        raise StoreError(f"{name} rows from {row * chunk_rows}, layer {layer}: never written; write this sample again")
    return ChunkIndex(offsets, sizes, _crc32s(datasets.get(crc32_name(name)), grid), chunk_rows)


def chunk_jobs(index: ChunkIndex, ranges: Sequence[RowRange]) -> list[list[ChunkJob]]:
    """Each chunk that holds wanted rows, once, in batches that touch one another in the file."""
    jobs = [
        _job(index, chunk, layer, pieces)
        for chunk, pieces in _pieces(ranges, index.chunk_rows).items()
        for layer in range(index.offsets.shape[1])
    ]
    return list(_batches(sorted(jobs, key=lambda job: job.offset)))


def _crc32s(dataset: h5py.Dataset | None, grid: tuple[int, int]) -> np.ndarray | None:
    if dataset is None:
        return None
    crc32s = read_small(dataset)
    if crc32s.shape != grid:
        raise StoreError(f"{dataset.name[1:]} has shape {list(crc32s.shape)}, expected {list(grid)}; write this sample again")
    return crc32s


def _job(index: ChunkIndex, chunk: int, layer: int, pieces: list[Piece]) -> ChunkJob:
    crc32 = None if index.crc32s is None else int(index.crc32s[chunk, layer])
    return ChunkJob(chunk, layer, int(index.offsets[chunk, layer]), int(index.sizes[chunk, layer]), crc32, pieces)


def _pieces(ranges: Sequence[RowRange], chunk_rows: int) -> dict[int, list[Piece]]:
    """By chunk, what is wanted of it; ranges follow one another in the destination, in any order, overlaps included."""
    pieces: dict[int, list[Piece]] = {}
    out_row = 0
    for start, stop in ranges:
        for row in range(start - start % chunk_rows, stop if stop > start else 0, chunk_rows):
            piece = Piece(max(start - row, 0), min(stop - row, chunk_rows), out_row)
            pieces.setdefault(row // chunk_rows, []).append(piece)
            out_row += piece.stop - piece.start
    return pieces


def _batches(jobs: list[ChunkJob]) -> Iterator[list[ChunkJob]]:
    batch: list[ChunkJob] = []
    for job in jobs:
        if batch and (job.offset != batch[-1].end or job.end - batch[0].offset > MAX_BATCH_BYTES):
            yield batch
            batch = []
        batch.append(job)
    if batch:
        yield batch
