"""What a store is about (``store.json``) and what is in it (``manifest.jsonl``, one line a sample).

Both carry a crc32 of their own content, so that a flipped bit is an error and never another length or another mask. The
manifest only grows: a sample is in the store when its line, newline included, is on disk. A line of an id seen before
replaces the earlier one (the sample was written again). A last line without newline was torn by a crash: readers skip
it, the next writer cuts it off.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zlib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from eagle_ds.store.codec import ENCODER

logger = logging.getLogger(__name__)

STORE_JSON = "store.json"
MANIFEST_NAME = "manifest.jsonl"


class StoreError(ValueError):
    """The stored data is missing, damaged or not what was expected; the message names the file and the rows."""


@dataclass(frozen=True)
class StoreInfo:
    """What holds for every sample of a store."""

    target: str
    target_hash: str
    tokenizer_hash: str
    hidden_size: int  # H
    aux_layer_ids: tuple[int, ...]  # as outputs of layers, 0-based
    vocab_size: int  # input_ids and target_token_id stay below it
    encoder: str = field(default=ENCODER, compare=False)
    dtype: str = "bfloat16"  # of the hidden states: bfloat16, float16 or float32, stored as they came
    head_size: int = 0  # rows of the target's lm_head; 0: as many as vocab_size

    def __post_init__(self) -> None:
        object.__setattr__(self, "aux_layer_ids", tuple(self.aux_layer_ids))
        object.__setattr__(self, "head_size", self.head_size or self.vocab_size)
        if self.dtype not in ("bfloat16", "float16", "float32"):
            raise ValueError(f"dtype is {self.dtype!r}, a store holds bfloat16, float16 or float32")
        if min(self.hidden_size, self.vocab_size, len(self.aux_layer_ids)) < 1:
            raise ValueError("hidden_size and vocab_size must be at least 1, and aux_layer_ids must name a layer")


@dataclass(frozen=True)
class SampleEntry:
    """A line of the manifest: enough to plan an epoch without opening a file."""

    id: str
    path: str  # relative to the store
    num_tokens: int  # S
    num_trained: int
    trained_spans: tuple[tuple[int, int], ...]  # [start, end) of each run of trained tokens
    bytes: int  # size of the file


def trained_spans(loss_mask: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Runs of ones in uint8 [S], as [start, end)."""
    edges = np.flatnonzero(np.diff(loss_mask.astype(np.int8), prepend=0, append=0))
    return tuple(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def sample_path(sample_id: str) -> str:
    """Where a sample lies: 256 subfolders by hash, so that no folder grows to a million files."""
    digest = hashlib.sha256(sample_id.encode()).hexdigest()
    return f"samples/{digest[:2]}/{digest[2:34]}.h5"


def write_store_info(root: Path, info: StoreInfo) -> None:
    """Atomically: a store whose ``store.json`` exists has a whole one."""
    temporary = root / f"{STORE_JSON}.tmp"
    with temporary.open("w") as file:
        json.dump(_sealed(asdict(info)), file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(root / STORE_JSON)
    sync_folder(root)


def read_store_info(root: Path) -> StoreInfo:
    path = root / STORE_JSON
    try:
        record = _unsealed(json.loads(path.read_bytes()))
        record["aux_layer_ids"] = tuple(record["aux_layer_ids"])
        return StoreInfo(**record)
    except FileNotFoundError as error:
        raise StoreError(f"{root} is not a hidden-state store: it has no {STORE_JSON}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise StoreError(f"{path} is damaged ({error})") from error


def manifest_line(entry: SampleEntry) -> bytes:
    return json.dumps(_sealed(asdict(entry)), ensure_ascii=False).encode() + b"\n"


def read_manifest(root: Path) -> tuple[list[SampleEntry], bytes]:
    """Entries in order of their first line, and the bytes of all whole lines."""
    path = root / MANIFEST_NAME
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        logger.warning("%s ends in a line torn by a crash or still being written; it is ignored", path)
    entries: dict[str, SampleEntry] = {}
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            record = _unsealed(json.loads(line))
            record["trained_spans"] = tuple((start, end) for start, end in record["trained_spans"])
            entry = SampleEntry(**record)
        except (ValueError, TypeError, KeyError) as error:
            raise StoreError(f"{path} line {number} is damaged ({error}); remove the line and write that sample again") from error
        entries[entry.id] = entry
    return list(entries.values()), whole


def manifest_hash(root: Path, manifest: bytes) -> str:
    """One number for the facts and the list of samples: equal on two ranks when they see the same store."""
    return hashlib.sha256((root / STORE_JSON).read_bytes() + manifest).hexdigest()


def differing_facts(ours: StoreInfo, theirs: StoreInfo) -> list[str]:
    """Human-readable differences, one a fact."""
    compared = [f.name for f in fields(StoreInfo) if f.compare]
    return [
        f"{name} is {getattr(theirs, name)!r} there, {getattr(ours, name)!r} here"
        for name in compared
        if getattr(ours, name) != getattr(theirs, name)
    ]


def check_same_store(root: Path, info: StoreInfo) -> None:
    """Raise ValueError, naming the differences, if the store at ``root`` was made with other facts."""
    if differences := differing_facts(info, read_store_info(root)):
        raise ValueError(f"the store {root} was made with other facts: {'; '.join(differences)}; choose another folder")


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sealed(record: dict[str, Any]) -> dict[str, Any]:
    return {**record, "crc32": _crc32(record)}


def _unsealed(record: dict[str, Any]) -> dict[str, Any]:
    """The record without its seal. A hand-made record may lack one; a broken one is an error."""
    if not isinstance(record, dict):
        raise ValueError("it is not a JSON object")
    seal = record.pop("crc32", None)
    if seal is not None and seal != _crc32(record):
        raise ValueError("its crc32 does not match")
    return record


def _crc32(record: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())
