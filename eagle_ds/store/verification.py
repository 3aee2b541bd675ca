"""Verify a store: inflate every chunk of every file, and name the damaged files and rows."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from eagle_ds.store.chunks import RowRange
from eagle_ds.store.format import CHUNK_ROWS, WIDE_NAMES
from eagle_ds.store.manifest import SampleEntry, StoreError, StoreInfo
from eagle_ds.store.processes import fork_server
from eagle_ds.store.reader import SampleReader
from eagle_ds.store.store import Store

VERIFY_ROWS = 64 * CHUNK_ROWS  # rows inflated at once: this bounds the memory for a long sample


@dataclass(frozen=True)
class Damage:
    """One damaged place in a file. Dataset and rows are None if the file as a whole cannot be read."""

    path: Path
    dataset: str | None
    rows: tuple[int, int] | None
    reason: str


def verify(path: str | Path, workers: int = 1) -> Iterator[tuple[Path, list[Damage]]]:
    """Yield (file, damages) for every file of a store, or for one lone file.

    Args:
        path: a store or one .h5 file.
        workers: processes that verify files side by side; 1 means this process.
    """
    path = Path(path)
    if not path.is_dir():
        yield path, verify_file(path)
        return
    store = Store(path)
    check = partial(_verify_entry, path, store.info)
    if workers == 1:
        yield from map(check, store.entries)
        return
    with ProcessPoolExecutor(workers, fork_server()) as pool:
        yield from pool.map(check, store.entries, chunksize=4)


def verify_file(
    path: str | Path, entry: SampleEntry | None = None, info: StoreInfo | None = None, *, threads: int = 1
) -> list[Damage]:
    """Read and inflate everything in a file. An empty list means that every chunk is intact."""
    path = Path(path)
    with SampleReader(path, entry, info, threads=threads) as reader:
        try:
            num_tokens = reader.header.num_tokens
        except StoreError as error:
            return [Damage(path, None, None, str(error))]
        return [d for name in WIDE_NAMES for d in _damages(reader, name, (0, num_tokens), VERIFY_ROWS)]


def unlisted_files(root: str | Path) -> list[Path]:
    """Return the files that have no manifest line. A writer that was killed leaves such files behind.

    They can be deleted; writing their samples again replaces them.
    """
    root = Path(root)
    listed = {root / entry.path for entry in Store(root).entries}
    return [path for path in sorted((root / "samples").glob("*/*.h5")) if path not in listed]


def _verify_entry(root: Path, info: StoreInfo, entry: SampleEntry) -> tuple[Path, list[Damage]]:
    return root / entry.path, verify_file(root / entry.path, entry, info)


def _damages(reader: SampleReader, name: str, rows: RowRange, step: int) -> Iterator[Damage]:
    """Read ``rows``, ``step`` at a time. If a step fails, read it again chunk by chunk to find the damage."""
    for start in range(*rows, step):
        part = start, min(start + step, rows[1])
        try:
            reader.read_rows(name, [part])
        except StoreError as error:
            if step > CHUNK_ROWS:
                yield from _damages(reader, name, part, CHUNK_ROWS)
            else:
                yield Damage(reader.path, name, part, str(error))
