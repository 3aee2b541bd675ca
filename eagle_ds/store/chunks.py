"""Find the chunks that hold the requested rows, and their byte ranges in the file.

A hidden-state dataset [S, layers * H] is split into chunks of 64 rows of one layer. HDF5 lists the address of
every chunk once, when a file is opened (`chunk_index`). From then on a read of row ranges is pure arithmetic:
which chunks hold the rows (`chunk_reads`), at which bytes, and where their rows go in the destination.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import h5py
import numpy as np

from eagle_ds.store.format import CHUNK_ROWS, Datasets, Header, check_gzip, crc32_name, read_small
from eagle_ds.store.manifest import StoreError

logger = logging.getLogger(__name__)

RowRange = tuple[int, int]  # [start, stop) of the rows of one sample

SHUFFLE_GZIP = [h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE]
MAX_BATCH_BYTES = 4 << 20  # the most bytes of adjacent chunks that one system call fetches


@dataclass(frozen=True)
class ChunkIndex:
    """Addresses of a dataset's chunks. Arrays have shape [chunks of rows, layers]."""

    offsets: np.ndarray  # int64, first byte in the file
    sizes: np.ndarray  # int64, compressed bytes
    crc32s: np.ndarray | None  # uint32, of the inflated byte planes; None for a file that stores none
    chunk_rows: int


@dataclass(frozen=True)
class RowCopy:
    """Copy rows [start, stop) of a chunk to the destination, from its row ``out_row`` on."""

    start: int
    stop: int
    out_row: int


@dataclass(frozen=True)
class ChunkRead:
    """Read and inflate one chunk, then copy some of its rows."""

    chunk: int  # number of the chunk: its first row is chunk * chunk_rows
    layer: int
    offset: int
    size: int
    crc32: int | None
    copies: list[RowCopy]

    @property
    def end(self) -> int:
        """First byte after the chunk."""
        return self.offset + self.size


def chunk_index(datasets: Datasets, name: str, header: Header) -> ChunkIndex | None:
    """List the chunks of the hidden-state dataset ``name`` and check that each exists and is compressed.

    Returns:
        The index; None if the file uses another gzip pipeline or chunk shape than ours, so h5py must read it.

    Raises:
        StoreError: the dataset, or one of its chunks, is not compressed or was never written.
    """
    dataset = datasets[name]
    pipeline = check_gzip(dataset)
    chunk_rows = min(CHUNK_ROWS, header.num_tokens)
    if pipeline != SHUFFLE_GZIP or dataset.chunks != (chunk_rows, header.hidden_size):
        path = dataset.file.filename
        logger.info("%s: filters %s, chunks %s; h5py reads this file, slower", path, pipeline, dataset.chunks)
        return None
    grid = (-(-header.num_tokens // chunk_rows), dataset.shape[1] // header.hidden_size)
    offsets, sizes = np.zeros(grid, np.int64), np.zeros(grid, np.int64)

    # One pass of chunk_iter lists all chunks. Asking for them one by one takes quadratic time.
    def note(chunk: h5py.h5d.StoreInfo) -> None:
        row, column = chunk.chunk_offset
        if chunk.filter_mask:  # a set bit means: this filter was skipped for this chunk
            where = f"{name} rows from {row}"
            raise StoreError(f"{where}: not compressed, so no checksum protects it; write this sample again")
        at = row // chunk_rows, column // header.hidden_size
        offsets[at], sizes[at] = chunk.byte_offset, chunk.size

    dataset.id.chunk_iter(note)
    if not sizes.all():
        row, layer = np.argwhere(sizes == 0)[0].tolist()
        where = f"{name} rows from {row * chunk_rows}, layer {layer}"
        raise StoreError(f"{where}: never written; write this sample again")
    return ChunkIndex(offsets, sizes, _crc32s(datasets.get(crc32_name(name)), grid), chunk_rows)


def chunk_reads(index: ChunkIndex, ranges: Sequence[RowRange]) -> list[list[ChunkRead]]:
    """Return one read for each chunk that holds rows of ``ranges``, batched where chunks are adjacent."""
    reads = []
    for chunk, copies in _copies_by_chunk(ranges, index.chunk_rows).items():
        for layer in range(index.offsets.shape[1]):
            at = chunk, layer
            crc32 = None if index.crc32s is None else int(index.crc32s[at])
            reads.append(ChunkRead(chunk, layer, int(index.offsets[at]), int(index.sizes[at]), crc32, copies))
    return list(_adjacent(sorted(reads, key=lambda read: read.offset)))


def _crc32s(dataset: h5py.Dataset | None, grid: tuple[int, int]) -> np.ndarray | None:
    if dataset is None:
        return None
    crc32s = read_small(dataset)
    if crc32s.shape != grid:
        shapes = f"{list(crc32s.shape)}, expected {list(grid)}"
        raise StoreError(f"{dataset.name[1:]} has shape {shapes}; write this sample again")
    return crc32s


def _copies_by_chunk(ranges: Sequence[RowRange], chunk_rows: int) -> dict[int, list[RowCopy]]:
    """Split each range at chunk borders and group the parts by chunk number.

    Ranges follow one another in the destination in the order given. They may overlap and need not be sorted,
    so one chunk can have several copies: it is still read once.
    """
    copies: dict[int, list[RowCopy]] = {}
    out_row = 0
    for start, stop in ranges:
        # ``row`` is the first row of each chunk that [start, stop) touches; an empty range touches none.
        for row in range(start - start % chunk_rows, stop if stop > start else 0, chunk_rows):
            copy = RowCopy(max(start - row, 0), min(stop - row, chunk_rows), out_row)
            copies.setdefault(row // chunk_rows, []).append(copy)
            out_row += copy.stop - copy.start
    return copies


def _adjacent(reads: list[ChunkRead]) -> Iterator[list[ChunkRead]]:
    """Group sorted reads into runs without gaps of at most MAX_BATCH_BYTES: one system call each."""
    batch: list[ChunkRead] = []
    for read in reads:
        if batch and (read.offset != batch[-1].end or read.end - batch[0].offset > MAX_BATCH_BYTES):
            yield batch
            batch = []
        batch.append(read)
    if batch:
        yield batch
