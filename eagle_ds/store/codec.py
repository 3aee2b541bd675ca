"""A chunk of hidden states <-> one valid zlib stream of its byte-shuffled rows.

HDF5's shuffle filter turns the bytes of n numbers into byte planes: all lowest bytes, ..., all highest bytes. Of a
trained network's hidden states only the highest plane (sign and exponent) compresses, by its uneven frequencies and not by
repetition; the mantissa planes are noise. LZ77 wastes its time on both. So the encoder writes

    78 01 | stored blocks: noise planes | Huffman-coded blocks: highest plane | adler32

which saves more than gzip -6 at a fortieth of its time, and is still one plain zlib stream: any reader of HDF5's
shuffle + gzip pipeline inflates it. ISA-L, told to look back no further than two bytes, is a pure Huffman coder four times as
fast as zlib's own, and still sees runs.

zlib's adler32 is a sum: a flipped bit that turns three neighbouring symbols into others whose changes cancel passes it (two of
72,000 flips did). So a chunk also has a crc32 of its planes, kept beside the streams and checked by our reader.

=========  ==============================  =========================  ===============================================
source     stored                          Huffman-coded              remark
=========  ==============================  =========================  ===============================================
bfloat16   byte 0: e0 m6..m0               byte 1: s e7..e1           saves about a third
float16    byte 0: m7..m0                  byte 1: s e4..e0 m9 m8     saves less: two mantissa bits spoil the plane
float32    bytes 0-2                       byte 3: s e7..e1           one that holds bfloat16 values has two zero planes
=========  ==============================  =========================  ===============================================

A plane of zeros, and the zero rows that pad a chunk, become runs of a few bytes. Nothing is ever cast: the codec sees
unsigned integers, so NaN payloads and negative zeros come back bit for bit.
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

_ZLIB_HEADER = b"\x78\x01"
_MAX_STORED_BYTES = 65_535  # deflate's 16-bit length of a stored block
_RAW_DEFLATE = -15
_MAX_MEM_LEVEL = 9


class DamagedChunk(ValueError):
    """The stream does not inflate to the bytes that were encoded."""


@dataclass(frozen=True)
class Encoded:
    """A chunk's zlib stream, and the crc32 of the planes that it inflates to."""

    stream: bytes
    crc32: int


@dataclass(frozen=True)
class Backend:
    """Who does the work: ISA-L, or zlib where that is not installed."""

    deflate: Callable[[Bytes], bytes]  # to final, raw deflate blocks
    inflate: Callable[[Bytes, int], bytes]  # a zlib stream, to about so many bytes
    adler32: Callable[[Bytes], int]
    crc32: Callable[[Bytes], int]
    failure: type[Exception]  # what inflate raises


@functools.cache
def backend() -> Backend:
    """The one that is installed; chosen once and logged."""
    try:
        from isal import igzip_lib, isal_zlib
    except ImportError:
        logger.warning("isal is not installed: zlib codes hidden states, three to four times slower (pip install isal)")
        return zlib_backend()
    return Backend(
        deflate=lambda data: igzip_lib.compress(data, 1, igzip_lib.COMP_DEFLATE, igzip_lib.MEM_LEVEL_EXTRA_LARGE, 1),
        inflate=lambda stream, num_bytes: igzip_lib.decompress(stream, igzip_lib.DECOMP_ZLIB, 15, num_bytes),
        adler32=isal_zlib.adler32,
        crc32=isal_zlib.crc32,
        failure=igzip_lib.IsalError,
    )


def zlib_backend() -> Backend:
    """The reference: run-length deflate, which on noise is Huffman coding."""
    return Backend(
        deflate=lambda data: b"".join(_runs(data, zlib.Z_FINISH)),
        inflate=lambda stream, num_bytes: zlib.decompress(stream, bufsize=num_bytes),
        adler32=zlib.adler32,
        crc32=zlib.crc32,
        failure=zlib.error,
    )


def encode_chunk(rows: np.ndarray, chunk_rows: int | None = None) -> bytes:
    """Compress ``rows`` (unsigned [n, H] of 16 or 32 bits, any strides), zero-padded to ``chunk_rows`` rows."""
    return encode(rows, chunk_rows).stream


def encode(rows: np.ndarray, chunk_rows: int | None = None) -> Encoded:
    """`encode_chunk`, with the checksum that lets `inflate` vouch for the result."""
    height, width = rows.shape
    planes = split_planes(rows, (chunk_rows or height) - height)
    body: list[Bytes] = [_ZLIB_HEADER]
    for plane in planes[:-1]:
        filled = height * width if plane.any() else 0
        body += _stored(plane[:filled])
        if filled < plane.size:
            body += _runs(plane[filled:], zlib.Z_SYNC_FLUSH)
    body.append(backend().deflate(planes[-1]))
    whole = planes.reshape(-1)
    body.append(backend().adler32(whole).to_bytes(4, "big"))
    return Encoded(b"".join(body), backend().crc32(whole))


def decode_chunk(stream: Bytes, out: np.ndarray) -> np.ndarray:
    """Inverse of `encode_chunk`: fill ``out`` (unsigned, the padded chunk's shape); raises `DamagedChunk`."""
    return merge_planes(inflate(stream, out.nbytes).reshape(out.itemsize, *out.shape), out)


def inflate(stream: Bytes, num_bytes: int, crc32: int | None = None) -> np.ndarray:
    """Inflate any zlib stream, ours or not, to uint8 [num_bytes]; raises `DamagedChunk` unless it is whole and sound."""
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
    for byte in range(rows.itemsize):  # shifts and narrowing casts run on SIMD, strided byte copies do not
        np.copyto(planes[byte, :height], rows >> 8 * byte if byte else rows, casting="unsafe")
    return planes.reshape(rows.itemsize, -1)


def merge_planes(planes: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Byte unshuffle: uint8 [itemsize, n, H] -> ``out`` unsigned [n, H], of any strides; twice as fast as strided copies."""
    np.left_shift(planes[-1], 8, out=out, dtype=out.dtype, casting="unsafe")
    for plane in planes[-2:0:-1]:
        np.bitwise_or(out, plane, out=out)
        np.left_shift(out, 8, out=out)
    return np.bitwise_or(out, planes[0], out=out)


def _stored(data: np.ndarray) -> list[Bytes]:
    """Stored deflate blocks: 5 bytes of header, then the bytes as they are."""
    blocks: list[Bytes] = []
    for start in range(0, data.size, _MAX_STORED_BYTES):
        block = memoryview(data[start : start + _MAX_STORED_BYTES])
        size = block.nbytes
        blocks += [b"\x00", size.to_bytes(2, "little"), (size ^ 0xFFFF).to_bytes(2, "little"), block]
    return blocks


def _runs(data: Bytes, flush: int) -> list[bytes]:
    """Run-length and Huffman coded deflate blocks; Z_SYNC_FLUSH ends them on a byte boundary, for more to follow."""
    compressor = zlib.compressobj(1, zlib.DEFLATED, _RAW_DEFLATE, _MAX_MEM_LEVEL, zlib.Z_RLE)
    return [compressor.compress(data), compressor.flush(flush)]
