"""Conversation files: JSONL in, encoded samples out, with the line named in every complaint."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eagle_ds.data.chat import ChatEncoder, Encoded, EncodeStats, record_id

log = logging.getLogger(__name__)


@dataclass
class ConversationFile:
    """A JSONL file of records, read line by line: only byte offsets stay in memory."""

    path: Path
    line_numbers: dict[int, int] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.path = Path(self.path)
        if not self.path.is_file():
            raise ValueError(f"conversation file {self.path} does not exist; give a JSONL file of conversations")

    def records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(byte offset, record) of every line that is not blank."""
        offset = 0
        with open(self.path, "rb") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    self.line_numbers[offset] = number
                    yield offset, self._parse(line, number)
                offset += len(line)

    def read(self, offset: int) -> dict[str, Any]:
        """The record at a byte offset."""
        with open(self.path, "rb") as stream:
            stream.seek(offset)
            return self._parse(stream.readline(), self.line_numbers.get(offset, 0))

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{self.path}, line {number}: not valid JSON ({error})") from error
        if not isinstance(record, dict):
            raise ValueError(f"{self.path}, line {number}: expected a JSON object, found {type(record).__name__}")
        return record

    def encode(self, encoder: ChatEncoder) -> Iterator[tuple[int, Encoded]]:
        """(byte offset, sample) of every record that is not skipped. A repeated id is an error unless its text repeats too."""
        seen: dict[str, bytes] = {}
        for offset, record in self.records():
            where = f"{self.path}, line {self.line_numbers[offset]}"
            name, digest = record_id(record), hashlib.sha256(json.dumps(record, sort_keys=True).encode()).digest()
            if name in seen:
                if seen[name] != digest:
                    raise ValueError(f"{where}: id {name} was used above for another conversation; ids must be unique")
                encoder.stats.duplicates += 1
                continue
            seen[name] = digest
            try:
                encoded = encoder.encode(record)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            if encoded is not None:
                yield offset, encoded


def encode_conversations(path: str | Path, encoder: ChatEncoder) -> Iterator[Encoded]:
    """Samples of a JSONL file in its order. Raises ValueError if every line is skipped."""
    for _, encoded in ConversationFile(Path(path)).encode(encoder):
        yield encoded
    require_samples(path, encoder.stats)


def require_samples(path: str | Path, stats: EncodeStats) -> None:
    """Log the counts; ValueError where nothing is left to capture."""
    if stats.samples == 0:
        mend = "; raise max_length" if stats.untrained or stats.overlong else ""
        raise ValueError(f"{path} has nothing to train on: {stats}{mend}")
    log.info("%s: %s", path, stats)
