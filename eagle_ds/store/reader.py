"""Read row ranges of one sample: only the chunks that hold them, each read and inflated once, in threads.

Opening a file lets HDF5 check its header and list where every chunk lies; from then on chunks are positional reads of
neighbours in one go, inflated and unshuffled straight into the destination, without HDF5's global lock. `read_rows_h5py`
gives the same rows by plain h5py: the reference in tests, and the path taken for a file that somebody rewrote
with another filter pipeline.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import h5py
import numpy as np
import torch

from eagle_ds.store.chunks import ChunkIndex, ChunkJob, RowRange, chunk_index, chunk_jobs
from eagle_ds.store.codec import DamagedChunk, inflate, merge_planes
from eagle_ds.store.format import (
    SMALL_DTYPES,
    TORCH_DTYPES,
    WIDE_NAMES,
    Header,
    check_datasets,
    open_datasets,
    raw_view,
    read_header,
    read_small,
    torch_dtype,
    unsigned,
)
from eagle_ds.store.manifest import SampleEntry, StoreError, StoreInfo, trained_spans

Result = TypeVar("Result")


@dataclass
class ReadStats:
    """What reading cost: bytes from the file, bytes after inflating, bytes that were asked for."""

    bytes_read: int = 0
    bytes_inflated: int = 0
    bytes_used: int = 0

    def __add__(self, other: ReadStats) -> ReadStats:
        return ReadStats(
            self.bytes_read + other.bytes_read,
            self.bytes_inflated + other.bytes_inflated,
            self.bytes_used + other.bytes_used,
        )

    @property
    def amplification(self) -> float:
        """Inflated over used: 1.0 is perfect."""
        return self.bytes_inflated / max(1, self.bytes_used)


@dataclass(frozen=True)
class Opened:
    """All that is kept of a file once HDF5 has closed it again."""

    header: Header
    descriptor: int
    small: dict[str, torch.Tensor]
    wide: dict[str, ChunkIndex | None]  # None: not our pipeline, read by h5py


class SampleReader:
    """Rows of one stored sample. Opens at the first read; pickles and forks freely (positional reads share no state).

    Without ``rows`` it reads the small datasets alone, and lists no chunks: 8192 of them in a sample of 128K tokens, each a call
    that holds the interpreter's lock.

    Every failure is a `StoreError` that names the file and, for hidden states, the rows.
    """

    def __init__(
        self, path: Path, entry: SampleEntry | None = None, info: StoreInfo | None = None, *, threads: int = 2, rows: bool = True
    ) -> None:
        self.path = path
        self.entry = entry
        self.info = info
        self.threads = threads
        self.rows = rows
        self.stats = ReadStats()
        self._opened: Opened | None = None

    @property
    def header(self) -> Header:
        return self._open().header

    def read_small(self, name: str) -> torch.Tensor | None:
        """A whole dataset of one number a token, or None where an optional one was not stored."""
        if name not in SMALL_DTYPES:
            raise ValueError(f"{name!r} is not a small dataset; use read_rows or one of {', '.join(SMALL_DTYPES)}")
        return self._open().small.get(name)

    def read_rows(self, name: str, ranges: Sequence[RowRange], out: torch.Tensor | None = None) -> torch.Tensor:
        """Rows of ``ranges`` one after the other, [sum of lengths, width], into ``out`` (pinned, if you like) or a new tensor."""
        assert self.rows, "a reader of small datasets alone"
        opened = self._open()
        if name not in WIDE_NAMES:
            raise ValueError(f"{name!r} is not a hidden-state dataset; use read_small or one of {', '.join(WIDE_NAMES)}")
        out = self._destination(opened.header, name, ranges, out)
        index = opened.wide[name]
        if index is None:
            out.copy_(self._guarded(lambda: read_rows_h5py(self.path, name, ranges)))
            self.stats += ReadStats(out.nbytes, out.nbytes, out.nbytes)
            return out
        batches = chunk_jobs(index, ranges)
        rows = raw_view(out)
        if self.threads == 1 or len(batches) == 1:
            done = [self._read_batch(opened, name, index, batch, rows) for batch in batches]
        else:
            with ThreadPoolExecutor(self.threads) as pool:
                done = list(pool.map(lambda batch: self._read_batch(opened, name, index, batch, rows), batches))
        self.stats += sum(done, ReadStats(bytes_used=out.nbytes))
        return out

    def close(self) -> None:
        if self._opened is not None:
            os.close(self._opened.descriptor)
            self._opened = None

    def __enter__(self) -> SampleReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_opened": None}

    def _open(self) -> Opened:
        if self._opened is None:
            self._opened = self._guarded(self._open_checked)
        return self._opened

    def _guarded(self, action: Callable[[], Result]) -> Result:
        """Run ``action``; whatever HDF5 or the system says comes out as one StoreError with the file's name."""
        try:
            return action()
        except StoreError as error:
            raise StoreError(f"{self.path}: {error}") from error
        except (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise StoreError(f"{self.path}: it cannot be read ({error}); write this sample again") from error

    def _open_checked(self) -> Opened:
        if not self.path.exists():
            raise StoreError("the file is missing; write this sample again")
        if self.entry is not None and (size := self.path.stat().st_size) != self.entry.bytes:
            raise StoreError(f"{size} bytes long, the manifest says {self.entry.bytes}; the file was cut or replaced")
        with h5py.File(self.path, "r", locking=False) as file:
            header = read_header(file)
            datasets = open_datasets(file)
            check_datasets(datasets, header)
            wide = {name: chunk_index(datasets, name, header) for name in WIDE_NAMES if self.rows}
            small = {name: torch.from_numpy(read_small(datasets[name])) for name in SMALL_DTYPES if name in datasets}
            stored_bytes = sum(datasets[name].id.get_storage_size() for name in small)
        self._check_identity(header, small["loss_mask"])
        used = sum(tensor.nbytes for tensor in small.values())
        self.stats += ReadStats(stored_bytes, used, used)
        return Opened(header, os.open(self.path, os.O_RDONLY), small, wide)

    def _check_identity(self, header: Header, loss_mask: torch.Tensor) -> None:
        """The file must be the one that the manifest and ``store.json`` speak of."""
        if (entry := self.entry) is not None:
            if (header.id, header.num_tokens) != (entry.id, entry.num_tokens):
                raise StoreError(f"holds {header.id!r} of {header.num_tokens} tokens, expected {entry.id!r} of {entry.num_tokens}")
            if trained_spans(loss_mask.numpy()) != entry.trained_spans:
                raise StoreError("its loss_mask is not the one in the manifest")
        for name in ("target", "target_hash", "tokenizer_hash", "hidden_size", "aux_layer_ids", "dtype"):
            if self.info is not None and getattr(header, name) != getattr(self.info, name):
                raise StoreError(f"{name} is {getattr(header, name)!r}, the store's is {getattr(self.info, name)!r}")

    def _destination(self, header: Header, name: str, ranges: Sequence[RowRange], out: torch.Tensor | None) -> torch.Tensor:
        for start, stop in ranges:
            if not 0 <= start <= stop <= header.num_tokens:
                raise ValueError(f"{self.path}: rows {start}:{stop} of {name} are outside 0:{header.num_tokens}")
        width = header.hidden_size * (len(header.aux_layer_ids) if name == "aux_hidden_state" else 1)
        shape = (sum(stop - start for start, stop in ranges), width)
        dtype = TORCH_DTYPES[header.dtype]
        if out is None:
            return _fresh(shape, dtype)
        if tuple(out.shape) != shape or out.dtype != dtype or out.device.type != "cpu":
            raise ValueError(f"out is {out.dtype} {list(out.shape)} on {out.device}, expected {dtype} {list(shape)} on the CPU")
        return out

    def _read_batch(self, opened: Opened, name: str, index: ChunkIndex, batch: list[ChunkJob], out: np.ndarray) -> ReadStats:
        """Read neighbours in one go, then inflate each and put its rows in place."""
        width = opened.header.hidden_size
        chunk_bytes = index.chunk_rows * width * out.itemsize
        begin = batch[0].offset
        block = memoryview(self._guarded(lambda: os.pread(opened.descriptor, batch[-1].end - begin, begin)))
        for job in batch:
            try:
                data = inflate(block[job.offset - begin : job.end - begin], chunk_bytes, job.crc32)
            except DamagedChunk as error:
                first = job.chunk * index.chunk_rows
                last = min(first + index.chunk_rows, opened.header.num_tokens)
                raise StoreError(f"{self.path}: {name} rows {first}:{last}, layer {job.layer}: {error}; write this sample again") from error
            planes = data.reshape(out.itemsize, index.chunk_rows, width)
            columns = slice(job.layer * width, (job.layer + 1) * width)
            for piece in job.pieces:
                rows = slice(piece.out_row, piece.out_row + piece.stop - piece.start)
                merge_planes(planes[:, piece.start : piece.stop], out[rows, columns])
        return ReadStats(bytes_read=len(block), bytes_inflated=chunk_bytes * len(batch))


def read_rows_h5py(path: str | Path, name: str, ranges: Sequence[RowRange]) -> torch.Tensor:
    """Rows by plain h5py with the file's own type as memory type, so that HDF5 converts nothing; needs no header."""
    with h5py.File(path, "r", locking=False) as file:
        dataset = file[name]
        kind = dataset.id.get_type()
        out = _fresh((sum(stop - start for start, stop in ranges), dataset.shape[1]), torch_dtype(kind))
        rows, done = raw_view(out), 0
        for start, stop in ranges:
            if stop > start:
                space = dataset.id.get_space()
                space.select_hyperslab((start, 0), (stop - start, dataset.shape[1]))
                part = rows[done : done + stop - start]
                dataset.id.read(h5py.h5s.create_simple(part.shape), space, part, kind)
                done += stop - start
    return out


def _fresh(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Uninitialised rows. numpy asks the kernel for huge pages, torch does not: first touch costs a third as much."""
    return torch.from_numpy(np.empty(shape, unsigned(dtype.itemsize))).view(dtype)
