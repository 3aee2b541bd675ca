"""Loss masks for formats that have none: find the conversation whose rendering is these tokens, and take its mask.

Only a hash and a file offset per conversation are kept (16 bytes), so a dataset of millions travels to every worker; the
one conversation that matches is encoded again and compared token for token. The files' own numbering is not
trusted: peers shuffle and filter before they number.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from eagle_ds.data.chat import ChatEncoder, load_tokenizer
from eagle_ds.data.conversations import ConversationFile, require_samples

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ConversationMasks:
    """An index of a JSONL of conversations by the tokens they render to."""

    path: Path
    tokenizer: Path
    max_length: int
    keys: np.ndarray = field(repr=False)  # uint64, ascending
    offsets: np.ndarray = field(repr=False)  # int64, byte offset of the conversation's line

    @classmethod
    def index(cls, path: Path, tokenizer: Path, max_length: int, progress: Callable[[int], None] | None = None) -> ConversationMasks:
        """Encode every conversation once. Raises ValueError for a malformed line or a file with nothing to train on."""
        encoder = _encoder(tokenizer, max_length)
        keys, offsets = [], []
        for offset, encoded in ConversationFile(path).encode(encoder):
            keys.append(_key(encoded.input_ids))
            offsets.append(offset)
            if progress is not None:
                progress(len(keys))
        require_samples(path, encoder.stats)
        order = np.argsort(np.array(keys, np.uint64), kind="stable")
        return cls(path, tokenizer, max_length, np.array(keys, np.uint64)[order], np.array(offsets, np.int64)[order])

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


@functools.cache
def _encoder(tokenizer: Path, max_length: int) -> ChatEncoder:
    return ChatEncoder(load_tokenizer(tokenizer), max_length)
