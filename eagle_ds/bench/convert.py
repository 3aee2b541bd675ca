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
from eagle_ds.data.format import CHUNK_ROWS, Sample
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
    start_s: float  # of those, what a conversion of next to nothing takes

    @property
    def source_mb_per_s(self) -> float:
        return self.source_bytes / 1e6 / self.seconds

    @property
    def sustained_mb_per_s(self) -> float:
        """Of source bytes, once it has started: what a long conversion comes to."""
        return self.source_bytes / 1e6 / (self.seconds - self.start_s)

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
    """Plain files from the page cache, from the disk, and compared with ``--verify``; then a quarter as many gzip'd ones."""
    small = _write_tree(folder / "small", MappedTorch(), make_sample(states, CHUNK_ROWS), facts, workers, 1)
    start_s = _run("next to nothing", small, facts, workers)
    sample = make_sample(states, num_tokens)
    plain = _write_tree(folder / "plain", MappedTorch(), sample, facts, files, 1)
    yield _convert("plain files, cached", plain, facts, workers, start_s)
    yield _convert("plain files, from the disk", plain, facts, workers, start_s, cold=True)
    yield _convert("plain files, from the disk, --verify", plain, facts, workers, start_s, ["--verify"], cold=True)
    shutil.rmtree(plain.root)
    gzipped = _write_tree(folder / "gzip", GzipTorch(), sample, facts, max(1, files // 4), workers)
    yield _convert("gzip -6 files, cached", gzipped, facts, workers, start_s)


def goals(results: Sequence[Conversion]) -> list[Goal]:
    """What is promised of plain files; gzip'd ones are bound by their own inflate."""
    return [
        Goal(f"MB/s, {result.title}", result.source_mb_per_s, GOAL_MB_PER_S)
        for result in results
        if not result.gzipped and "--verify" not in result.title
    ]


def as_record(result: Conversion) -> dict[str, object]:
    """For JSON."""
    speeds = ("source_mb_per_s", "sustained_mb_per_s", "raw_mb_per_s")
    return {**asdict(result), **{name: getattr(result, name) for name in speeds}}


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


def _convert(
    title: str, tree: Tree, facts: StoreFacts, workers: int, start_s: float, flags: Sequence[str] = (), cold: bool = False
) -> Conversion:
    os.sync()
    for path in tree.paths if cold else []:
        forget(path)
    seconds = _run(title, tree, facts, workers, flags)
    store = _store_of(tree)
    stored = sum(entry.bytes for entry in Store(store).entries)
    shutil.rmtree(store)
    return Conversion(title, tree.gzipped, len(tree.paths), tree.source_bytes, tree.raw_bytes, stored, seconds, start_s)


def _run(title: str, tree: Tree, facts: StoreFacts, workers: int, flags: Sequence[str] = ()) -> float:
    """Run the tool; its seconds. Raises CalledProcessError unless every file was converted."""
    logger.info("converting: %s", title)
    layers = ",".join(map(str, facts.aux_layer_ids))
    said = ["--target-name", facts.target, "--aux-layer-ids", layers, "--vocab-size", str(facts.vocab_size), "--workers", str(workers)]
    begin = time.perf_counter()
    subprocess.run([sys.executable, TOOL, tree.root, _store_of(tree), *said, *flags], check=True, capture_output=True)
    return time.perf_counter() - begin


def _store_of(tree: Tree) -> Path:
    return tree.root.with_name(f"{tree.root.name}_store")
