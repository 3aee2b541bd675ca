"""One reading process of a `ReadPool`: ``python -m eagle_ds.data.read_worker SOCKET``.

The process answers requests until the pool closes its end of the socket, and then ends. So it does not
outlive a trainer that was killed. data/read_pool.py describes the protocol. This code is a separate module,
because ``python -m`` would load a module that both sides import a second time.
"""

from __future__ import annotations

import mmap
import os
import sys
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from pathlib import Path

from eagle_ds.data.read_pool import RowRequest
from eagle_ds.store.reader import ReadStats, SampleReader


def serve(connection: Connection) -> None:
    """Answer each message with its `ReadStats`, or with the exception that reading raised."""
    memory: mmap.mmap | None = None
    while True:
        try:
            size, requests = connection.recv()
            if size is not None:  # new shared memory: its descriptor follows the message
                memory = _mapped(recv_handle(connection), size)
        except (EOFError, ConnectionResetError):  # the pool closed its end, or the trainer is gone
            return
        assert memory is not None, "the first message announces the shared memory"
        try:
            reply: ReadStats | Exception = fill(memory, requests)
        except Exception as error:  # any error: the pool raises it in the trainer
            reply = error
        connection.send(reply)


def fill(memory: mmap.mmap, requests: list[RowRequest]) -> ReadStats:
    """Read each request's rows to its place in the shared memory. Raises StoreError."""
    readers: dict[Path, SampleReader] = {}
    for request in requests:
        if request.path not in readers:
            readers[request.path] = SampleReader(request.path, request.entry, request.info, threads=1)
        readers[request.path].read_rows(request.name, request.ranges, request.view(memory))
    return sum((reader.stats for reader in readers.values()), ReadStats())


def _mapped(descriptor: int, size: int) -> mmap.mmap:
    """Map shared memory. A mapping stays valid after its descriptor is closed."""
    try:
        return mmap.mmap(descriptor, size)
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
