"""Stores of random samples, for timing steps that read from disk. Nothing can be learned from them.

A block of normal random states is made once and repeated along each sample: chunks of 64 rows are compressed alone, so no
coder sees the repetition, and random bfloat16 numbers compress about as well as a trained network's states do.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch

from eagle_ds.config.recipe import Recipe
from eagle_ds.sharding import ranges as rg
from eagle_ds.sharding.sequence import Document
from eagle_ds.store.format import TORCH_DTYPES, Sample
from eagle_ds.store.manifest import STORE_JSON
from eagle_ds.store.store import Store, StoreInfo, StoreWriter

logger = logging.getLogger(__name__)

BLOCK_ROWS = 1024
MAX_WORKERS = 32
FEW_TOKENS = 65_536  # samples up to this length are made four at a time, longer ones (4 GB each at 128K) two


def default_samples(num_tokens: int, per_step: int) -> int:
    """At least two steps' worth, so that a step never reads the very files of the one before it."""
    least = 4 if num_tokens <= FEW_TOKENS else 2
    return per_step * max(-(-least // per_step), 2)


def random_store(root: Path, recipe: Recipe, document: Document, count: int, *, dtype: str) -> Store:
    """The store at ``root`` with ``count`` samples of ``document``'s length and trained spans, in the recipe's widths.

    What is there already is kept, and a store that lacks nothing is only read, by many processes at once. Raises ValueError if
    a store of other widths lies there, if its samples have another shape, or if the disk has no room.
    """
    target = recipe.target
    info = StoreInfo("random", "random", "random", target.hidden_size, target.aux_ids, target.vocab_size, dtype=dtype)
    names = [f"random-{number}" for number in range(count)]
    if not _holds(root, info, names):
        with StoreWriter(root, info, workers=min(os.cpu_count() or 1, MAX_WORKERS)) as writer:
            _fill(writer, [name for name in names if name not in writer.done_ids], document)
    store = Store(root)
    check_shape(store, document)
    return store


def _holds(root: Path, info: StoreInfo, names: list[str]) -> bool:
    if not (root / STORE_JSON).is_file():
        return False
    store = Store(root)
    return store.info == info and {entry.id for entry in store.entries} >= set(names)


def check_shape(store: Store, document: Document) -> None:
    """Raise ValueError unless every sample has the length and the trained spans of ``document``."""
    for entry in store.entries:
        if (entry.num_tokens, rg.normalize(entry.trained_spans)) != (document.num_tokens, document.trained_spans):
            raise ValueError(
                f"{store.root} holds a sample of {entry.num_tokens} tokens, {entry.num_trained} trained, where {document.num_tokens} with "
                f"{rg.count(document.trained_spans)} trained are timed; give another folder, or delete that one"
            )


def _fill(writer: StoreWriter, names: list[str], document: Document) -> None:
    info, size = writer.info, document.num_tokens
    width = (len(info.aux_layer_ids) + 1) * info.hidden_size
    num_bytes = len(names) * size * width * TORCH_DTYPES[info.dtype].itemsize
    _check_room(writer.root, num_bytes)
    logger.info("writing %d random samples of %d tokens (%.1f GB) into %s", len(names), size, num_bytes / 1e9, writer.root)
    started = time.perf_counter()
    states = _tiled(size, width, TORCH_DTYPES[info.dtype])
    aux, hidden = states[:, : -info.hidden_size], states[:, -info.hidden_size :]
    mask = np.zeros(size, dtype=np.uint8)
    mask[rg.rows(document.trained_spans)] = 1
    for name in names:
        ids = np.random.default_rng(len(writer.done_ids)).integers(0, info.vocab_size, (2, size), dtype=np.int32)
        labels = torch.from_numpy(ids[1]), torch.full((size,), 10.0)
        writer.add(Sample(name, torch.from_numpy(ids[0]), torch.from_numpy(mask), aux, hidden, *labels))
    seconds = time.perf_counter() - started
    logger.info("written in %.1f s, %.0f MB/s", seconds, num_bytes / 1e6 / seconds)


def _check_room(root: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(root).free
    if num_bytes > free:
        raise ValueError(
            f"random samples of this shape take up to {num_bytes / 1e9:.1f} GB, and {root} has {free / 1e9:.1f} GB free; "
            "give a folder on a larger disk, or fewer samples"
        )


def _tiled(num_rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """[num_rows, width]: a random block, repeated."""
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(min(BLOCK_ROWS, num_rows), width, generator=generator).to(dtype)
    return block.repeat(-(-num_rows // len(block)), 1)[:num_rows]
