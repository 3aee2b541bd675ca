"""Describe a store: ``store.json`` (what holds for all samples) and ``manifest.jsonl`` (one line per sample).

Both carry a crc32 of their own content, so a flipped bit is reported as an error and never read as another
length or mask.

The manifest only grows. A sample is in the store once its line, newline included, is on disk. A sample that
is written again gets a new line, which replaces the earlier line of the same id. A last line without a
newline was interrupted by a crash: readers skip it, and the next writer removes it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from eagle_ds.store.codec import ENCODER
from eagle_ds.target.identity import target_hash, tokenizer_hash
from eagle_ds.target.info import TargetInfo, check_aux_ids

logger = logging.getLogger(__name__)

STORE_JSON = "store.json"
MANIFEST_NAME = "manifest.jsonl"


class StoreError(ValueError):
    """Stored data is missing, damaged or not what was expected. The message names the file and the rows."""


@dataclass(frozen=True)
class StoreInfo:
    """What holds for every sample of a store: the content of store.json."""

    target: str
    target_hash: str
    tokenizer_hash: str
    hidden_size: int  # H
    aux_layer_ids: tuple[int, ...]  # numbered as layer outputs, from 0
    vocab_size: int  # upper limit of input_ids and target_token_id
    encoder: str = field(default=ENCODER, compare=False)
    dtype: str = "bfloat16"  # of the hidden states, stored as captured: bfloat16, float16 or float32
    head_size: int = 0  # rows of the target's lm_head; 0 means vocab_size
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # variables of the chat template

    def __post_init__(self) -> None:
        object.__setattr__(self, "aux_layer_ids", tuple(self.aux_layer_ids))
        object.__setattr__(self, "head_size", self.head_size or self.vocab_size)
        if self.dtype not in ("bfloat16", "float16", "float32"):
            raise ValueError(f"dtype is {self.dtype!r}, a store holds bfloat16, float16 or float32")
        if min(self.hidden_size, self.vocab_size, len(self.aux_layer_ids)) < 1:
            raise ValueError("hidden_size and vocab_size must be at least 1, aux_layer_ids must name a layer")

    @classmethod
    def of_target(
        cls, folder: Path, name: str, dtype: str, aux_layer_ids: Sequence[int] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> StoreInfo:
        """Describe the store of the target in ``folder``. Without weights there, ``target_hash`` is empty.

        Args:
            name: the target as the user named it.
            dtype: of the stored hidden states.
            aux_layer_ids: None takes the target's default layers.
            template_kwargs: variables with which the chat template renders the conversations.

        Raises:
            ValueError: the target has no such layers.
        """
        target = TargetInfo.from_folder(folder)
        aux_layer_ids = tuple(aux_layer_ids or target.aux_ids)
        check_aux_ids(aux_layer_ids, target.num_layers)
        return cls(
            target=name, target_hash=target_hash(folder) if any(folder.glob("*.safetensors")) else "",
            tokenizer_hash=tokenizer_hash(folder), hidden_size=target.hidden_size,
            aux_layer_ids=aux_layer_ids, vocab_size=target.vocab_size, dtype=dtype,
            template_kwargs=dict(template_kwargs or {}))


@dataclass(frozen=True)
class SampleEntry:
    """One line of the manifest: all that packing and sampling need, so no HDF5 file has to be opened."""

    id: str
    path: str  # relative to the store
    num_tokens: int  # S
    num_trained: int
    trained_spans: tuple[tuple[int, int], ...]  # [start, end) of each run of trained tokens
    bytes: int  # size of the file


def trained_spans(loss_mask: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Return the runs of ones in ``loss_mask`` (uint8 [S]) as [start, end)."""
    # +1 where a run starts and -1 one past its end; the zeros added at both ends close runs at the borders.
    edges = np.flatnonzero(np.diff(loss_mask.astype(np.int8), prepend=0, append=0))
    return tuple(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def sample_path(sample_id: str) -> str:
    """Return the path of a sample: 256 subfolders by hash, because folders with a million files are slow."""
    digest = hashlib.sha256(sample_id.encode()).hexdigest()
    return f"samples/{digest[:2]}/{digest[2:34]}.h5"


def write_store_info(root: Path, info: StoreInfo) -> None:
    """Write store.json atomically, so a store has either a complete one or none."""
    temporary = root / f"{STORE_JSON}.tmp"
    record = asdict(info)
    if not info.template_kwargs:  # versions before this key read the store, too
        del record["template_kwargs"]
    with temporary.open("w") as file:
        json.dump(_with_crc32(record), file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(root / STORE_JSON)
    sync_folder(root)


def read_store_info(root: Path) -> StoreInfo:
    """Read and check store.json. Raises StoreError if it is missing or damaged."""
    path = root / STORE_JSON
    try:
        return StoreInfo(**_checked(json.loads(path.read_bytes())))
    except FileNotFoundError as error:
        found = f"{root} is not a hidden-state store: it has no {STORE_JSON}"
        raise StoreError(f"{found}; give the folder that contains it") from error
    except (ValueError, TypeError, KeyError) as error:
        raise StoreError(f"{path} is damaged ({error}); write the store again") from error


def manifest_line(entry: SampleEntry) -> bytes:
    """Return the line of a sample, with its crc32 and the newline that makes it valid."""
    return json.dumps(_with_crc32(asdict(entry)), ensure_ascii=False).encode() + b"\n"


def read_manifest(root: Path) -> tuple[list[SampleEntry], bytes]:
    """Read the manifest.

    Returns:
        The entries, ordered by the first line of each id, and the bytes of all complete lines.

    Raises:
        StoreError: a line is damaged.
    """
    path = root / MANIFEST_NAME
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        logger.warning("%s ends in an incomplete line (crash, or writer at work); it is ignored", path)
    entries: dict[str, SampleEntry] = {}
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            record = _checked(json.loads(line))
            record["trained_spans"] = tuple((start, end) for start, end in record["trained_spans"])
            entry = SampleEntry(**record)
        except (ValueError, TypeError, KeyError) as error:
            fix = "remove the line and write that sample again"
            raise StoreError(f"{path} line {number} is damaged ({error}); {fix}") from error
        entries[entry.id] = entry
    return list(entries.values()), whole


def whole_entries(root: Path, entries: Iterable[SampleEntry]) -> dict[str, SampleEntry]:
    """Return the entries whose file is there and has its full size, by id. The others must be written again.
    """
    paths = [(root / entry.path, entry) for entry in entries]
    return {entry.id: entry for path, entry in paths if path.exists() and path.stat().st_size == entry.bytes}


def manifest_hash(root: Path, manifest: bytes) -> str:
    """Hash store.json and the manifest. Ranks compare this hash to check that they see the same store."""
    return hashlib.sha256((root / STORE_JSON).read_bytes() + manifest).hexdigest()


def check_same_store(root: Path, info: StoreInfo) -> None:
    """Raise ValueError if the store at ``root`` differs from ``info``; the message lists each difference."""
    there = read_store_info(root)
    differences = []
    for name in [f.name for f in fields(StoreInfo) if f.compare]:
        if getattr(info, name) != getattr(there, name):
            differences.append(f"{name} is {getattr(there, name)!r} there, {getattr(info, name)!r} here")
    if differences:
        listed = "; ".join(differences)
        raise ValueError(f"the store {root} was made from other data: {listed}; choose another folder")


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, so that a rename in it survives a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _with_crc32(record: dict[str, Any]) -> dict[str, Any]:
    return {**record, "crc32": _crc32(record)}


def _checked(record: dict[str, Any]) -> dict[str, Any]:
    """Return the record without its crc32, after checking it. A record made by hand may have none."""
    if not isinstance(record, dict):
        raise ValueError("it is not a JSON object")
    crc32 = record.pop("crc32", None)
    if crc32 is not None and crc32 != _crc32(record):
        raise ValueError("its crc32 does not match")
    return record


def _crc32(record: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())
