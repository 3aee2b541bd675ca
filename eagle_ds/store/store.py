"""The hidden-state store: a folder of gzip-filtered HDF5 files, one a sample, and a manifest that says what is in it.

    STORE/store.json          what holds for every sample: target, layers, sizes, dtype     (data/manifest.py)
    STORE/manifest.jsonl      one line a sample: lengths, trained spans, path, size         (data/manifest.py)
    STORE/samples/ab/....h5   hidden states of one sample, schema 1                         (data/format.py)

This is the front: write with `StoreWriter` (data/writer.py), read with ``Store(root).reader(entry)`` (data/reader.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from eagle_ds.store.chunks import RowRange
from eagle_ds.store.format import CHUNK_ROWS, WIDE_NAMES, Sample
from eagle_ds.store.manifest import SampleEntry, StoreError, StoreInfo, manifest_hash, read_manifest, read_store_info
from eagle_ds.store.reader import ReadStats, SampleReader, read_rows_h5py
from eagle_ds.store.writer import StoreWriter

__all__ = [
    "Damage",
    "ReadStats",
    "Sample",
    "SampleEntry",
    "SampleReader",
    "Store",
    "StoreError",
    "StoreInfo",
    "StoreWriter",
    "read_rows_h5py",
    "verify_file",
]

VERIFY_ROWS = 64 * CHUNK_ROWS


class Store:
    """A finished or growing store, as its manifest stood when this was made. Holds no handles: pickle and fork at will."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.info: StoreInfo = read_store_info(self.root)
        self.entries, manifest = read_manifest(self.root)
        self.manifest_hash: str = manifest_hash(self.root, manifest)

    def __len__(self) -> int:
        return len(self.entries)

    def reader(self, entry: SampleEntry, *, threads: int = 2, rows: bool = True) -> SampleReader:
        """A reader that checks the file against the manifest and the facts when it opens."""
        return SampleReader(self.root / entry.path, entry, self.info, threads=threads, rows=rows)


@dataclass(frozen=True)
class Damage:
    """One thing wrong with a file: which dataset and rows, or None where the file as a whole cannot be read."""

    path: Path
    dataset: str | None
    rows: tuple[int, int] | None
    reason: str


def verify_file(path: str | Path, entry: SampleEntry | None = None, info: StoreInfo | None = None, *, threads: int = 1) -> list[Damage]:
    """Read and inflate everything in a file; an empty list means sound."""
    path = Path(path)
    with SampleReader(path, entry, info, threads=threads) as reader:
        try:
            num_tokens = reader.header.num_tokens
        except StoreError as error:
            return [Damage(path, None, None, str(error))]
        return [damage for name in WIDE_NAMES for damage in _damages(reader, name, (0, num_tokens), VERIFY_ROWS)]


def _damages(reader: SampleReader, name: str, rows: RowRange, step: int) -> Iterator[Damage]:
    """Damage within ``rows``, looked for in ``step`` rows at a time and chunk by chunk where there is some."""
    for start in range(*rows, step):
        part = start, min(start + step, rows[1])
        try:
            reader.read_rows(name, [part])
        except StoreError as error:
            if step > CHUNK_ROWS:
                yield from _damages(reader, name, part, CHUNK_ROWS)
            else:
                yield Damage(reader.path, name, part, str(error))
