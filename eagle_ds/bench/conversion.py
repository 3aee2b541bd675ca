"""Time tools/convert_ckpt_to_hdf5.py: the whole command, over files as SpecForge writes them."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from eagle_ds.bench.store_io import Format, Goal, GzipTorch, MappedTorch, forget
from eagle_ds.bench.synthetic_data import States, make_sample
from eagle_ds.store.format import CHUNK_ROWS, Sample
from eagle_ds.store.manifest import StoreInfo
from eagle_ds.store.sink import DiskSink
from eagle_ds.store.store import Store

logger = logging.getLogger(__name__)

TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert_ckpt_to_hdf5.py"
GOAL_MB_PER_S = 250  # promised speed, in source bytes
DISK_SHARE = 0.8  # promised share of the disk's own speed, where the disk is too slow for GOAL_MB_PER_S
BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class Conversion:
    """One run of the tool. ``seconds`` is the command's wall time, with the start of Python and imports."""

    title: str
    gzipped: bool
    files: int
    source_bytes: int
    raw_bytes: int  # of the hidden states in memory
    stored_bytes: int
    seconds: float
    start_s: float  # part of ``seconds`` that converting an almost empty tree takes
    # of source bytes, the disk's limit; None if files are in the page cache
    disk_mb_per_s: float | None = None

    @property
    def source_mb_per_s(self) -> float:
        return self.source_bytes / 1e6 / self.seconds

    @property
    def sustained_mb_per_s(self) -> float:
        """Speed in source bytes without the start: what a long conversion reaches."""
        return self.source_bytes / 1e6 / (self.seconds - self.start_s)

    @property
    def raw_mb_per_s(self) -> float:
        return self.raw_bytes / 1e6 / self.seconds


@dataclass(frozen=True)
class Tree:
    """A folder tree of files to convert."""

    root: Path
    paths: list[Path]
    raw_bytes: int
    gzipped: bool

    @property
    def source_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.paths)


def measure_conversions(
    states: States, info: StoreInfo, files: int, num_tokens: int, workers: int, folder: Path
) -> Iterator[Conversion]:
    """Measure plain files (cached, from the disk, with ``--verify``), then a quarter as many gzipped ones."""
    small = _write_tree(folder / "small", MappedTorch(), make_sample(states, CHUNK_ROWS), info, workers, 1)
    start_s = _run("an almost empty tree", small, info, workers)
    sample = make_sample(states, num_tokens)
    plain = _write_tree(folder / "plain", MappedTorch(), sample, info, files, 1)
    yield (cached := _convert("plain files, cached", plain, info, workers, start_s))
    disk = _disk_alone(plain, cached.stored_bytes, workers)
    yield _convert("plain files, from the disk", plain, info, workers, start_s, disk=disk)
    yield _convert(
        "plain files, from the disk, --verify", plain, info, workers, start_s, ["--verify"], disk=disk
    )
    shutil.rmtree(plain.root)
    gzipped = _write_tree(folder / "gzip", GzipTorch(), sample, info, max(1, files // 4), workers)
    yield _convert("gzip -6 files, cached", gzipped, info, workers, start_s)


def goals(results: Sequence[Conversion]) -> list[Goal]:
    """Return the promises for plain files. Gzipped ones have none: their decompression limits them."""
    promised = []
    for result in results:
        if result.gzipped or "--verify" in result.title:
            continue
        if result.disk_mb_per_s is None or result.disk_mb_per_s * DISK_SHARE > GOAL_MB_PER_S:
            promised.append(Goal(f"MB/s, {result.title}", result.source_mb_per_s, GOAL_MB_PER_S))
        else:
            text = f"{result.title}: share of the disk's {result.disk_mb_per_s:.0f} MB/s, without the start"
            promised.append(Goal(text, result.sustained_mb_per_s / result.disk_mb_per_s, DISK_SHARE))
    return promised


def as_record(result: Conversion) -> dict[str, object]:
    """Return the conversion for JSON."""
    speeds = ("source_mb_per_s", "sustained_mb_per_s", "raw_mb_per_s")
    return {**asdict(result), **{name: getattr(result, name) for name in speeds}}


def _write_tree(root: Path, kind: Format, sample: Sample, info: StoreInfo, files: int, threads: int) -> Tree:
    logger.info("writing %d files of %d tokens: %s", files, sample.num_tokens, kind.title)

    def write(number: int) -> Path:
        folder = root / f"rows_{number}-{number + 1}"
        folder.mkdir(parents=True)
        return kind.write(sample, folder, info)

    with ThreadPoolExecutor(threads) as pool:
        paths = list(pool.map(write, range(files)))
    raw_bytes = files * (sample.aux_hidden_state.nbytes + sample.hidden_state.nbytes)
    return Tree(root, paths, raw_bytes, isinstance(kind, GzipTorch))


def _convert(
    title: str, tree: Tree, info: StoreInfo, workers: int, start_s: float,
    flags: Sequence[str] = (), disk: float | None = None,
) -> Conversion:
    os.sync()
    for path in tree.paths if disk else []:
        forget(path)
    seconds = _run(title, tree, info, workers, flags)
    store = _store_of(tree)
    stored = sum(entry.bytes for entry in Store(store).entries)
    shutil.rmtree(store)
    sizes = tree.source_bytes, tree.raw_bytes, stored
    return Conversion(title, tree.gzipped, len(tree.paths), *sizes, seconds, start_s, disk)


def _disk_alone(tree: Tree, written_bytes: int, threads: int) -> float:
    """Return the disk's limit: MB/s of source bytes that are only read, while a store's bytes are written."""
    read_mb, written_mb = tree.source_bytes // 1_000_000, written_bytes // 1_000_000
    logger.info("measuring the disk alone: %d MB read, %d MB written", read_mb, written_mb)
    copies, share = tree.root.with_name("copies"), written_bytes / tree.source_bytes
    copies.mkdir()
    os.sync()

    def copy(path: Path) -> None:
        forget(path)
        with path.open("rb", buffering=0) as source, DiskSink(copies / path.parent.name) as sink:
            while block := source.read(BLOCK_BYTES):
                sink.write(memoryview(block)[: int(len(block) * share)])
            sink.sync()
        forget(path)

    begin = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(copy, tree.paths))
    seconds = time.perf_counter() - begin
    shutil.rmtree(copies)
    return tree.source_bytes / 1e6 / seconds


def _run(title: str, tree: Tree, info: StoreInfo, workers: int, flags: Sequence[str] = ()) -> float:
    """Run the tool; return its seconds. Raises CalledProcessError unless every file was converted."""
    logger.info("converting: %s", title)
    layers = ",".join(map(str, info.aux_layer_ids))
    sizes = ["--aux-layer-ids", layers, "--vocab-size", str(info.vocab_size)]
    options = ["--target-name", info.target, *sizes, "--workers", str(workers), *flags]
    begin = time.perf_counter()
    command = [sys.executable, TOOL, tree.root, _store_of(tree), *options]
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - begin


def _store_of(tree: Tree) -> Path:
    return tree.root.with_name(f"{tree.root.name}_store")
