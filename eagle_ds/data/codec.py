"""A chunk of hidden states <-> one valid zlib stream of its byte-shuffled rows.

HDF5's shuffle filter turns the bytes of n numbers into byte planes: all lowest bytes, ..., all highest bytes. Of a
trained network's hidden states only the highest plane (sign and exponent) compresses; the mantissa planes are noise on
which LZ77 wastes its time. So the encoder writes

    78 01 | stored blocks: noise planes | Huffman-only deflate: highest plane | adler32

which saves more than gzip -6, costs a sixteenth of its time, and is still one plain zlib stream: any reader of HDF5's
shuffle + gzip pipeline inflates it, and its adler32 catches every flipped bit.

=========  ==============================  =====================  ==================================================
source     stored as is                    Huffman-only           remark
=========  ==============================  =====================  ==================================================
bfloat16   byte 0: e0 m6..m0               byte 1: s e7..e1       saves about a third
float16    byte 0: m7..m0                  byte 1: s e4..e0 m9 m8 saves less, two mantissa bits spoil the plane
float32    bytes 0-2                       byte 3: s e7..e1       a float32 that holds bfloat16 has two zero planes
=========  ==============================  =====================  ==================================================

A plane of zeros, and the zero rows that pad a chunk, become runs of a few bytes (deflate's run-length strategy).
Nothing is ever cast: the codec sees unsigned integers, so NaN payloads and negative zeros come back bit for bit.
"""

from __future__ import annotations

import functools
import logging
import zlib
from collections.abc import Callable

import numpy as np

logger = logging.getLogger(__name__)

ENCODER = "eagle_ds planes 1: low bytes stored, high byte huffman-only"

_ZLIB_HEADER = b"\x78\x01"
_MAX_STORED_BYTES = 65_535  # deflate's 16-bit length of a stored block
_RAW_DEFLATE = -15
_MEM_LEVEL = 9  # 32K symbols a Huffman block, the longest zlib offers: fewest code tables


class DamagedChunk(ValueError):
    """The stream does not inflate to the bytes that were encoded."""


def encode_chunk(rows: np.ndarray, chunk_rows: int | None = None) -> bytes:
    """Compress ``rows`` (unsigned 16- or 32-bit, any strides), zero-padded to ``chunk_rows`` rows, into one zlib stream."""
    planes = split_planes(rows)
    padding = np.zeros(((chunk_rows or len(rows)) - len(rows)) * rows.shape[1], np.uint8)
    checksum, body = 1, [_ZLIB_HEADER]
    for plane in planes[:-1]:
        body += _stored(plane) if plane.any() else _deflated(plane, zlib.Z_RLE)
        body += _deflated(padding, zlib.Z_RLE)
        checksum = _adler32()(padding, _adler32()(plane, checksum))
    high = planes[-1]
    body += _deflated(high, zlib.Z_HUFFMAN_ONLY if high.any() else zlib.Z_RLE)
    body += _deflated(padding, zlib.Z_RLE, last=True)
    checksum = _adler32()(padding, _adler32()(high, checksum))
    return b"".join((*body, checksum.to_bytes(4, "big")))


def decode_chunk(stream: bytes | memoryview, out: np.ndarray) -> np.ndarray:
    """Inverse of `encode_chunk`: fill ``out`` (unsigned, the padded chunk's shape); raises `DamagedChunk`."""
    return merge_planes(inflate(stream, out.nbytes).reshape(out.itemsize, *out.shape), out)


def inflate(stream: bytes | memoryview, num_bytes: int) -> np.ndarray:
    """Inflate any zlib stream, ours or not, to uint8 [num_bytes]; raises `DamagedChunk` unless it is whole and sound."""
    decompress, failure = _inflater()
    try:
        data = decompress(stream, num_bytes)
    except failure as error:
        raise DamagedChunk(f"the zlib stream is damaged ({error})") from error
    if len(data) != num_bytes:
        raise DamagedChunk(f"the zlib stream holds {len(data)} bytes, expected {num_bytes}")
    return np.frombuffer(data, np.uint8)


def split_planes(rows: np.ndarray) -> np.ndarray:
    """Byte shuffle: unsigned [n, H] -> uint8 [itemsize, n * H], lowest bytes first. Shifts and narrowing casts are SIMD."""
    planes = np.empty((rows.itemsize, *rows.shape), np.uint8)
    np.copyto(planes[0], rows, casting="unsafe")
    for byte in range(1, rows.itemsize):
        np.copyto(planes[byte], rows >> (8 * byte), casting="unsafe")
    return planes.reshape(rows.itemsize, -1)


def merge_planes(planes: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Byte unshuffle: uint8 [itemsize, n, H] -> ``out`` unsigned [n, H], of any strides; twice as fast as a strided copy."""
    np.left_shift(planes[-1], 8, out=out, dtype=out.dtype, casting="unsafe")
    for plane in planes[-2:0:-1]:
        np.bitwise_or(out, plane, out=out)
        np.left_shift(out, 8, out=out)
    return np.bitwise_or(out, planes[0], out=out)


def _stored(data: np.ndarray) -> list[bytes]:
    """Non-final stored deflate blocks: 5 bytes of header, then the bytes as they are."""
    raw, blocks = data.tobytes(), []
    for start in range(0, len(raw), _MAX_STORED_BYTES):
        block = raw[start : start + _MAX_STORED_BYTES]
        size = len(block)
        blocks += [b"\x00", size.to_bytes(2, "little"), (size ^ 0xFFFF).to_bytes(2, "little"), block]
    return blocks


def _deflated(data: np.ndarray, strategy: int, last: bool = False) -> list[bytes]:
    """Deflate blocks that end on a byte boundary; the last ones carry deflate's final bit."""
    if not data.size and not last:
        return []
    compressor = zlib.compressobj(1, zlib.DEFLATED, _RAW_DEFLATE, _MEM_LEVEL, strategy)
    return [compressor.compress(data), compressor.flush(zlib.Z_FINISH if last else zlib.Z_SYNC_FLUSH)]


@functools.cache
def _inflater() -> tuple[Callable[[bytes | memoryview, int], bytes], type[Exception]]:
    """ISA-L where it is installed (three times zlib's speed), else zlib; chosen once and logged."""
    try:
        from isal import igzip_lib
    except ImportError:
        logger.warning("isal is not installed: inflating with zlib, about three times slower (pip install isal)")
        return lambda stream, num_bytes: zlib.decompress(stream, bufsize=num_bytes), zlib.error
    return lambda stream, num_bytes: igzip_lib.decompress(stream, igzip_lib.DECOMP_ZLIB, 15, num_bytes), igzip_lib.IsalError


@functools.cache
def _adler32() -> Callable[[np.ndarray, int], int]:
    try:
        from isal import isal_zlib
    except ImportError:
        return zlib.adler32
    return isal_zlib.adler32
