"""Loss masks for formats that have none: find the conversation whose rendering is these tokens, and take its mask.

Only a hash and a file offset per conversation are kept (16 bytes), so a dataset of millions travels to every worker; the
one conversation that matches is encoded again and compared token for token. The files' own numbering is not
trusted: peers shuffle and filter before they number.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from eagle_ds.data.chat import ChatEncoder, load_tokenizer
from eagle_ds.data.conversations import ConversationFile
from eagle_ds.store.processes import fork_server

logger = logging.getLogger(__name__)

BATCH_LINES = 256


@dataclass(frozen=True)
class ConversationMasks:
    """An index of a JSONL of conversations by the tokens they render to."""

    path: Path
    tokenizer: Path
    max_length: int
    keys: np.ndarray = field(repr=False)  # uint64, ascending
    offsets: np.ndarray = field(repr=False)  # int64, byte offset of the conversation's line

    @classmethod
    def index(cls, path: Path, tokenizer: Path, max_length: int, workers: int = 1) -> ConversationMasks:
        """Encode every conversation once. Raises ValueError for a malformed line or a file with nothing to train on."""
        file = ConversationFile(path)
        lines = [(offset, file.line_numbers[offset]) for offset, _ in file.records()]
        batches = [lines[start : start + BATCH_LINES] for start in range(0, len(lines), BATCH_LINES)]
        encode = functools.partial(_keys_of, path, tokenizer, max_length)
        if workers == 1 or len(batches) == 1:
            found = [pair for batch in batches for pair in encode(batch)]
        else:
            with ProcessPoolExecutor(workers, fork_server()) as pool:
                found = [pair for pairs in pool.map(encode, batches) for pair in pairs]
        if not found:
            raise ValueError(f"{path} has no conversation with an answer in it; give the one that the hidden states were captured from")
        logger.info("%d of %d conversations in %s have a loss mask", len(found), len(lines), path)
        pairs = np.array(sorted(found), np.uint64)
        return cls(path, tokenizer, max_length, pairs[:, 0].copy(), pairs[:, 1].astype(np.int64))

    def find(self, input_ids: np.ndarray) -> np.ndarray | None:
        """The loss mask, uint8 [S], of the conversation with exactly these tokens, else None."""
        key = np.uint64(_key(input_ids))
        first, last = np.searchsorted(self.keys, key, "left"), np.searchsorted(self.keys, key, "right")
        for offset in self.offsets[first:last].tolist():
            encoded = _encoder(self.tokenizer, self.max_length).encode(ConversationFile(self.path).read(offset))
            if encoded is not None and np.array_equal(encoded.input_ids, input_ids):
                return encoded.loss_mask
        return None


def _key(input_ids: np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(input_ids.astype(np.int32).tobytes(), digest_size=8).digest(), "little")


def _keys_of(path: Path, tokenizer: Path, max_length: int, lines: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(key, byte offset) of each conversation, given as (byte offset, line number), that has a mask."""
    file, encoder, found = ConversationFile(path), _encoder(tokenizer, max_length), []
    for offset, number in lines:
        try:
            encoded = encoder.encode(file.read(offset))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        if encoded is not None:
            found.append((_key(encoded.input_ids), offset))
    return found


@functools.cache
def _encoder(tokenizer: Path, max_length: int) -> ChatEncoder:
    return ChatEncoder(load_tokenizer(tokenizer), max_length)
