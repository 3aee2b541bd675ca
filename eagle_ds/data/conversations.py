"""Read files of conversations and encode each record to a sample. A record that cannot be used is rejected.

A rejected record does not stop the others: `Intake` counts it by reason, and keeps its line, id and reason
for a file. Under ``strict``, the first one is an error.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from eagle_ds.data.chat import ChatEncoder, EncodedSample, EncodeStats
from eagle_ds.data.shapes import BadRecord, content_hash, record_id
from eagle_ds.data.sources import as_jsonl

logger = logging.getLogger(__name__)

REJECTED_NAME = "rejected.jsonl"
REJECTED_CONVERSATIONS = "rejected_conversations.jsonl"  # in folders where other things are rejected, too


@dataclass(frozen=True)
class Rejected:
    """A record that cannot be used. ``line`` counts from 1; in a table or a JSON array it counts records."""

    line: int
    id: str | None
    reason: str  # a few words, the same for every record with this kind of problem
    detail: str


@dataclass
class Intake:
    """What happens to records that cannot be used, and which records those were.

    Args:
        strict: the first record that cannot be used raises ValueError, instead of being rejected.
        duplicates: a record with an earlier record's id but other content is rejected, or its id gets a
            suffix (-2, -3, ...).
    """

    strict: bool = True
    duplicates: Literal["reject", "suffix"] = "reject"
    rejected: list[Rejected] = field(default_factory=list, repr=False)
    reasons: Counter[str] = field(default_factory=Counter)
    repeated: int = 0  # records with the id and the content of an earlier one: skipped
    renamed: int = 0  # records whose id got a suffix

    def reject(self, file: ConversationFile, line: int, name: str | None, error: BadRecord) -> None:
        """Note a record that cannot be used; log the first of each reason. Raises ValueError if strict."""
        where = f"{file.path}, {file.unit} {line}"
        if self.strict:
            raise ValueError(f"{where}: {error}") from error
        if error.reason not in self.reasons:
            logger.warning("%s is rejected: %s", where, error)
        self.reasons[error.reason] += 1
        self.rejected.append(Rejected(line, name, error.reason, str(error)))

    def __str__(self) -> str:
        parts = [f"{self.renamed} with a suffix to the id"] if self.renamed else []
        if self.rejected:
            counts = ", ".join(f"{reason}: {count}" for reason, count in self.reasons.most_common())
            parts.append(f"{len(self.rejected)} rejected ({counts})")
        return "; ".join(parts)

    def write(self, path: Path) -> None:
        """List the rejected records in the JSONL file ``path``. Without any, remove an earlier list."""
        if not self.rejected:
            path.unlink(missing_ok=True)
            return
        lines = [json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in self.rejected]
        path.write_text("".join(lines), encoding="utf-8")
        logger.warning("%d rejected records are listed in %s", len(self.rejected), path)


@dataclass
class ConversationFile:
    """A file of records in any format of data/sources.py, or a data set on the Hugging Face hub.

    It is read one record at a time; only the byte offsets of records are kept in memory.
    """

    path: Path
    line_numbers: dict[int, int] = field(default_factory=dict, repr=False)
    lines: Path = field(init=False, repr=False)  # JSONL: ``path`` itself, or a temporary copy
    unit: str = field(init=False, repr=False)  # what line numbers count: line or record

    def __post_init__(self) -> None:
        self.path = Path(self.path)
        self.lines, self.unit = as_jsonl(self.path)

    def records(self, intake: Intake | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (byte offset, record) for every line that is not blank. Without ``intake``, it is strict."""
        intake, offset, number = intake or Intake(), 0, 0
        with open(self.lines, "rb") as stream:
            for line in stream:  # enumerate would keep a reference to the line
                number, start, offset = number + 1, offset, offset + len(line)
                if not line.strip():
                    continue
                self.line_numbers[start] = number
                # A line may be long, so neither its bytes nor its record are kept here while it is used.
                try:
                    text = _decoded(line)
                    del line
                    parsed = [_parse(text)]
                except BadRecord as error:
                    intake.reject(self, number, None, error)
                    continue
                del text
                yield start, parsed.pop()

    def count(self) -> int:
        """Count the lines that are not blank."""
        with open(self.lines, "rb") as stream:
            return sum(bool(line.strip()) for line in stream)

    def read(self, offset: int) -> dict[str, Any]:
        """Return the record at a byte offset that `records` gave."""
        with open(self.lines, "rb") as stream:
            stream.seek(offset)
            return _parse(_decoded(stream.readline()))

    def unique_records(self, intake: Intake) -> Iterator[tuple[int, str, dict[str, Any]]]:
        """Yield (byte offset, id, record), every id once, as `unique_ids` does."""
        for offset, name in self.unique_ids(intake):
            yield offset, name, self.read(offset)

    def unique_ids(self, intake: Intake) -> Iterator[tuple[int, str]]:
        """Yield (byte offset, id) of every record, every id once. Keeps no record in memory.

        A record that repeats an earlier one is skipped and counted. One that has only its id is rejected or
        gets a suffix, as ``intake`` says.
        """
        seen: dict[str, str] = {}  # the hash of each id's content
        for offset, record in self.records(intake):
            number = self.line_numbers[offset]
            try:
                name, digest = record_id(record), content_hash(record)
            except BadRecord as error:
                intake.reject(self, number, None, error)
                continue
            del record
            names = (f"{name}-{n}" if n > 1 else name for n in itertools.count(1))
            free = next(one for one in names if seen.get(one, digest) == digest)
            if free in seen:
                intake.repeated += 1
                continue
            if free != name and intake.duplicates == "reject":
                problem = (
                    f"id {name} was used above for another conversation; make ids unique, or set duplicates "
                    "to suffix")
                intake.reject(self, number, name, BadRecord("id used above", problem))
                continue
            seen[free] = digest
            intake.renamed += free != name
            yield offset, free

    def encode(
        self, encoder: ChatEncoder, intake: Intake | None = None
    ) -> Iterator[tuple[int, EncodedSample]]:
        """Yield (byte offset, sample) for every record that is neither skipped nor rejected.

        Without ``intake``, the first record that cannot be used raises ValueError, naming the line.
        """
        intake = intake or Intake()
        try:
            for offset, name in self.unique_ids(intake):
                try:
                    # Reading the line a second time is cheap, and leaves the record to the encoder alone.
                    encoded = encoder.encode(self.read(offset), name)
                except BadRecord as error:
                    intake.reject(self, self.line_numbers[offset], name, error)
                    continue
                if encoded is not None:
                    yield offset, encoded
        finally:
            encoder.stats.duplicates = intake.repeated


def _decoded(line: bytes) -> str:
    try:
        return line.decode(json.detect_encoding(line), "surrogatepass")
    except ValueError as error:
        raise BadRecord("not JSON", f"not valid JSON ({error})") from error


def _parse(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadRecord("not JSON", f"not valid JSON ({error})") from error
    if not isinstance(record, dict):
        raise BadRecord("not JSON", f"expected a JSON object, found {type(record).__name__}")
    return record


def require_samples(path: str | Path, stats: EncodeStats, intake: Intake | None = None) -> None:
    """Log the counts of an encoded file. Raises ValueError if it gave no sample."""
    told = "; ".join(filter(None, (str(stats), str(intake or ""))))
    if stats.samples == 0:
        fix = "; raise max_length" if stats.untrained or stats.overlong else ""
        if intake and intake.rejected:
            first = intake.rejected[0]
            fix += f"; the first rejected one is {first.line}: {first.detail}"
        raise ValueError(f"{path} has nothing to train on: {told}{fix}")
    logger.info("%s: %s", path, told)
