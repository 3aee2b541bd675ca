"""A file for HDF5 to write to that never tells it of a full disk.

HDF5 does not survive a failing write: closing the file fails too, its handle stays behind, and the process dies of a
segmentation fault some time later. So HDF5 writes through this object, which keeps the first error to itself and
from then on drops what it is given; the writer asks for the error after each chunk and at the end.
"""

from __future__ import annotations

import io
import os
from contextlib import suppress
from pathlib import Path

FLUSH_BYTES = 16 << 20


class DiskSink(io.RawIOBase):
    """A new file at ``path``, in the form of h5py's file-like objects. `check` raises what went wrong, an OSError."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self._position = 0
        self._dropped = self._flushed = 0  # written and forgotten up to the first, told to be written up to the second
        self._error: OSError | None = None

    def check(self) -> None:
        """Raise the first error of the disk, naming the file; the file is worthless then."""
        if self._error is not None:
            raise OSError(self._error.errno, self._error.strerror, str(self._path)) from self._error

    def sync(self) -> int:
        """Wait until all is on the disk; the size in bytes."""
        self.check()
        os.fsync(self._descriptor)
        return os.fstat(self._descriptor).st_size

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data).cast("B")
        done = 0
        try:
            while self._error is None and done < len(view):
                done += os.pwrite(self._descriptor, view[done:], self._position + done)
        except OSError as error:
            self._error = error
        self._position += len(view)
        if self._position >= self._flushed + FLUSH_BYTES:
            self._flush_behind()
        return len(view)

    def _flush_behind(self) -> None:
        """Let the disk write while the encoders go on, so that the final fsync has little to wait for, and terabytes pass through
        a few megabytes of page cache. DONTNEED starts the writing of dirty pages, waits for none, and drops those already written."""
        with suppress(OSError):  # advice only
            os.posix_fadvise(self._descriptor, self._dropped, self._position - self._dropped, os.POSIX_FADV_DONTNEED)
        self._dropped, self._flushed = self._flushed, self._position

    def readinto(self, buffer: bytearray | memoryview) -> int:
        size = os.preadv(self._descriptor, [buffer], self._position)
        self._position += size
        return size

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: os.fstat(self._descriptor).st_size}[whence]
        self._position = start + offset
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

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()
