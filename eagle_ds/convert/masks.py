"""Make loss masks for formats that have none: find the conversation with these tokens and use its mask.

The index keeps only a hash and a file offset (16 bytes) of each conversation, so it can be sent to every
worker even for millions of them. A match is encoded again and compared token for token. The number in a
file's name is not used: other projects shuffle and filter the conversations before they number them.
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
    """An index of a file of conversations by the tokens that each renders to."""

    path: Path  # JSONL: the file itself, or the temporary copy of another format
    tokenizer: Path
    max_length: int
    keys: np.ndarray = field(repr=False)  # uint64, ascending: hashes of the tokens
    offsets: np.ndarray = field(repr=False)  # int64, byte offsets of their lines

    @classmethod
    def index(cls, path: Path, tokenizer: Path, max_length: int, workers: int = 1) -> ConversationMasks:
        """Encode every conversation once.

        Raises ValueError for a malformed line or a file without any answer.
        """
        file = _file(path)
        lines = [(offset, file.line_numbers[offset]) for offset, _ in file.records()]
        batches = [lines[start : start + BATCH_LINES] for start in range(0, len(lines), BATCH_LINES)]
        encode = functools.partial(_hash_conversations, file.lines, tokenizer, max_length)
        if workers == 1 or len(batches) == 1:
            found = [pair for batch in batches for pair in encode(batch)]
        else:
            with ProcessPoolExecutor(workers, fork_server()) as pool:
                found = [pair for pairs in pool.map(encode, batches) for pair in pairs]
        if not found:
            advice = "give the file that the hidden states were captured from"
            raise ValueError(f"{path} has no conversation with an answer in it; {advice}")
        logger.info("%d of %d conversations in %s have a loss mask", len(found), len(lines), path)
        pairs = np.array(sorted(found), np.uint64)
        return cls(file.lines, tokenizer, max_length, pairs[:, 0].copy(), pairs[:, 1].astype(np.int64))

    def find(self, input_ids: np.ndarray) -> np.ndarray | None:
        """Return the loss mask, uint8 [S], of the conversation with exactly these tokens, else None."""
        key = np.uint64(_hash(input_ids))
        first, last = np.searchsorted(self.keys, key, "left"), np.searchsorted(self.keys, key, "right")
        # Equal hashes are neighbours in the sorted index; nearly always there is only one.
        for offset in self.offsets[first:last].tolist():
            record = _file(self.path).read(offset)
            encoded = _encoder(self.tokenizer, self.max_length).encode(record)
            if encoded is not None and np.array_equal(encoded.input_ids, input_ids):
                return encoded.loss_mask
        return None


def _hash(input_ids: np.ndarray) -> int:
    """Hash the tokens to 64 bits, converted to int32 first, so that int64 files give the same hash."""
    digest = hashlib.blake2b(input_ids.astype(np.int32).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _hash_conversations(
    path: Path, tokenizer: Path, max_length: int, lines: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Return (hash, byte offset) of the conversations that have a mask.

    ``lines`` are (byte offset, line number).
    """
    file, encoder, found = _file(path), _encoder(tokenizer, max_length), []
    for offset, number in lines:
        try:
            encoded = encoder.encode(file.read(offset))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        if encoded is not None:
            found.append((_hash(encoded.input_ids), offset))
    return found


@functools.cache
def _file(path: Path) -> ConversationFile:
    return ConversationFile(path)


@functools.cache
def _encoder(tokenizer: Path, max_length: int) -> ChatEncoder:
    return ChatEncoder(load_tokenizer(tokenizer), max_length)
