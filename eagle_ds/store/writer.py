"""Write samples into a store, safely against crashes, full disks and a second writer.

A sample is added in this order: write its file in ``writing/``, close it, fsync it, rename it to its place,
append its manifest line, fsync the manifest. The line is what makes the sample exist. So after a crash at any
point:

- a file without a line is written again, to the same path, because the path follows from the sample's id;
- files in ``writing/`` are deleted by the next writer;
- a line whose file is missing or has another size does not count as done. Deleting a damaged file and running
  the same command again therefore repairs a store.
"""

from __future__ import annotations

import os
import shutil
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import TextIO

import h5py
import numpy as np

from eagle_ds.config.outputs import InUse, hold
from eagle_ds.store import format as fmt
from eagle_ds.store import manifest
from eagle_ds.store.codec import EncodedChunk, encode_chunk
from eagle_ds.store.format import CHUNK_ROWS, SMALL_DTYPES, WIDE_NAMES, Sample
from eagle_ds.store.manifest import MANIFEST_NAME, STORE_JSON, SampleEntry, StoreInfo
from eagle_ds.store.processes import in_order
from eagle_ds.store.sink import DiskSink

LOCK_NAME = "writer.lock"
Offset = tuple[int, int]  # first row and column of a chunk


class SampleFiles:
    """Write the HDF5 files of samples, without manifest lines.

    `StoreWriter` uses this class. Helper processes use it too: they write files, and the one process that
    holds the `StoreWriter` adds the manifest lines with `StoreWriter.register`.

    ``workers`` threads encode chunks. Beyond the sample itself only a few chunks per worker are in memory, so
    the tensors of a sample may be memory maps. Several threads may call ``write`` at once.
    """

    def __init__(self, root: str | Path, info: StoreInfo, *, workers: int = 2) -> None:
        self.root = Path(root)
        self.info = info
        self._window = 3 * workers  # chunks submitted to the encoders but not yet written
        self._encoders = ThreadPoolExecutor(workers, thread_name_prefix="encode")

    def write(self, sample: Sample) -> SampleEntry:
        """Write one sample's file durably, replacing any file of the same id.

        Raises ValueError if the sample does not fit ``info``, and OSError if the disk is full.
        """
        fmt.check_sample(sample, self.info)
        temporary = self.root / "writing" / f"{uuid.uuid4().hex}.h5"
        path = manifest.sample_path(sample.id)
        try:
            with DiskSink(temporary) as sink:
                with fmt.create_file(sink) as file:
                    for name in WIDE_NAMES:
                        self._write_wide(file, sink, name, fmt.raw_view(getattr(sample, name)))
                    for name in SMALL_DTYPES:
                        if (tensor := getattr(sample, name)) is not None:
                            fmt.write_small(file, name, tensor.numpy())
                    fmt.write_header(file, sample, self.info)
                num_bytes = sink.sync()
            _rename(temporary, self.root / path)
        finally:
            temporary.unlink(missing_ok=True)
        mask = sample.loss_mask.numpy()
        spans, num_trained = manifest.trained_spans(mask), int(mask.sum())
        return SampleEntry(sample.id, path, sample.num_tokens, num_trained, spans, num_bytes)

    def _write_wide(self, file: h5py.File, sink: DiskSink, name: str, rows: np.ndarray) -> None:
        """Write a hidden-state dataset, chunks of the same rows one after another.

        All layers of a range of rows then lie side by side in the file, so one call can read them.
        """
        dataset = fmt.create_wide(file, name, rows.shape, self.info)
        crc32s = []
        for offset, chunk in self._encoded(rows):
            dataset.write_direct_chunk(offset, chunk.stream)
            crc32s.append(chunk.crc32)
            sink.check()
        layers = rows.shape[1] // self.info.hidden_size
        fmt.write_small(file, fmt.crc32_name(name), np.array(crc32s, np.uint32).reshape(-1, layers))

    def _encoded(self, rows: np.ndarray) -> Iterator[tuple[Offset, EncodedChunk]]:
        """Yield each chunk with its offset, in order. The encoders run at most ``_window`` chunks ahead."""
        chunk_rows, width = min(CHUNK_ROWS, len(rows)), self.info.hidden_size
        offsets = list(product(range(0, len(rows), chunk_rows), range(0, rows.shape[1], width)))
        chunks = (rows[row : row + chunk_rows, column : column + width] for row, column in offsets)
        encoded = (self._encoders.submit(encode_chunk, chunk, chunk_rows) for chunk in chunks)
        return zip(offsets, in_order(encoded, self._window), strict=True)

    def close(self) -> None:
        """End the encoder threads."""
        self._encoders.shutdown()

    def __enter__(self) -> SampleFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class StoreWriter:
    """Append samples to the store at ``root``, which is created if it does not exist.

    Several threads may call ``add`` at once. ``workers`` threads encode (see `SampleFiles`).

    Attributes:
        done_ids: ids of the samples that are stored already and need no writing.

    Raises:
        ValueError: another process writes to the store, or the store differs from ``info``.
    """

    def __init__(self, root: str | Path, info: StoreInfo, *, workers: int = 2) -> None:
        self.root = Path(root)
        self.info = info
        self.root.mkdir(parents=True, exist_ok=True)
        self._lock = _lock_store(self.root)
        try:
            self.done_ids = self._prepare_folder()
        except BaseException:
            self._lock.close()
            raise
        self._busy_ids: set[str] = set()
        self._mutex = threading.Lock()
        self._files = SampleFiles(self.root, info, workers=workers)

    def add(self, sample: Sample) -> SampleEntry:
        """Store one sample durably.

        Raises ValueError if it does not fit ``info`` or its id is stored already.
        """
        with self._mutex:
            if sample.id in self.done_ids or sample.id in self._busy_ids:
                raise ValueError(f"{sample.id!r} is already in the store {self.root}; ids must be unique")
            self._busy_ids.add(sample.id)
        try:
            entry = self._files.write(sample)
            self.register(entry)
        finally:
            self._busy_ids.discard(sample.id)
        return entry

    def register(self, entry: SampleEntry) -> None:
        """Add the manifest line of a file that `SampleFiles` wrote, in this process or another."""
        with self._mutex:
            self._append(entry)
            self.done_ids.add(entry.id)

    def discard_if_empty(self) -> bool:
        """Delete the store if this writer created it and it has no file of a sample. Returns whether it did.

        Other files in the folder, and the folder itself, are kept. Close the writer afterwards.
        """
        samples = self.root / "samples"
        if not self._is_new or (samples.is_dir() and any(samples.rglob("*.h5"))):
            return False
        # store.json last: without it the folder is no store, so a crash before leaves one that can be used.
        for name in (MANIFEST_NAME, LOCK_NAME, STORE_JSON):
            (self.root / name).unlink(missing_ok=True)
        shutil.rmtree(self.root / "writing", ignore_errors=True)
        return True

    def close(self) -> None:
        """Release the store for the next writer. Every sample that was added is already on the disk."""
        self._files.close()
        self._lock.close()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prepare_folder(self) -> set[str]:
        """Remove unfinished data of an earlier writer. Return the ids of the samples that are complete."""
        writing, self._is_new = self.root / "writing", not (self.root / STORE_JSON).exists()
        if self._is_new and writing.is_dir() and any(writing.iterdir()):
            problem = f"{self.root} is not a store, and files in {writing} would be deleted"
            raise ValueError(f"{problem}; choose another folder")
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir()
        if self._is_new:
            manifest.write_store_info(self.root, self.info)
        else:
            manifest.check_same_store(self.root, self.info)
        entries, whole_lines = manifest.read_manifest(self.root)
        with (self.root / MANIFEST_NAME).open("ab") as file:
            if file.tell() > len(whole_lines):  # the last line is incomplete
                file.truncate(len(whole_lines))
        manifest.sync_folder(self.root)
        return set(manifest.whole_entries(self.root, entries))

    def _append(self, entry: SampleEntry) -> None:
        """Append the manifest line. If the disk is full, remove the part that was written."""
        with (self.root / MANIFEST_NAME).open("ab", buffering=0) as file:
            start = file.seek(0, os.SEEK_END)
            line = manifest.manifest_line(entry)
            try:
                if file.write(line) != len(line):
                    raise OSError(f"{file.name}: the disk took only a part of a line; free some space")
                os.fsync(file.fileno())
            except OSError:
                file.truncate(start)
                raise


def _lock_store(root: Path) -> TextIO:
    """Lock the store for one writer. Raises ValueError if another process has the lock."""
    try:
        return hold(root / LOCK_NAME)
    except InUse as error:
        problem = f"another writer is at work on {root}"
        raise ValueError(f"{problem}; wait for it or choose another folder") from error


def _rename(source: Path, destination: Path) -> None:
    """Rename a file durably: sync new parent folders first, then the file's own folder."""
    if not destination.parent.exists():
        destination.parent.mkdir(parents=True, exist_ok=True)
        manifest.sync_folder(destination.parent.parent)
        manifest.sync_folder(destination.parent.parent.parent)
    source.replace(destination)
    manifest.sync_folder(destination.parent)
