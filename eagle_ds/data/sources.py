"""Read records from a JSONL file, a JSON array, gzip, zstd, Parquet, or a Hugging Face data set.

Conversations are read more than once and in another order (the longest first), so every other format is first
copied to a temporary JSONL file, one record at a time. A plain JSONL file is read in place.
"""

from __future__ import annotations

import atexit
import contextlib
import gzip
import importlib
import json
import os
import re
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from eagle_ds.data.shapes import FIELDS

GZIP, ZSTD, PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"  # the first bytes of a file
ARRAY = re.compile(rb"(\xef\xbb\xbf)?\s*\[\s*([\]{]|$)")
DATASET_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(:.+)?")
FILE_ENDINGS = (".jsonl", ".json", ".gz", ".zst", ".parquet", ".txt", ".ndjson")
OUTSIDE, IN_STRING = re.compile(rb'["\[\]{},\n\r]'), re.compile(rb'["\\\n\r]')  # marks in JSON
DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile)  # in gzip
BLOCK_BYTES = 1 << 20
ROWS = 64  # of a Parquet file that are in memory at once


def as_jsonl(source: Path) -> tuple[Path, str]:
    """Return a JSONL file with the records of ``source``, and what its lines were there: line or record.

    Raises:
        ValueError: the source does not exist, is damaged, or needs a package that is not installed.
    """
    if not source.is_file():
        return _spool(_dataset_rows(_dataset_id(source))), "record"
    with source.open("rb") as stream:
        start = stream.read(4)
    with _damage_as_one_sentence(source):
        if start == PARQUET:
            return _spool(_parquet_rows(source)), "record"
        blocks = _decompressed(source, start)
        first = next(blocks, b"")
        if ARRAY.match(first):
            return _spool(array_elements(chain([first], blocks))), "record"
        if start.startswith((GZIP, ZSTD)):
            return _spool(chain([first], blocks)), "line"
    return source, "line"


@contextlib.contextmanager
def _damage_as_one_sentence(source: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        library = type(error).__module__.partition(".")[0]
        if isinstance(error, DAMAGE) or library in ("zstd", "zstandard", "pyarrow"):
            found = f"{source} is truncated or damaged ({error})"
            raise ValueError(f"{found}; fetch it again, or write it again") from error
        raise


def _decompressed(path: Path, start: bytes) -> Iterator[bytes]:
    """Yield blocks of a file whose first bytes are ``start``. Raises one of DAMAGE, or an error of zstd."""
    with gzip.open(path, "rb") if start.startswith(GZIP) else path.open("rb") as stream:
        blocks = iter(lambda: stream.read(BLOCK_BYTES), b"")
        if start != ZSTD:
            yield from blocks
            return
        new = _optional("zstandard", path).ZstdDecompressor(max_window_size=1 << 31).decompressobj
        frame = new()
        for block in blocks:
            while block:
                if frame.eof:
                    frame = new()
                if text := frame.decompress(block):
                    yield text
                block = frame.unused_data
        if not frame.eof:
            raise EOFError("the last zstd frame has no end")


def _spool(blocks: Iterator[bytes]) -> Path:
    """Write the blocks to a temporary file, which is deleted when this process ends."""
    with tempfile.NamedTemporaryFile(prefix="conversations-", suffix=".jsonl", delete=False) as file:
        atexit.register(_delete, file.name, os.getpid())
        for block in blocks:
            file.write(block)
    return Path(file.name)


def _delete(name: str, owner: int) -> None:
    if os.getpid() == owner:  # a forked process has the same exit handlers
        with contextlib.suppress(OSError):
            os.unlink(name)


def array_elements(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield each element of a JSON array as a line. Only one element is in memory at a time.

    Brackets outside strings tell where an element ends. Parsing checks whether it is valid JSON.
    """
    element, depth, quoted, escaped = bytearray(), 0, False, False
    for block in blocks:
        position = 0
        while position < len(block):
            if escaped:  # the character after a backslash
                element += block[position : position + 1]
                position, escaped = position + 1, False
                continue
            found = (IN_STRING if quoted else OUTSIDE).search(block, position)
            end = found.start() if found else len(block)
            element += block[position:end] if depth else b""
            position, mark = end + 1, found.group() if found else b""
            quoted ^= mark == b'"'
            escaped = mark == b"\\"
            depth += mark in (b"[", b"{")
            depth -= mark in (b"]", b"}")
            if mark in (b"\n", b"\r"):  # a line break in a string is an error in JSON, and stays one
                element += b"\0" if quoted else b" "
            elif depth == 0 or (depth == 1 and mark == b","):
                yield from _as_line(element)
                element.clear()
            elif depth > 1 or mark != b"[":
                element += mark
    yield from _as_line(element)  # of an array that lacks its end


def _as_line(element: bytearray) -> Iterator[bytes]:
    if element := element.strip():
        yield bytes(element) + b"\n"


def _parquet_rows(path: Path) -> Iterator[bytes]:
    parquet = _optional("pyarrow.parquet", path)
    with parquet.ParquetFile(path) as file:
        columns = [name for name in file.schema_arrow.names if name in FIELDS]
        for batch in file.iter_batches(ROWS, columns=columns):
            yield from map(_line, batch.to_pylist())


def _dataset_id(source: Path) -> str:
    if source.is_dir() or source.name.endswith(FILE_ENDINGS) or not DATASET_ID.fullmatch(str(source)):
        expected = "give a file (JSONL, JSON, .gz, .zst, Parquet) or a data set's id on the Hugging Face hub"
        missing = "is a folder" if source.is_dir() else "does not exist"
        raise ValueError(f"conversation file {source} {missing}; {expected}")
    return str(source)


def _dataset_rows(name: str) -> Iterator[bytes]:
    """Yield the rows of a data set ``owner/name`` or ``owner/name:split``; the split is train by default."""
    repository, _, split = name.partition(":")
    datasets = _optional("datasets", f"{name} is not a file here, and a data set")
    try:
        rows = datasets.load_dataset(repository, split=split or "train")
    except Exception as error:  # the hub, the cache and each data set's format have errors of their own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        found = f"{name} is neither a file nor a data set that can be loaded ({reason})"
        advice = "check the path, or the id, the split (owner/name:split) and your access"
        raise ValueError(f"{found}; {advice}") from error
    rows = rows.select_columns([column for column in rows.column_names if column in FIELDS])
    yield from map(_line, rows)


def _line(row: dict[str, Any]) -> bytes:
    """Return a row of a table as a line. Tables fill in absent fields with null, so nulls are left out."""
    text = json.dumps(_without_nulls(row), ensure_ascii=False, default=lambda value: type(value).__name__)
    return text.encode() + b"\n"


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value


def _optional(module: str, source: object) -> Any:
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{source} needs the package {package}; pip install {package}") from error
