"""Read JSONL files of conversations and encode each line to a sample. Errors name the file and the line."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eagle_ds.data.chat import ChatEncoder, EncodedSample, EncodeStats, record_id

logger = logging.getLogger(__name__)


@dataclass
class ConversationFile:
    """A JSONL file of records. It is read line by line; only the byte offsets of lines are kept in memory."""

    path: Path
    line_numbers: dict[int, int] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.path = Path(self.path)
        if not self.path.is_file():
            raise ValueError(f"conversation file {self.path} does not exist; give a JSONL file")

    def records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (byte offset, record) for every line that is not blank."""
        offset = 0
        with open(self.path, "rb") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    self.line_numbers[offset] = number
                    yield offset, self._parse(line, number)
                offset += len(line)

    def read(self, offset: int) -> dict[str, Any]:
        """Return the record at a byte offset that `records` gave."""
        with open(self.path, "rb") as stream:
            stream.seek(offset)
            return self._parse(stream.readline(), self.line_numbers.get(offset, 0))

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{self.path}, line {number}: not valid JSON ({error})") from error
        if not isinstance(record, dict):
            found = type(record).__name__
            raise ValueError(f"{self.path}, line {number}: expected a JSON object, found {found}")
        return record

    def encode(self, encoder: ChatEncoder) -> Iterator[tuple[int, EncodedSample]]:
        """Yield (byte offset, sample) for every record that is not skipped.

        A line that repeats an earlier one is skipped and counted. Raises ValueError, naming the line, for a
        malformed line and for one that repeats the id of another conversation.
        """
        seen: dict[str, bytes] = {}
        for offset, record in self.records():
            where = f"{self.path}, line {self.line_numbers[offset]}"
            name = record_id(record)
            digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).digest()
            if name in seen:
                if seen[name] != digest:
                    problem = f"id {name} was used above for another conversation"
                    raise ValueError(f"{where}: {problem}; ids must be unique")
                encoder.stats.duplicates += 1
                continue
            seen[name] = digest
            try:
                encoded = encoder.encode(record)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            if encoded is not None:
                yield offset, encoded


def require_samples(path: str | Path, stats: EncodeStats) -> None:
    """Log the counts of an encoded file. Raises ValueError if it gave no sample."""
    if stats.samples == 0:
        fix = "; raise max_length" if stats.untrained or stats.overlong else ""
        raise ValueError(f"{path} has nothing to train on: {stats}{fix}")
    logger.info("%s: %s", path, stats)
