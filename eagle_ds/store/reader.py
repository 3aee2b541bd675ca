"""Read row ranges of one sample: only the chunks that hold them, each read and inflated once, in threads.

Opening a file lets HDF5 check the header and list the address of every chunk (store/chunks.py). The file is
then closed for HDF5. Chunks are read with positional reads (pread), adjacent chunks in one call, then
inflated and unshuffled directly into the destination. None of this takes HDF5's global lock, and pread moves
no shared file position, so threads and forked processes can read through the same descriptor.

`read_rows_h5py` reads the same rows with plain h5py. It is the reference in tests, and the path for files
that another program rewrote with a different gzip pipeline.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TypeVar

import h5py
import numpy as np
import torch

from eagle_ds.store import format as fmt
from eagle_ds.store.chunks import ChunkIndex, ChunkRead, RowRange, chunk_index, chunk_reads
from eagle_ds.store.codec import DamagedChunk, inflate, merge_planes
from eagle_ds.store.format import SMALL_DTYPES, TORCH_DTYPES, WIDE_NAMES, Header
from eagle_ds.store.manifest import SampleEntry, StoreError, StoreInfo, trained_spans

Result = TypeVar("Result")


@dataclass
class ReadStats:
    """The cost of reading, in bytes: read from the file, inflated, and requested by the caller."""

    bytes_read: int = 0
    bytes_inflated: int = 0
    bytes_used: int = 0

    def __add__(self, other: ReadStats) -> ReadStats:
        return ReadStats(*map(sum, zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class OpenFile:
    """What a reader keeps of a file after HDF5 has closed it."""

    header: Header
    descriptor: int  # for positional reads
    small: dict[str, torch.Tensor]  # the small datasets, read whole
    wide: dict[str, ChunkIndex | None]  # the hidden-state datasets; None: another pipeline, read by h5py


class SampleReader:
    """Read rows of one stored sample.

    The file is opened at the first read. Readers can be pickled and forked at any time.

    Args:
        path: the HDF5 file.
        entry: if given, the file must agree with this manifest line.
        info: if given, the file must agree with this store.json.
        threads: threads that read and inflate the chunks of one `read_rows`.
        hidden_states: False reads only the small datasets and does not list the chunks. For a sample of 128K
            tokens HDF5 lists 8192 chunks, each by a call that holds Python's global interpreter lock.

    Raises:
        StoreError: for every failure; it names the file and, for hidden states, the rows.
    """

    def __init__(
        self, path: Path, entry: SampleEntry | None = None, info: StoreInfo | None = None, *,
        threads: int = 2, hidden_states: bool = True,
    ) -> None:
        self.path, self.entry, self.info = path, entry, info
        self.threads, self.hidden_states = threads, hidden_states
        self.stats = ReadStats()
        self._opened: OpenFile | None = None

    @property
    def header(self) -> Header:
        """The file's attributes."""
        return self._open().header

    def read_small(self, name: str) -> torch.Tensor | None:
        """Return a whole dataset with one number per token; None if it is optional and was not stored."""
        if name not in SMALL_DTYPES:
            raise ValueError(f"{name!r} is not a small dataset; use read_rows or one of {[*SMALL_DTYPES]}")
        return self._open().small.get(name)

    def read_rows(
        self, name: str, ranges: Sequence[RowRange], out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Read rows of a hidden-state dataset.

        Args:
            name: ``aux_hidden_state`` or ``hidden_state``.
            ranges: [start, stop) row ranges in any order; they may overlap. Their rows follow one another in
                the result.
            out: CPU tensor [sum of lengths, width] to fill, pinned or not; default: a new one.
        """
        assert self.hidden_states, "made with hidden_states=False; it reads small datasets only"
        opened = self._open()
        if name not in WIDE_NAMES:
            raise ValueError(f"{name!r} is not a hidden-state dataset; use read_small or one of {WIDE_NAMES}")
        out = self._destination(opened.header, name, ranges, out)
        index = opened.wide[name]
        if index is None:
            out.copy_(self._as_store_error(lambda: read_rows_h5py(self.path, name, ranges)))
            self.stats += ReadStats(out.nbytes, out.nbytes, out.nbytes)
            return out
        batches, rows = chunk_reads(index, ranges), fmt.raw_view(out)

        def read(batch: list[ChunkRead]) -> ReadStats:
            return self._read_batch(opened, name, index, batch, rows)

        # Each batch fills its own rows, so threads need no lock. pread and inflate release the interpreter
        # lock.
        if self.threads == 1 or len(batches) == 1:
            done = list(map(read, batches))
        else:
            with ThreadPoolExecutor(self.threads) as pool:
                done = list(pool.map(read, batches))
        self.stats += sum(done, ReadStats(bytes_used=out.nbytes))
        return out

    def close(self) -> None:
        """Close the file. A later read opens it again."""
        if self._opened is not None:
            os.close(self._opened.descriptor)
            self._opened = None

    def __enter__(self) -> SampleReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    __del__ = close

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_opened": None}  # a descriptor means nothing in another process

    def _open(self) -> OpenFile:
        if self._opened is None:
            self._opened = self._as_store_error(self._open_checked)
        return self._opened

    def _as_store_error(self, action: Callable[[], Result]) -> Result:
        """Run ``action`` and turn any failure of HDF5 or the system into a StoreError that names the file."""
        try:
            return action()
        except StoreError as error:
            raise StoreError(f"{self.path}: {error}") from error
        except (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise StoreError(f"{self.path}: it cannot be read ({error}); write this sample again") from error

    def _open_checked(self) -> OpenFile:
        if not self.path.exists():
            raise StoreError("the file is missing; write this sample again")
        if self.entry is not None and (size := self.path.stat().st_size) != self.entry.bytes:
            raise StoreError(
                f"{size} bytes long, the manifest says {self.entry.bytes}: the file was truncated or "
                "replaced; write this sample again")
        with h5py.File(self.path, "r", locking=False) as file:
            header = fmt.read_header(file)
            datasets = fmt.open_datasets(file)
            fmt.check_datasets(datasets, header)
            wide = {name: chunk_index(datasets, name, header) for name in WIDE_NAMES if self.hidden_states}
            names = [name for name in SMALL_DTYPES if name in datasets]
            small = {name: torch.from_numpy(fmt.read_small(datasets[name])) for name in names}
            stored_bytes = sum(datasets[name].id.get_storage_size() for name in names)
        self._check_identity(header, small["loss_mask"])
        used = sum(tensor.nbytes for tensor in small.values())
        self.stats += ReadStats(stored_bytes, used, used)
        return OpenFile(header, os.open(self.path, os.O_RDONLY), small, wide)

    def _check_identity(self, header: Header, loss_mask: torch.Tensor) -> None:
        """Check that this is the file that the manifest and store.json describe, not another sample's."""
        fix = "write this sample again"
        if (entry := self.entry) is not None:
            found, expected = (f"{x.id!r} of {x.num_tokens} tokens" for x in (header, entry))
            if found != expected:
                raise StoreError(f"holds {found}, expected {expected}; {fix}")
            if trained_spans(loss_mask.numpy()) != entry.trained_spans:
                raise StoreError(f"its loss_mask is not the one in the manifest; {fix}")
        if self.info is None:
            return
        for name in ("target", "target_hash", "tokenizer_hash", "hidden_size", "aux_layer_ids", "dtype"):
            ours, theirs = getattr(header, name), getattr(self.info, name)
            if ours != theirs:
                raise StoreError(f"{name} is {ours!r}, the store's is {theirs!r}; {fix}")

    def _destination(
        self, header: Header, name: str, ranges: Sequence[RowRange], out: torch.Tensor | None
    ) -> torch.Tensor:
        """Check the ranges, and check or create the destination."""
        for start, stop in ranges:
            if not 0 <= start <= stop <= header.num_tokens:
                where = f"{self.path}: rows {start}:{stop} of {name}"
                raise ValueError(f"{where} are outside 0:{header.num_tokens}")
        width = header.hidden_size * (len(header.aux_layer_ids) if name == "aux_hidden_state" else 1)
        shape = (sum(stop - start for start, stop in ranges), width)
        dtype = TORCH_DTYPES[header.dtype]
        if out is None:
            return _empty(shape, dtype)
        if tuple(out.shape) != shape or out.dtype != dtype or out.device.type != "cpu":
            found = f"{out.dtype} {list(out.shape)} on {out.device}"
            raise ValueError(f"out is {found}, expected {dtype} {list(shape)} on the CPU")
        return out

    def _read_batch(
        self, opened: OpenFile, name: str, index: ChunkIndex, batch: list[ChunkRead], out: np.ndarray
    ) -> ReadStats:
        """Read adjacent chunks with one system call, then inflate each and copy its rows into ``out``."""
        width = opened.header.hidden_size
        chunk_bytes = index.chunk_rows * width * out.itemsize
        begin, end = batch[0].offset, batch[-1].end
        block = memoryview(self._as_store_error(lambda: os.pread(opened.descriptor, end - begin, begin)))
        for chunk in batch:
            try:
                data = inflate(block[chunk.offset - begin : chunk.end - begin], chunk_bytes, chunk.crc32)
            except DamagedChunk as error:
                first = chunk.chunk * index.chunk_rows
                last = min(first + index.chunk_rows, opened.header.num_tokens)
                where = f"{self.path}: {name} rows {first}:{last}, layer {chunk.layer}"
                raise StoreError(f"{where}: {error}; write this sample again") from error
            # A chunk holds one layer: its rows fill that layer's columns of the destination.
            planes = data.reshape(out.itemsize, index.chunk_rows, width)
            columns = slice(chunk.layer * width, (chunk.layer + 1) * width)
            for copy in chunk.copies:
                rows = slice(copy.out_row, copy.out_row + copy.stop - copy.start)
                merge_planes(planes[:, copy.start : copy.stop], out[rows, columns])
        return ReadStats(bytes_read=len(block), bytes_inflated=chunk_bytes * len(batch))


def read_rows_h5py(path: str | Path, name: str, ranges: Sequence[RowRange]) -> torch.Tensor:
    """Read rows with plain h5py. The file needs no header.

    The file's own type is given as the memory type. Otherwise HDF5 would convert bfloat16 in software, at 23
    MB/s.
    """
    with h5py.File(path, "r", locking=False) as file:
        dataset = file[name]
        kind = dataset.id.get_type()
        out = _empty((sum(stop - start for start, stop in ranges), dataset.shape[1]), fmt.torch_dtype(kind))
        rows, done = fmt.raw_view(out), 0
        for start, stop in ranges:
            if stop > start:
                space = dataset.id.get_space()
                space.select_hyperslab((start, 0), (stop - start, dataset.shape[1]))
                part = rows[done : done + stop - start]
                dataset.id.read(h5py.h5s.create_simple(part.shape), space, part, kind)
                done += stop - start
    return out


def _empty(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Allocate rows, uninitialised, through numpy: it asks the kernel for huge pages, which torch does not.

    The first write to the memory then costs a third as much.
    """
    return torch.from_numpy(np.empty(shape, f"u{dtype.itemsize}")).view(dtype)
