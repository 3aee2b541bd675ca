"""The hidden-state store: a folder of gzip-filtered HDF5 files, one per sample, with a manifest.

    STORE/store.json          what holds for every sample: target, layers, sizes, dtype    store/manifest.py
    STORE/manifest.jsonl      one line per sample: lengths, trained spans, path, size      store/manifest.py
    STORE/samples/ab/....h5   hidden states of one sample, schema 1                        store/format.py

Start here: write with `StoreWriter` (store/writer.py), read with ``Store(root).reader(entry)``
(store/reader.py). A chunk of 64 rows is compressed by store/codec.py and located by store/chunks.py. Checks
of a whole store are in store/verification.py, its statistics in store/summary.py.
"""

from __future__ import annotations

from pathlib import Path

from eagle_ds.store import manifest
from eagle_ds.store.format import Sample
from eagle_ds.store.manifest import SampleEntry, StoreError, StoreInfo
from eagle_ds.store.reader import ReadStats, SampleReader
from eagle_ds.store.writer import StoreWriter

__all__ = [
    "ReadStats", "Sample", "SampleEntry", "SampleReader", "Store", "StoreError", "StoreInfo", "StoreWriter",
]


class Store:
    """A snapshot of a store: the samples in its manifest now. It can be pickled and forked."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.info: StoreInfo = manifest.read_store_info(self.root)
        self.entries, lines = manifest.read_manifest(self.root)
        self.manifest_hash: str = manifest.manifest_hash(self.root, lines)

    def __len__(self) -> int:
        return len(self.entries)

    def reader(self, entry: SampleEntry, *, threads: int = 2, hidden_states: bool = True) -> SampleReader:
        """Return a reader of one sample. It checks the file against the manifest and store.json."""
        path = self.root / entry.path
        return SampleReader(path, entry, self.info, threads=threads, hidden_states=hidden_states)
