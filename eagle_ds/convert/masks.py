"""Make loss masks for formats that have none: find the conversation with these tokens and use its mask.

The index keeps only a hash and a file offset (16 bytes) of each conversation, so it can be sent to every
worker even for millions of them. A match is encoded again and compared token for token. The number in a
file's name is not used: other projects shuffle and filter the conversations before they number them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from eagle_ds.data.chat import ChatEncoder, load_tokenizer
from eagle_ds.data.conversations import ConversationFile, Intake
from eagle_ds.data.shapes import BadRecord, content_hash
from eagle_ds.store.processes import fork_server

logger = logging.getLogger(__name__)

BATCH_LINES = 256


@dataclass(frozen=True)
class ConversationMasks:
    """An index of a file of conversations by the tokens that each renders to."""

    path: Path  # JSONL: the file itself, or the temporary copy of another format
    tokenizer: Path
    max_length: int
    template_kwargs: str  # variables of the chat template, as JSON
    keys: np.ndarray = field(repr=False)  # uint64, ascending: hashes of the tokens
    offsets: np.ndarray = field(repr=False)  # int64, byte offsets of their lines

    @classmethod
    def index(
        cls, path: Path, tokenizer: Path, max_length: int, workers: int = 1, intake: Intake | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> ConversationMasks:
        """Encode every conversation once.

        Args:
            max_length: the length in tokens to which the capture truncated.
            intake: takes note of the lines that cannot be used; None: the first one raises ValueError.
            template_kwargs: variables of the chat template.

        Raises ValueError for a file without any answer.
        """
        file, intake, kwargs = _file(path), intake or Intake(), json.dumps(dict(template_kwargs or {}))
        offsets = [offset for offset, _ in file.records(intake)]
        batches = [offsets[start : start + BATCH_LINES] for start in range(0, len(offsets), BATCH_LINES)]
        encode = functools.partial(_hash_conversations, file.lines, tokenizer, max_length, kwargs)
        found: list[tuple[int, int]] = []
        with contextlib.ExitStack() as stack:
            encoded: Iterable[_Hashed] = map(encode, batches)
            if workers > 1 and len(batches) > 1:
                pool = stack.enter_context(ProcessPoolExecutor(workers, fork_server()))
                encoded = pool.map(encode, batches)
            for hashed in encoded:
                found += hashed.pairs
                for offset, name, reason, detail in hashed.bad:
                    intake.reject(file, file.line_numbers[offset], name, BadRecord(reason, detail))
        if not found:
            told = f" ({intake})" if intake.rejected else ""
            advice = "give the file that the hidden states were captured from"
            raise ValueError(f"{path} has no conversation with an answer in it{told}; {advice}")
        logger.info("%d of %d conversations in %s have a loss mask", len(found), len(offsets), path)
        pairs = np.array(sorted(found), np.uint64)
        keys, starts = pairs[:, 0].copy(), pairs[:, 1].astype(np.int64)
        return cls(file.lines, tokenizer, max_length, kwargs, keys, starts)

    def find(self, input_ids: np.ndarray) -> np.ndarray | None:
        """Return the loss mask, uint8 [S], of the conversation with exactly these tokens, else None."""
        key = np.uint64(_hash(input_ids))
        first, last = np.searchsorted(self.keys, key, "left"), np.searchsorted(self.keys, key, "right")
        # Equal hashes are neighbours in the sorted index; nearly always there is only one.
        for offset in self.offsets[first:last].tolist():
            record = _file(self.path).read(offset)
            encoded = _encoder(self.tokenizer, self.max_length, self.template_kwargs).encode(record)
            if encoded is not None and np.array_equal(encoded.input_ids, input_ids):
                return encoded.loss_mask
        return None


def _hash(input_ids: np.ndarray) -> int:
    """Hash the tokens to 64 bits, converted to int32 first, so that int64 files give the same hash."""
    digest = hashlib.blake2b(input_ids.astype(np.int32).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


@dataclass
class _Hashed:
    """The conversations of a batch: (hash, byte offset) of those with a mask, and those that are bad."""

    pairs: list[tuple[int, int]] = field(default_factory=list)
    bad: list[tuple[int, str | None, str, str]] = field(default_factory=list)  # offset, id, reason, detail


def _hash_conversations(
    path: Path, tokenizer: Path, max_length: int, template_kwargs: str, offsets: list[int]
) -> _Hashed:
    """Encode the conversations at these byte offsets and hash their tokens."""
    file, encoder, found = _file(path), _encoder(tokenizer, max_length, template_kwargs), _Hashed()
    for offset in offsets:
        record = file.read(offset)
        try:
            encoded = encoder.encode(record, content_hash(record))
        except BadRecord as error:
            name = None if record.get("id") is None else str(record["id"])
            found.bad.append((offset, name, error.reason, str(error)))
            continue
        if encoded is not None:
            found.pairs.append((_hash(encoded.input_ids), offset))
    return found


@functools.cache
def _file(path: Path) -> ConversationFile:
    return ConversationFile(path)


@functools.cache
def _encoder(tokenizer: Path, max_length: int, template_kwargs: str) -> ChatEncoder:
    variables = json.loads(template_kwargs)
    return ChatEncoder(load_tokenizer(tokenizer), max_length, template_kwargs=variables)
