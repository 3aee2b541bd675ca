"""Write samples into a store so that a crash, a full disk or a second writer can never leave something to trust.

A sample goes to ``writing/`` first, is closed, fsynced, renamed into place, and only then gets its manifest line, fsynced
too. The line is what counts: a file without one is written again (its path follows from its id, so nothing piles up), and
whatever lies in ``writing/`` is swept by the next writer. A line whose file is gone or has another size does not count as
done either, so deleting a damaged file and running again mends a store.
"""

from __future__ import annotations

import os
import shutil
import threading
import uuid
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TextIO

import h5py
import numpy as np

from eagle_ds.config.outputs import InUse, hold
from eagle_ds.store.codec import Encoded, encode
from eagle_ds.store.format import (
    CHUNK_ROWS,
    SMALL_DTYPES,
    WIDE_NAMES,
    Sample,
    check_sample,
    crc32_name,
    create_file,
    create_wide,
    raw_view,
    write_header,
    write_small,
)
from eagle_ds.store.manifest import (
    MANIFEST_NAME,
    STORE_JSON,
    SampleEntry,
    StoreInfo,
    check_same_store,
    manifest_line,
    read_manifest,
    sample_path,
    sync_folder,
    trained_spans,
    write_store_info,
)
from eagle_ds.store.sink import DiskSink

Offset = tuple[int, int]  # first row and column of a chunk


class SampleFiles:
    """Writes sample files alone, without their manifest lines: what `StoreWriter` is made of, and what other processes
    use that help the one which holds the `StoreWriter` (it then takes their entries by `StoreWriter.register`).

    ``workers`` threads encode; memory beyond the sample stays under a few chunks a worker, so the tensors of a sample may
    be memory maps. ``write`` may be called from several threads.
    """

    def __init__(self, root: str | Path, info: StoreInfo, *, workers: int = 2) -> None:
        self.root = Path(root)
        self.info = info
        self._window = 3 * workers
        self._encoders = ThreadPoolExecutor(workers, thread_name_prefix="encode")

    def write(self, sample: Sample) -> SampleEntry:
        """Store one sample's file durably, replacing one of the same id; ValueError if it does not fit the facts."""
        check_sample(sample, self.info)
        temporary = self.root / "writing" / f"{uuid.uuid4().hex}.h5"
        path = sample_path(sample.id)
        try:
            with DiskSink(temporary) as sink:
                with create_file(sink) as file:
                    for name in WIDE_NAMES:
                        self._write_wide(file, sink, name, raw_view(getattr(sample, name)))
                    for name in SMALL_DTYPES:
                        if (tensor := getattr(sample, name)) is not None:
                            write_small(file, name, tensor.numpy())
                    write_header(file, sample, self.info)
                num_bytes = sink.sync()
            _rename(temporary, self.root / path)
        finally:
            temporary.unlink(missing_ok=True)
        mask = sample.loss_mask.numpy()
        return SampleEntry(sample.id, path, sample.num_tokens, int(mask.sum()), trained_spans(mask), num_bytes)

    def _write_wide(self, file: h5py.File, sink: DiskSink, name: str, rows: np.ndarray) -> None:
        """Write chunks in file order: row by row, so that a range of rows is one stretch of the file."""
        dataset = create_wide(file, name, *rows.shape, self.info)
        crc32s = []
        for offset, chunk in self._encoded(rows):
            dataset.write_direct_chunk(offset, chunk.stream)
            crc32s.append(chunk.crc32)
            sink.check()
        write_small(file, crc32_name(name), np.array(crc32s, np.uint32).reshape(-1, rows.shape[1] // self.info.hidden_size))

    def _encoded(self, rows: np.ndarray) -> Iterator[tuple[Offset, Encoded]]:
        """Each chunk's place and stream; the worker threads are a window ahead of the consumer."""
        chunk_rows, width = min(CHUNK_ROWS, len(rows)), self.info.hidden_size
        pending: deque[tuple[Offset, Future[Encoded]]] = deque()
        for row in range(0, len(rows), chunk_rows):
            for column in range(0, rows.shape[1], width):
                chunk = rows[row : row + chunk_rows, column : column + width]
                pending.append(((row, column), self._encoders.submit(encode, chunk, chunk_rows)))
                if len(pending) > self._window:
                    yield _finished(pending)
        while pending:
            yield _finished(pending)

    def close(self) -> None:
        self._encoders.shutdown()

    def __enter__(self) -> SampleFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class StoreWriter:
    """Appends to the store at ``root``, creating it or going on where an earlier writer of equal facts stopped.

    ``add`` may be called from several threads. ``workers`` threads encode (see `SampleFiles`).
    """

    def __init__(self, root: str | Path, info: StoreInfo, *, workers: int = 2) -> None:
        self.root = Path(root)
        self.info = info
        self.root.mkdir(parents=True, exist_ok=True)
        self._lock = _lock_store(self.root)
        try:
            self.done_ids = self._settle()
        except BaseException:
            self._lock.close()
            raise
        self._busy_ids: set[str] = set()
        self._mutex = threading.Lock()
        self._files = SampleFiles(self.root, info, workers=workers)

    def add(self, sample: Sample) -> SampleEntry:
        """Store one sample durably; ValueError if it does not fit the facts or its id is already stored."""
        with self._mutex:
            if sample.id in self.done_ids or sample.id in self._busy_ids:
                raise ValueError(f"sample {sample.id!r} is already in the store {self.root}; ids must be unique")
            self._busy_ids.add(sample.id)
        try:
            entry = self._files.write(sample)
            self.register(entry)
        finally:
            self._busy_ids.discard(sample.id)
        return entry

    def register(self, entry: SampleEntry) -> None:
        """Make a file that `SampleFiles` wrote, here or in another process, part of the store."""
        with self._mutex:
            self._append(entry)
            self.done_ids.add(entry.id)

    def close(self) -> None:
        """Let the next writer in; every sample added is already durable."""
        self._files.close()
        self._lock.close()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _settle(self) -> set[str]:
        """Bring the folder into a sound state and return the ids that need no writing."""
        writing, is_new = self.root / "writing", not (self.root / STORE_JSON).exists()
        if is_new and writing.is_dir() and any(writing.iterdir()):
            raise ValueError(f"{writing} has files in it that no store of ours put there, and would be swept; choose another folder")
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir()
        if is_new:
            write_store_info(self.root, self.info)
        else:
            check_same_store(self.root, self.info)
        entries, whole_lines = read_manifest(self.root)
        with (self.root / MANIFEST_NAME).open("ab") as manifest:
            if manifest.tell() > len(whole_lines):
                manifest.truncate(len(whole_lines))
        sync_folder(self.root)
        return {entry.id for entry in entries if _size(self.root / entry.path) == entry.bytes}

    def _append(self, entry: SampleEntry) -> None:
        """Add the manifest line; a line that does not fit on the disk is taken back whole."""
        with (self.root / MANIFEST_NAME).open("ab", buffering=0) as manifest:
            start = manifest.seek(0, os.SEEK_END)
            line = manifest_line(entry)
            try:
                if manifest.write(line) != len(line):
                    raise OSError(f"{manifest.name}: the disk took only a part of a line")
                os.fsync(manifest.fileno())
            except OSError:
                manifest.truncate(start)
                raise


def _finished(pending: deque[tuple[Offset, Future[Encoded]]]) -> tuple[Offset, Encoded]:
    offset, chunk = pending.popleft()
    return offset, chunk.result()


def _lock_store(root: Path) -> TextIO:
    """One writer a store."""
    try:
        return hold(root / "writer.lock")
    except InUse as error:
        raise ValueError(f"another writer is at work on the store {root}; wait for it or choose another folder") from error


def _rename(source: Path, destination: Path) -> None:
    """Durable rename: the subfolder's own entry is synced before the file's."""
    if not destination.parent.exists():
        destination.parent.mkdir(parents=True, exist_ok=True)
        sync_folder(destination.parent.parent)
        sync_folder(destination.parent.parent.parent)
    source.replace(destination)
    sync_folder(destination.parent)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1
