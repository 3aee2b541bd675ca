"""How fast tools/convert_ckpt_to_hdf5.py is: the whole command as a user types it, over a tree as SpecForge writes it."""

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

from eagle_ds.bench.formats import Format, GzipTorch, MappedTorch
from eagle_ds.bench.io import Goal, forget
from eagle_ds.bench.states import States, make_sample
from eagle_ds.data.format import Sample
from eagle_ds.data.manifest import StoreFacts
from eagle_ds.data.store import Store

logger = logging.getLogger(__name__)

TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert_ckpt_to_hdf5.py"
GOAL_MB_PER_S = 250


@dataclass(frozen=True)
class Conversion:
    """One run of the tool. ``seconds`` is the command's wall time, interpreter and imports included."""

    title: str
    gzipped: bool
    files: int
    source_bytes: int
    raw_bytes: int  # hidden states as they are in memory
    stored_bytes: int
    seconds: float

    @property
    def source_mb_per_s(self) -> float:
        return self.source_bytes / 1e6 / self.seconds

    @property
    def raw_mb_per_s(self) -> float:
        return self.raw_bytes / 1e6 / self.seconds


@dataclass(frozen=True)
class Tree:
    """Files to convert."""

    root: Path
    paths: list[Path]
    raw_bytes: int
    gzipped: bool

    @property
    def source_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.paths)


def measure_conversions(states: States, facts: StoreFacts, files: int, num_tokens: int, workers: int, folder: Path) -> Iterator[Conversion]:
    """Plain files from the page cache, from the disk, and compared with ``--verify``; then half as many gzip'd ones."""
    sample = make_sample(states, num_tokens)
    plain = _write_tree(folder / "plain", MappedTorch(), sample, facts, files, 1)
    yield _convert("plain files, cached", plain, facts, workers)
    yield _convert("plain files, from the disk", plain, facts, workers, cold=True)
    yield _convert("plain files, from the disk, --verify", plain, facts, workers, ["--verify"], cold=True)
    shutil.rmtree(plain.root)
    gzipped = _write_tree(folder / "gzip", GzipTorch(), sample, facts, max(1, files // 2), workers)
    yield _convert("gzip -6 files, cached", gzipped, facts, workers)


def goals(results: Sequence[Conversion]) -> list[Goal]:
    """What is promised of plain files; gzip'd ones are bound by their own inflate."""
    return [
        Goal(f"MB/s, {result.title}", result.source_mb_per_s, GOAL_MB_PER_S)
        for result in results
        if not result.gzipped and "--verify" not in result.title
    ]


def as_record(result: Conversion) -> dict[str, object]:
    """For JSON."""
    return {**asdict(result), "source_mb_per_s": result.source_mb_per_s, "raw_mb_per_s": result.raw_mb_per_s}


def _write_tree(root: Path, kind: Format, sample: Sample, facts: StoreFacts, files: int, threads: int) -> Tree:
    logger.info("writing %d files of %d tokens: %s", files, sample.num_tokens, kind.title)

    def write(number: int) -> Path:
        folder = root / f"rows_{number}-{number + 1}"
        folder.mkdir(parents=True)
        return kind.write(sample, folder, facts)

    with ThreadPoolExecutor(threads) as pool:
        paths = list(pool.map(write, range(files)))
    raw_bytes = files * (sample.aux_hidden_state.nbytes + sample.hidden_state.nbytes)
    return Tree(root, paths, raw_bytes, isinstance(kind, GzipTorch))


def _convert(title: str, tree: Tree, facts: StoreFacts, workers: int, flags: Sequence[str] = (), cold: bool = False) -> Conversion:
    """Run the tool into a store that is deleted again. Raises CalledProcessError unless every file was converted."""
    logger.info("converting: %s", title)
    store = tree.root.with_name("store")
    os.sync()
    for path in tree.paths if cold else []:
        forget(path)
    layers = ",".join(map(str, facts.aux_layer_ids))
    said = ["--target-name", facts.target, "--aux-layer-ids", layers, "--vocab-size", str(facts.vocab_size), "--workers", str(workers)]
    begin = time.perf_counter()
    subprocess.run([sys.executable, TOOL, tree.root, store, *said, *flags], check=True, capture_output=True)
    seconds = time.perf_counter() - begin
    stored = sum(entry.bytes for entry in Store(store).entries)
    shutil.rmtree(store)
    return Conversion(title, tree.gzipped, len(tree.paths), tree.source_bytes, tree.raw_bytes, stored, seconds)
