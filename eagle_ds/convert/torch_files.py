"""Read other projects' torch files (.ckpt, .pt, plain or gzipped) as a dict of tensors, running no code.

A plain file is mapped into memory, so its only copy is the one in the page cache. A gzipped file is inflated
once, into anonymous memory (memfd) that torch then maps like any other file. So it takes the memory of one
sample, not of two.

torch.save writes a zip archive: one record with a pickle that describes the tensors, and one uncompressed
record for each tensor's bytes. ``torch.load(weights_only=True)`` reads the pickle with its own interpreter,
which accepts only tensors and plain containers. It does not check the records' checksums when the file is
mapped, so they are checked here.
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

from eagle_ds.convert.formats import Reason, Rejected
from eagle_ds.store.codec import backend

logger = logging.getLogger(__name__)

ZIP_MAGIC, GZIP_MAGIC = b"PK\x03\x04", b"\x1f\x8b"
INFLATE_BLOCK_BYTES = 4 << 20
CHECK_BLOCK_BYTES = 256 << 10  # stays in the processor's cache
# The header of each record: magic, 5 fields of 2 bytes, 3 of 4, lengths of the name and the extra field.
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")


def load_torch(path: Path, checksums: bool = True) -> dict[str, Any]:
    """Return the dict saved in ``path``, with tensors mapped from the file. Raises `Rejected`.

    With ``checksums`` every byte is read and checked. Without, only the pages that the caller uses are read.
    """
    if path.suffix == ".gz":
        with _inflated(path) as inflated:
            return _load(inflated, checksums=False)  # gzip has its own
    return _load(path, checksums)


def _load(content: Path, checksums: bool) -> dict[str, Any]:
    """Load a file that is not compressed, or no longer."""
    size = content.stat().st_size
    with content.open("rb") as file:
        is_zip = file.read(4) == ZIP_MAGIC
        if size == 0:
            raise Rejected(Reason.TRUNCATED, "the file is empty, expected a torch archive")
        if not is_zip and _first_bytes(content) == GZIP_MAGIC:
            detail = "it is gzip-compressed, expected a plain torch file; rename it to end in .gz"
            raise Rejected(Reason.UNREADABLE, detail)
        if is_zip and not zipfile.is_zipfile(file):  # the directory of a zip file is its end
            detail = f"{size} bytes without a zip directory at the end; it was written or copied only in part"
            raise Rejected(Reason.TRUNCATED, detail)
        if is_zip and checksums:
            _check_records(file)
        # Load through the open descriptor: the path may lead to another file by now, which was not checked.
        loaded = _unpickle_tensors(Path(f"/proc/self/fd/{file.fileno()}"), is_zip)
    if not isinstance(loaded, dict):
        raise Rejected(Reason.MISSING_KEY, f"it holds a {type(loaded).__name__}, expected a dict of tensors")
    return loaded


def _unpickle_tensors(content: Path, is_zip: bool) -> Any:
    """Call torch.load and turn each of its many errors into `Rejected`. Only a zip file can be mapped."""
    try:
        return torch.load(content, map_location="cpu", mmap=is_zip, weights_only=True)
    except pickle.UnpicklingError as error:
        cause = str(error).replace("\n", " ")
        sentence = _first_sentence(cause)
        # "Unsupported operand" means that the bytes are no pickle. Other refusals mean that it contains code.
        if "Unsupported operand" not in cause and ("Unsupported" in cause or "GLOBAL" in cause):
            detail = "loading it would run code; save it again as a plain dict of tensors"
            raise Rejected(Reason.UNSAFE, f"{detail} ({sentence})") from error
        raise Rejected(Reason.UNREADABLE, f"not a torch file ({sentence})") from error
    except EOFError as error:
        raise Rejected(Reason.TRUNCATED, f"it ends in the middle of the data ({error})") from error
    except (RuntimeError, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise Rejected(Reason.UNREADABLE, f"torch cannot read it ({_first_sentence(str(error))})") from error


def _first_sentence(text: str) -> str:
    return text.strip().split(". ")[0][:200]


def _check_records(file: BinaryIO) -> None:
    """Compare each record with its crc32, which torch does not do for a mapped file.

    torch can be told to write no checksums. Then all of them are wrong, and the file cannot be judged.
    """
    try:
        infos = zipfile.ZipFile(file).infolist()
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise Rejected(Reason.CORRUPT, f"its zip directory is damaged ({error})") from error
    block = memoryview(bytearray(CHECK_BLOCK_BYTES))
    records = [info for info in infos if info.compress_type == zipfile.ZIP_STORED]
    wrong = [info.filename for info in records if _record_crc32(file, info, block) != info.CRC]
    if wrong and len(wrong) < len(records):
        detail = f"record {wrong[0]} does not match its crc32; the file changed after it was saved"
        raise Rejected(Reason.CORRUPT, detail)


def _record_crc32(file: BinaryIO, info: zipfile.ZipInfo, block: memoryview) -> int:
    """Compute the crc32 of one record's bytes, a block at a time.

    Plain reads are used although torch maps the record afterwards: they fill the page cache three times as
    fast as page faults would.
    """
    head = os.pread(file.fileno(), _LOCAL_HEADER.size, info.header_offset)
    if len(head) < _LOCAL_HEADER.size or head[:4] != ZIP_MAGIC:
        raise Rejected(Reason.CORRUPT, f"record {info.filename} has no header where the zip directory says")
    # The data follows the header, the name and the extra field, with which torch aligns it to 64 bytes.
    *_, name_length, extra_length = _LOCAL_HEADER.unpack(head)
    position = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    end = position + info.file_size
    crc32 = 0
    while position < end:
        count = os.preadv(file.fileno(), [block[: min(len(block), end - position)]], position)
        if count == 0:
            raise Rejected(Reason.CORRUPT, f"record {info.filename} reaches beyond the end of the file")
        crc32 = backend().crc32(block[:count], crc32)
        position += count
    return crc32


@contextmanager
def _inflated(path: Path) -> Iterator[Path]:
    """Inflate ``path`` into anonymous memory and yield a path to it. Mappings of it outlive the context."""
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
        detail = "the gzip stream ends in the middle; it was written or copied only in part"
        raise Rejected(Reason.TRUNCATED, detail) from error
    except (gzip.BadGzipFile, failure) as error:
        if (begin := _first_bytes(path)) != GZIP_MAGIC:
            detail = f"its name says gzip, but it begins with {begin!r}, expected {GZIP_MAGIC!r}"
            raise Rejected(Reason.CORRUPT, f"{detail}; rename it if it is a plain torch file") from error
        raise Rejected(Reason.CORRUPT, f"the gzip stream is damaged ({error})") from error


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(len(GZIP_MAGIC))


@functools.cache
def _gzip_library() -> tuple[Callable[..., BinaryIO], type[Exception]]:
    """Return the function that opens a gzip file, and its error for a damaged one.

    ISA-L is used if it is installed, because inflating takes most of the time of converting gzipped files.
    Cached, so that the warning is logged once.
    """
    try:
        from isal import igzip, isal_zlib
    except ImportError:
        logger.warning("isal is not installed: inflating with zlib, which is slower (pip install isal)")
        return gzip.open, zlib.error
    return igzip.open, isal_zlib.error
