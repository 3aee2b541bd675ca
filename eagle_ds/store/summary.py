"""Summarize a store, or one file of it: counts, lengths, compression, and files that cannot be opened."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np

from eagle_ds.store.format import SMALL_DTYPES, WIDE_NAMES, Header
from eagle_ds.store.manifest import STORE_JSON, StoreError, StoreInfo
from eagle_ds.store.reader import SampleReader
from eagle_ds.store.store import Store

SIZED_FILES = 200  # about as many files are opened to measure the compression of each dataset
HISTOGRAM_BINS = 12


@dataclass
class DatasetSize:
    """A dataset's bytes in memory and on disk, summed over the files that were opened."""

    raw_bytes: int = 0
    stored_bytes: int = 0

    @property
    def saved(self) -> float:
        """Fraction of the bytes that compression saves."""
        return 1 - self.stored_bytes / self.raw_bytes if self.raw_bytes else 0.0


@dataclass
class Summary:
    """What a store, or one file, contains."""

    path: Path
    info: StoreInfo | None  # None for a single file
    header: Header | None  # of the single file, or of the store's first readable one
    lengths: np.ndarray  # int64 [samples], tokens
    trained: np.ndarray  # int64 [samples], trained tokens
    stored_bytes: int
    sizes: dict[str, DatasetSize] = field(default_factory=dict)  # by dataset
    sized_files: int = 0
    problems: list[str] = field(default_factory=list)  # error messages of files that cannot be opened

    @property
    def trained_fraction(self) -> float:
        """Trained tokens / all tokens."""
        return float(self.trained.sum() / max(1, self.lengths.sum()))


def summarize(path: str | Path) -> Summary:
    """Summarize a store or one file. Raises ValueError if ``path`` is neither."""
    path = Path(path)
    expected = "give a store, or one .h5 file of it"
    if not path.exists():
        raise ValueError(f"{path} does not exist; {expected}")
    if not path.is_dir():
        return _summarize_file(path)
    if not (path / STORE_JSON).exists():
        raise ValueError(f"{path} is not a hidden-state store: it has no {STORE_JSON}; {expected}")
    return _summarize_store(path)


def _summarize_store(root: Path) -> Summary:
    store = Store(root)
    lengths = np.array([entry.num_tokens for entry in store.entries], np.int64)
    trained = np.array([entry.num_trained for entry in store.entries], np.int64)
    summary = Summary(root, store.info, None, lengths, trained, sum(entry.bytes for entry in store.entries))
    # Counts come from the manifest. Compression needs open files, so only a sample of them is measured.
    for entry in store.entries[:: max(1, len(store.entries) // SIZED_FILES)]:
        try:
            with store.reader(entry, threads=1) as reader:
                header = reader.header
            summary.header = summary.header or header
            _add_sizes(summary, root / entry.path)
        except StoreError as error:
            summary.problems.append(str(error))
    return summary


def _summarize_file(path: Path) -> Summary:
    with SampleReader(path) as reader:
        header, mask = reader.header, reader.read_small("loss_mask")
    assert mask is not None
    lengths, trained = np.array([header.num_tokens], np.int64), np.array([int(mask.sum())], np.int64)
    summary = Summary(path, None, header, lengths, trained, path.stat().st_size)
    _add_sizes(summary, path)
    return summary


def _add_sizes(summary: Summary, path: Path) -> None:
    with h5py.File(path, "r", locking=False) as file:
        for name in (*WIDE_NAMES, *SMALL_DTYPES):
            if name in file:
                dataset, size = file[name], summary.sizes.setdefault(name, DatasetSize())
                # Not dataset.nbytes: h5py reads bfloat16 as float32 and counts 4 bytes per value.
                size.raw_bytes += dataset.size * dataset.id.get_type().get_size()
                size.stored_bytes += dataset.id.get_storage_size()
    summary.sized_files += 1


def histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """Count lengths in bins that grow by a factor of 2 (or its root, if 2 would give few bins).

    Returns:
        (first length, first length of the next bin, samples) for each bin.
    """
    if not len(lengths):
        return []
    low = max(0, int(lengths.min()).bit_length() - 1)
    high = int(lengths.max()).bit_length()
    per_octave = 1 if high - low >= HISTOGRAM_BINS // 2 else 2
    edges = sorted({round(2 ** (low + i / per_octave)) for i in range((high - low) * per_octave + 1)})
    counts, _ = np.histogram(lengths, np.array(edges, np.float64))
    return [(edges[i], edges[i + 1], int(count)) for i, count in enumerate(counts)]
