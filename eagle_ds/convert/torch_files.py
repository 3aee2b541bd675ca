"""Other projects' torch files (.ckpt, .pt, either gzipped) as a dict of tensors: memory-mapped, checked, never unpickled.

A gzipped file is inflated once, into anonymous memory (memfd) that torch then maps like any other file, so that it costs
one sample's memory and no second copy.
"""

from __future__ import annotations

import functools
import gzip
import logging
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from eagle_ds.convert.rejected import Reason, Rejected

logger = logging.getLogger(__name__)

ZIP_MAGIC, GZIP_MAGIC = b"PK\x03\x04", b"\x1f\x8b"
INFLATE_BLOCK_BYTES = 4 << 20
CHECK_BLOCK_BYTES = 256 << 10  # stays in the processor's cache
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")


def load_torch(path: Path, checksums: bool = True) -> dict[str, Any]:
    """The dict saved in ``path``, its tensors mapped from the file. Raises `Rejected`; runs no code from the file.

    Without ``checksums`` only the pages that are then looked at are read.
    """
    if path.suffix == ".gz":
        with _inflated(path) as inflated:
            return _load(path, inflated, checksums=False)  # gzip has its own
    return _load(path, path, checksums)


def _load(path: Path, content: Path, checksums: bool) -> dict[str, Any]:
    """Load ``content`` (the inflated ``path``); complaints name ``path``."""
    size = content.stat().st_size
    with content.open("rb") as file:
        is_zip = file.read(4) == ZIP_MAGIC
        if size == 0:
            raise Rejected(path, Reason.TRUNCATED, "the file is empty, expected a torch archive")
        if not is_zip and _first_bytes(content) == GZIP_MAGIC:
            raise Rejected(path, Reason.UNREADABLE, "it is gzip-compressed, expected a plain torch file; rename it to end in .gz")
        if is_zip and not zipfile.is_zipfile(file):
            raise Rejected(path, Reason.TRUNCATED, f"{size} bytes without a zip directory at the end; it was written or copied in part")
        if is_zip and checksums:
            _check_records(path, file)
        loaded = _unpickle_tensors(path, Path(f"/proc/self/fd/{file.fileno()}"), is_zip)  # what was checked, whatever its name
    if not isinstance(loaded, dict):
        raise Rejected(path, Reason.MISSING_KEY, f"it holds a {type(loaded).__name__}, expected a dict of tensors")
    return loaded


def _unpickle_tensors(path: Path, content: Path, is_zip: bool) -> Any:
    try:
        return torch.load(content, map_location="cpu", mmap=is_zip, weights_only=True)
    except pickle.UnpicklingError as error:
        cause = str(error).replace("\n", " ")
        if "Unsupported operand" not in cause and ("Unsupported" in cause or "GLOBAL" in cause):  # an operand is noise, not code
            detail = "it would run code when loaded, expected tensors only; save it again as a plain dict of tensors"
            raise Rejected(path, Reason.UNSAFE, f"{detail} ({_first_sentence(cause)})") from error
        raise Rejected(path, Reason.UNREADABLE, f"not a torch file ({_first_sentence(cause)})") from error
    except EOFError as error:
        raise Rejected(path, Reason.TRUNCATED, f"it ends in the middle of the data ({error})") from error
    except (RuntimeError, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise Rejected(path, Reason.UNREADABLE, f"torch cannot read it ({_first_sentence(str(error))})") from error


def _first_sentence(text: str) -> str:
    return text.strip().split(". ")[0][:200]


def _check_records(path: Path, file: BinaryIO) -> None:
    """Compare each record with its crc32, which torch itself does not do for a mapped file.

    torch can be told to write no checksums; then every record's is wrong, and nothing can be said.
    """
    try:
        records = [info for info in zipfile.ZipFile(file).infolist() if info.compress_type == zipfile.ZIP_STORED]
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise Rejected(path, Reason.CORRUPT, f"its zip directory is damaged ({error})") from error
    block = memoryview(bytearray(CHECK_BLOCK_BYTES))
    wrong = [info.filename for info in records if _record_crc32(path, file, info, block) != info.CRC]
    if wrong and len(wrong) < len(records):
        raise Rejected(path, Reason.CORRUPT, f"record {wrong[0]} does not match its crc32; the file changed after it was saved")


def _record_crc32(path: Path, file: BinaryIO, info: zipfile.ZipInfo, block: memoryview) -> int:
    """By plain reads, through ``block``: they bring the file into the page cache at the disk's speed, faults of a map at a third."""
    head = os.pread(file.fileno(), _LOCAL_HEADER.size, info.header_offset)
    if len(head) < _LOCAL_HEADER.size or head[:4] != ZIP_MAGIC:
        raise Rejected(path, Reason.CORRUPT, f"record {info.filename} has no header where the zip directory says")
    *_, name_length, extra_length = _LOCAL_HEADER.unpack(head)
    at = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    crc32, end, update = 0, at + info.file_size, _crc32_library()
    while at < end:
        count = os.preadv(file.fileno(), [block[: min(len(block), end - at)]], at)
        if count == 0:
            raise Rejected(path, Reason.CORRUPT, f"record {info.filename} reaches beyond the end of the file")
        crc32, at = update(block[:count], crc32), at + count
    return crc32


@functools.cache
def _crc32_library() -> Callable[[memoryview, int], int]:
    try:
        from isal import isal_zlib
    except ImportError:
        return zlib.crc32
    return isal_zlib.crc32


@contextmanager
def _inflated(path: Path) -> Iterator[Path]:
    """A path to the gunzipped content in anonymous memory; mappings of it outlive the context."""
    descriptor = os.memfd_create(path.name, os.MFD_CLOEXEC)
    try:
        with os.fdopen(descriptor, "wb", buffering=0, closefd=False) as target:
            _gunzip(path, target)
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


def _gunzip(path: Path, target: BinaryIO) -> None:
    open_gzip, failure = _gzip_library()
    block = memoryview(bytearray(INFLATE_BLOCK_BYTES))
    try:
        with open_gzip(path, "rb") as source:
            while count := source.readinto(block):
                target.write(block[:count])
    except EOFError as error:
        raise Rejected(path, Reason.TRUNCATED, "the gzip stream ends in the middle; it was written or copied in part") from error
    except (gzip.BadGzipFile, failure) as error:
        if (begin := _first_bytes(path)) != GZIP_MAGIC:
            detail = f"its name says gzip, but it begins with {begin!r}, expected {GZIP_MAGIC!r}"
            raise Rejected(path, Reason.CORRUPT, f"{detail}; rename it if it is a plain torch file") from error
        raise Rejected(path, Reason.CORRUPT, f"the gzip stream is damaged ({error})") from error


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(len(GZIP_MAGIC))


@functools.cache
def _gzip_library() -> tuple[Callable[..., BinaryIO], type[Exception]]:
    """ISA-L where it is installed, because gzip files are bound by their own inflate, else Python's gzip; logged once."""
    try:
        from isal import igzip, isal_zlib
    except ImportError:
        logger.warning("isal is not installed: inflating with zlib, slower (pip install isal)")
        return gzip.open, zlib.error
    return igzip.open, isal_zlib.error
