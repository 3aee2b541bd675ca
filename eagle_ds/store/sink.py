"""A file object for HDF5 that hides a full disk from it.

HDF5 does not survive a failing write: closing the file then fails too, its handle stays open, and the process
crashes with a segmentation fault some time later. So HDF5 writes through this object. It remembers the first
error and silently discards all later data. The writer asks for the error after each chunk and at the end
(`DiskSink.check`).
"""

from __future__ import annotations

import io
import os
from contextlib import suppress
from pathlib import Path

FLUSH_BYTES = 16 << 20  # bytes written between two hints to the page cache


class DiskSink(io.RawIOBase):
    """Create a file at ``path`` as a file-like object for h5py. Write errors are kept for `check`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self._position = 0
        # Byte positions: pages before the first were dropped from the cache; those before the second are
        # being written.
        self._dropped = self._flushed = 0
        self._error: OSError | None = None

    def check(self) -> None:
        """Raise the first write error, as an OSError that names the file. The file is unusable then."""
        if self._error is not None:
            raise OSError(self._error.errno, self._error.strerror, str(self._path)) from self._error

    def sync(self) -> int:
        """Wait until all data is on the disk and return the file's size in bytes."""
        self.check()
        os.fsync(self._descriptor)
        return os.fstat(self._descriptor).st_size

    def write(self, data: bytes | memoryview) -> int:
        """Write all of ``data``, or discard it after an error. Either way HDF5 is told that it was written.
        """
        view = memoryview(data).cast("B")
        done = 0
        try:
            while self._error is None and done < len(view):
                done += os.pwrite(self._descriptor, view[done:], self._position + done)
        except OSError as error:
            self._error = error
        self._position += len(view)
        if self._position >= self._flushed + FLUSH_BYTES:
            self._drop_pages()
        return len(view)

    def _drop_pages(self) -> None:
        """Start writing the newest pages to the disk and drop the older ones from the page cache.

        The disk then works while the encoders compute, the final fsync is short, and a store of terabytes
        occupies a few megabytes of page cache. DONTNEED does not block: it starts writing the dirty pages and
        drops those already written. So each call covers the new range, and the range whose writing the
        previous call started.
        """
        with suppress(OSError):  # a hint: if the file system refuses it, nothing is lost
            size = self._position - self._dropped
            os.posix_fadvise(self._descriptor, self._dropped, size, os.POSIX_FADV_DONTNEED)
        self._dropped, self._flushed = self._flushed, self._position

    def readinto(self, buffer: bytearray | memoryview) -> int:
        size = os.preadv(self._descriptor, [buffer], self._position)
        self._position += size
        return size

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        end = os.fstat(self._descriptor).st_size
        self._position = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: end}[whence] + offset
        return self._position

    def truncate(self, size: int | None = None) -> int:
        size = self._position if size is None else size
        try:
            os.ftruncate(self._descriptor, size)
        except OSError as error:
            self._error = self._error or error
        return size

    def tell(self) -> int:
        return self._position

    def seekable(self) -> bool:
        return True

    readable = writable = seekable

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()
