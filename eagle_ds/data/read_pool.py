"""Read and inflate hidden states in separate processes, into memory that they share with the trainer.

**Why processes.** Threads of the training process would read as fast. But for each chunk they take Python's
global interpreter lock a few times, and the training thread needs that lock for each of the thousands of
kernels that it launches per step. On two CPU cores, twelve such threads made training fourteen times slower
(docs/benchmarks/h200.md). With processes the training thread shares its lock with one thread, which waits for
replies.

**Protocol.** Each worker is a fresh interpreter (``python -m eagle_ds.data.read_worker``), so nothing of the
trainer, its GPU context included, is copied into it. Pool and worker talk over a socket pair:

    pool -> worker   pickle (size of new shared memory or None, list of RowRequest)
    pool -> worker   the memory's file descriptor, only if a size was given
    worker -> pool   pickle: ReadStats, or the exception that reading raised

Hidden states never go through the socket. Workers write them into the shared memory, each request at its own
offset, so they need no locks. The memory is an anonymous file (memfd) that every process maps once and all
reads reuse, because allocating fresh pages would take as long as inflating into them.
"""

from __future__ import annotations

import logging
import mmap
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle
from pathlib import Path

import torch
from torch import Tensor

import eagle_ds
from eagle_ds.store.chunks import RowRange
from eagle_ds.store.format import CHUNK_ROWS
from eagle_ds.store.manifest import SampleEntry, StoreError, StoreInfo
from eagle_ds.store.reader import ReadStats

logger = logging.getLogger(__name__)

REQUEST_ROWS = 16 * CHUNK_ROWS
"""Requests are split at multiples of this, so several workers share a long sample and no chunk is split."""


@dataclass(frozen=True)
class RowRequest:
    """Rows of one dataset of one sample, and their byte offset in the shared memory."""

    path: Path
    entry: SampleEntry
    info: StoreInfo
    name: str
    ranges: tuple[RowRange, ...]
    shape: tuple[int, int]  # [sum of range lengths, width]
    dtype: torch.dtype
    offset: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the rows in memory."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    def view(self, memory: mmap.mmap) -> Tensor:
        """Return the rows' place in ``memory`` as a tensor."""
        count = self.shape[0] * self.shape[1]
        return torch.frombuffer(memory, dtype=self.dtype, count=count, offset=self.offset).view(self.shape)

    def split(self) -> list[RowRequest]:
        """Split into requests of at most REQUEST_ROWS rows, which follow one another in memory."""
        parts, offset, row_bytes = [], self.offset, self.shape[1] * self.dtype.itemsize
        for start, stop in self.ranges:
            while start < stop:
                end = min(stop, start - start % REQUEST_ROWS + REQUEST_ROWS)
                shape = end - start, self.shape[1]
                parts.append(replace(self, ranges=((start, end),), shape=shape, offset=offset))
                offset, start = offset + (end - start) * row_bytes, end
        return parts


class ReadPool:
    """Reading processes, started by the first `read`. Only one thread reads at a time; others wait."""

    def __init__(self, processes: int) -> None:
        if processes < 1:
            raise ValueError(f"a pool of {processes} processes reads nothing; use 1 or more, or no pool")
        self.processes = processes
        self._workers: list[_Worker] = []
        self._memory: _SharedMemory | None = None
        self._lock = threading.Lock()

    def read(self, requests: Sequence[RowRequest], out: Tensor) -> ReadStats:
        """Read all ``requests``, one after another, into ``out``.

        Args:
            requests: rows to read; their ``offset`` is set here.
            out: uint8 [sum of their nbytes], pinned or not.

        Raises:
            StoreError: a file cannot be read, or a process died.
        """
        parts, size = [], 0
        for request in requests:
            parts += replace(request, offset=size).split()
            size += request.nbytes
        assert out.shape == (size,) and out.dtype == torch.uint8, "out must have exactly the requested bytes"
        if not size:
            return ReadStats()
        with self._lock:
            if self._memory is None or self._memory.size < size:
                self._memory = _SharedMemory(size)
            stats = self._read_in_workers(self._memory, size, parts)
            out.copy_(torch.frombuffer(self._memory.map, dtype=torch.uint8, count=size))
        return stats

    def close(self) -> None:
        """End the processes and free the shared memory. A later `read` starts new ones."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        for worker in self._workers:
            worker.close()
        self._workers, self._memory = [], None

    def _read_in_workers(self, memory: _SharedMemory, size: int, parts: list[RowRequest]) -> ReadStats:
        """Distribute ``parts`` over the workers and wait for all of them."""
        if not self._workers:
            self._workers = [_Worker() for _ in range(self.processes)]
            logger.info("%d processes read hidden states", self.processes)
        # Split the byte range [0, size) into equal intervals, one for each worker. A part goes to the worker
        # whose interval holds its middle byte. Adjacent parts then go to one worker, which opens fewer files,
        # and all workers read about as many bytes.
        shares: list[list[RowRequest]] = [[] for _ in self._workers]
        for part in parts:
            shares[(2 * part.offset + part.nbytes) * len(shares) // (2 * size)].append(part)
        busy = [(worker, share) for worker, share in zip(self._workers, shares, strict=True) if share]
        try:
            for worker, share in busy:
                worker.send(memory, share)
            return sum((worker.receive() for worker, _ in busy), ReadStats())
        except BaseException:
            # End all workers: the others may still write into the memory, which the next read would use.
            self._end()
            raise


class _SharedMemory:
    """Memory of ``size`` bytes that other processes can map by its descriptor."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.descriptor = os.memfd_create("eagle_ds rows")
        os.ftruncate(self.descriptor, size)
        self.map = mmap.mmap(self.descriptor, size)

    def __del__(self) -> None:
        os.close(self.descriptor)


class _Worker:
    """One reading process and the socket to it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        # The worker must import this same package. An empty entry would mean the current folder, so drop it.
        root = str(Path(eagle_ds.__file__).resolve().parents[1])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        # No GPU, and one thread: the pool's processes are the parallelism.
        environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-P", "-m", "eagle_ds.data.read_worker", str(theirs.fileno())]
        # In its own session the worker does not get Ctrl-C from the terminal; the trainer closes the pool.
        self._process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], env=environment, start_new_session=True)
        theirs.close()
        self._connection = Connection(ours.detach())
        self._mapped: _SharedMemory | None = None  # the memory whose descriptor the worker has

    def send(self, memory: _SharedMemory, share: list[RowRequest]) -> None:
        """Let the worker read ``share`` into ``memory``; do not wait."""
        is_new = memory is not self._mapped
        try:
            self._connection.send((memory.size if is_new else None, share))
            if is_new:
                send_handle(self._connection, memory.descriptor, self._process.pid)
        except OSError as error:
            raise self._died() from error
        self._mapped = memory

    def receive(self) -> ReadStats:
        """Wait until the worker has read its share. Raises what the worker raised."""
        try:
            reply = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error
        if isinstance(reply, BaseException):
            raise reply
        return reply

    def close(self) -> None:
        """Kill the process, whatever it is doing."""
        self._connection.close()
        self._process.kill()
        self._process.wait()

    def _died(self) -> StoreError:
        code = self._process.wait()
        return StoreError(
            f"a process that reads hidden states died with exit code {code} (-9 usually means that memory "
            "ran out); its output is above. Lower data.read_processes, or set it to 0 to read in the trainer")
