"""Compress a chunk of hidden states: one valid zlib stream of its byte-shuffled rows.

HDF5's shuffle filter regroups the bytes of n numbers into byte planes: first all lowest bytes, last all
highest bytes. In the hidden states of a trained network only the highest plane (sign and exponent)
compresses. It does so because some byte values are far more frequent than others, not because sequences
repeat. The mantissa planes are noise. LZ77, the search for repeats inside gzip, finds nothing in either. So
the encoder skips it and writes

    78 01 | stored blocks: noise planes | Huffman-coded blocks: highest plane | adler32

This saves more bytes than gzip -6, in a fortieth of the time. The result is one ordinary zlib stream, so
every reader of HDF5's shuffle + gzip pipeline can inflate it. The Huffman coder is ISA-L with a history of
two bytes: four times as fast as zlib, and it still finds runs of equal bytes.

adler32, the checksum in a zlib stream, is a sum. After a flipped bit three neighbouring symbols can decode to
others whose errors cancel in the sum; two of 72,000 flips did. So each chunk also gets a crc32 of its planes.
It is stored outside the stream, and our reader checks it.

========  ====================  ========================  ===============================================
source    stored                Huffman-coded             remark
========  ====================  ========================  ===============================================
bfloat16  byte 0: e0 m6..m0     byte 1: s e7..e1          saves about a third
float16   byte 0: m7..m0        byte 1: s e4..e0 m9 m8    saves less: two mantissa bits spoil the plane
float32   bytes 0-2             byte 3: s e7..e1          float32 that holds bfloat16: two zero planes
========  ====================  ========================  ===============================================

A plane of zeros shrinks to a few bytes, and so do the zero rows that pad the last chunk. Values are never
cast: the codec handles unsigned integers, so NaN payloads and negative zeros come back bit for bit.
"""

from __future__ import annotations

import functools
import logging
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

logger = logging.getLogger(__name__)

ENCODER = "eagle_ds planes 1: low bytes stored, high byte huffman"

Bytes = bytes | memoryview | np.ndarray

_ZLIB_HEADER = b"\x78\x01"  # deflate with a 32 KiB window, no dictionary, "fastest" level
_MAX_STORED_BYTES = 65_535  # deflate gives the length of a stored block in 16 bits
_RAW_DEFLATE = -15  # zlib's wbits for a stream without header and checksum
_MAX_MEM_LEVEL = 9


class DamagedChunk(ValueError):
    """The stream does not inflate to the bytes that were encoded."""


@dataclass(frozen=True)
class EncodedChunk:
    """A chunk's zlib stream, and the crc32 of the planes that it inflates to."""

    stream: bytes
    crc32: int


@dataclass(frozen=True)
class Backend:
    """The compression functions of ISA-L, or of zlib if ISA-L is not installed."""

    deflate: Callable[[Bytes], bytes]  # data -> raw deflate blocks, the last one marked as final
    inflate: Callable[[Bytes, int], bytes]  # (zlib stream, expected bytes: a hint for the buffer) -> data
    adler32: Callable[[Bytes], int]
    crc32: Callable[..., int]  # (data, crc32 of the data before it = 0)
    failure: type[Exception]  # raised by inflate


@functools.cache
def backend() -> Backend:
    """Return the backend. The first call chooses it, and logs a warning if it is the slow one."""
    try:
        from isal import igzip_lib, isal_zlib
    except ImportError:
        logger.warning("isal is not installed; zlib takes 3 to 4 times as long (pip install isal)")
        return zlib_backend()

    def deflate(data: Bytes) -> bytes:
        # The last argument, hist_bits = 1, limits matches to the last two bytes: Huffman codes and runs only.
        return igzip_lib.compress(data, 1, igzip_lib.COMP_DEFLATE, igzip_lib.MEM_LEVEL_EXTRA_LARGE, 1)

    return Backend(
        deflate=deflate,
        inflate=lambda stream, size: igzip_lib.decompress(stream, igzip_lib.DECOMP_ZLIB, 15, size),
        adler32=isal_zlib.adler32, crc32=isal_zlib.crc32, failure=igzip_lib.IsalError)


def zlib_backend() -> Backend:
    """Return the reference: Python's zlib, limited to run-length matches and Huffman codes."""
    return Backend(
        deflate=lambda data: b"".join(_run_length(data, zlib.Z_FINISH)),
        inflate=lambda stream, size: zlib.decompress(stream, bufsize=size),
        adler32=zlib.adler32, crc32=zlib.crc32, failure=zlib.error)


def encode_chunk(rows: np.ndarray, chunk_rows: int | None = None) -> EncodedChunk:
    """Compress the rows of a chunk.

    Args:
        rows: unsigned [n, H] of 16 or 32 bits, any strides.
        chunk_rows: rows of a full chunk; missing ones are added as zeros. Default n.
    """
    height, width = rows.shape
    planes = split_planes(rows, (chunk_rows or height) - height)
    body: list[Bytes] = [_ZLIB_HEADER]
    for plane in planes[:-1]:
        # Noise is stored as it is. Zeros (the padding, or a whole plane of zeros) are run-length coded; that
        # part ends on a byte boundary (Z_SYNC_FLUSH), because a stored block must begin on one.
        noise_bytes = height * width if plane.any() else 0
        body += _stored(plane[:noise_bytes])
        if noise_bytes < plane.size:
            body += _run_length(plane[noise_bytes:], zlib.Z_SYNC_FLUSH)
    # The highest plane comes last: its blocks carry deflate's end mark. The checksum covers all planes.
    body.append(backend().deflate(planes[-1]))
    whole = planes.reshape(-1)
    body.append(backend().adler32(whole).to_bytes(4, "big"))
    return EncodedChunk(b"".join(body), backend().crc32(whole))


def inflate(stream: Bytes, num_bytes: int, crc32: int | None = None) -> np.ndarray:
    """Inflate any zlib stream, ours or not, to uint8 [num_bytes].

    Raises:
        DamagedChunk: the stream is damaged, has another length, or does not match ``crc32``.
    """
    try:
        data = backend().inflate(stream, num_bytes)
    except backend().failure as error:
        raise DamagedChunk(f"the zlib stream is damaged ({error})") from error
    if len(data) != num_bytes:
        raise DamagedChunk(f"the zlib stream holds {len(data)} bytes, expected {num_bytes}")
    if crc32 is not None and backend().crc32(data) != crc32:
        raise DamagedChunk("its crc32 is not the one that was stored with it")
    return np.frombuffer(data, np.uint8)


def split_planes(rows: np.ndarray, padding: int = 0) -> np.ndarray:
    """Byte shuffle: unsigned [n, H] -> uint8 [itemsize, (n + padding) * H], lowest bytes first."""
    height, width = rows.shape
    planes = np.empty((rows.itemsize, height + padding, width), np.uint8)
    planes[:, height:] = 0
    # Shifts and narrowing casts are fast: numpy uses SIMD for them. It copies every second byte one by one.
    for byte in range(rows.itemsize):
        np.copyto(planes[byte, :height], rows >> 8 * byte if byte else rows, casting="unsafe")
    return planes.reshape(rows.itemsize, -1)


def merge_planes(planes: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Byte unshuffle: uint8 [itemsize, n, H] -> ``out``, unsigned [n, H] of any strides.

    Builds each number from its highest byte down, by shift and or. This is twice as fast as strided byte
    copies.
    """
    np.left_shift(planes[-1], 8, out=out, dtype=out.dtype, casting="unsafe")
    for plane in planes[-2:0:-1]:
        np.bitwise_or(out, plane, out=out)
        np.left_shift(out, 8, out=out)
    return np.bitwise_or(out, planes[0], out=out)


def _stored(data: np.ndarray) -> list[Bytes]:
    """Return stored deflate blocks: 5 bytes of header (type, length, ~length), then the raw bytes."""
    blocks: list[Bytes] = []
    for start in range(0, data.size, _MAX_STORED_BYTES):
        block = memoryview(data[start : start + _MAX_STORED_BYTES])
        size = block.nbytes
        blocks += [b"\x00", size.to_bytes(2, "little"), (size ^ 0xFFFF).to_bytes(2, "little"), block]
    return blocks


def _run_length(data: Bytes, flush: int) -> list[bytes]:
    """Return run-length and Huffman coded deflate blocks; with Z_SYNC_FLUSH more blocks can follow them."""
    compressor = zlib.compressobj(1, zlib.DEFLATED, _RAW_DEFLATE, _MAX_MEM_LEVEL, zlib.Z_RLE)
    return [compressor.compress(data), compressor.flush(flush)]
