"""A process of a ``ReadPool``: ``python -m eagle_ds.data.read_worker SOCKET``. Serves until the other end closes."""

from __future__ import annotations

import mmap
import os
import sys
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from pathlib import Path

from eagle_ds.data.read_pool import RowsWanted
from eagle_ds.store.reader import ReadStats, SampleReader


def serve(connection: Connection) -> None:
    """Answer each request with what reading it cost, or with the exception that it ended in."""
    memory: mmap.mmap | None = None
    while True:
        try:
            size, share = connection.recv()
            if size is not None:
                memory = _mapped(recv_handle(connection), size)
        except (EOFError, ConnectionResetError):
            return
        assert memory is not None, "the first request brings memory along"
        try:
            reply: ReadStats | Exception = fill(memory, share)
        except Exception as error:  # whatever it is, the trainer is told
            reply = error
        connection.send(reply)


def fill(memory: mmap.mmap, share: list[RowsWanted]) -> ReadStats:
    """Read every piece to its place in the shared memory. Raises StoreError."""
    readers: dict[Path, SampleReader] = {}
    for rows in share:
        if rows.path not in readers:
            readers[rows.path] = SampleReader(rows.path, rows.entry, rows.info, threads=1)
        readers[rows.path].read_rows(rows.name, rows.ranges, rows.view(memory))
    return sum((reader.stats for reader in readers.values()), ReadStats())


def _mapped(descriptor: int, size: int) -> mmap.mmap:
    try:
        return mmap.mmap(descriptor, size)
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
