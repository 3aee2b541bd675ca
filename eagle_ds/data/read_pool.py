"""Hidden states read and inflated by processes of their own, into memory that they share with the trainer.

Threads of the training process would read as fast, but each chunk that they inflate takes the interpreter's lock a few times,
and the training thread, which launches thousands of kernels a step, queues for it at every one: on two CPU cores
twelve of them made it fourteen times slower (docs/benchmarks/h200.md). Here it shares the lock with one thread that waits for a reply.

The processes are plain interpreters (``python -m eagle_ds.data.read_worker``), so nothing of the trainer is run or copied
again in them; requests and replies are pickles on a socket. Memory is an anonymous file (memfd), mapped once by all and used
again for every sequence: fresh pages would cost as much as inflating into them does.
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

PIECE_ROWS = 16 * CHUNK_ROWS  # what is read at a time: few opened chunks are read twice, and processes share one long sample


@dataclass(frozen=True)
class RowsWanted:
    """Rows of one dataset of one sample, and where they go: from byte ``offset`` of the shared memory on."""

    path: Path
    entry: SampleEntry
    info: StoreInfo
    name: str
    ranges: tuple[RowRange, ...]
    shape: tuple[int, int]
    dtype: torch.dtype
    offset: int = 0

    @property
    def nbytes(self) -> int:
        """Of the rows in memory."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    def view(self, memory: mmap.mmap) -> Tensor:
        """The rows' place in ``memory``."""
        return torch.frombuffer(memory, dtype=self.dtype, count=self.shape[0] * self.shape[1], offset=self.offset).view(self.shape)

    def pieces(self) -> list[RowsWanted]:
        """The same rows in parts that cut no chunk, one after another in memory."""
        parts, offset, row_bytes = [], self.offset, self.shape[1] * self.dtype.itemsize
        for start, stop in self.ranges:
            while start < stop:
                end = min(stop, start - start % PIECE_ROWS + PIECE_ROWS)
                parts.append(replace(self, ranges=((start, end),), shape=(end - start, self.shape[1]), offset=offset))
                offset, start = offset + (end - start) * row_bytes, end
        return parts


class ReadPool:
    """``processes`` readers, started by the first ``read``. One caller at a time; others wait."""

    def __init__(self, processes: int) -> None:
        if processes < 1:
            raise ValueError(f"a pool of {processes} reading processes reads nothing; use 1 or more, or no pool")
        self.processes = processes
        self._workers: list[_Worker] = []
        self._memory: _SharedMemory | None = None
        self._lock = threading.Lock()

    def read(self, wanted: Sequence[RowsWanted], out: Tensor) -> ReadStats:
        """All of ``wanted``, one after another, into ``out`` (uint8 [their bytes], pinned if you like). Raises StoreError as a
        reader does, or if a process ends."""
        pieces, size = [], 0
        for rows in wanted:
            pieces += replace(rows, offset=size).pieces()
            size += rows.nbytes
        assert out.shape == (size,) and out.dtype == torch.uint8, "room for exactly what is wanted"
        if not size:
            return ReadStats()
        with self._lock:
            if self._memory is None or self._memory.size < size:
                self._memory = _SharedMemory(size)
            stats = self._share_out(self._memory, size, pieces)
            out.copy_(torch.frombuffer(self._memory.map, dtype=torch.uint8, count=size))
        return stats

    def close(self) -> None:
        """End the processes and let go of the memory; a later ``read`` starts anew."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        for worker in self._workers:
            worker.close()
        self._workers, self._memory = [], None

    def _share_out(self, memory: _SharedMemory, size: int, pieces: list[RowsWanted]) -> ReadStats:
        """Neighbours go to the same process, and every process gets as many bytes as the others. After a failure all are ended:
        none may go on writing to memory that the next read uses."""
        if not self._workers:
            self._workers = [_Worker() for _ in range(self.processes)]
            logger.info("%d processes read hidden states", self.processes)
        shares: list[list[RowsWanted]] = [[] for _ in self._workers]
        done = 0
        for piece in pieces:
            shares[(2 * done + piece.nbytes) * len(shares) // (2 * size)].append(piece)
            done += piece.nbytes
        busy = [(worker, share) for worker, share in zip(self._workers, shares, strict=True) if share]
        try:
            for worker, share in busy:
                worker.ask(memory, share)
            return sum((worker.answer() for worker, _ in busy), ReadStats())
        except BaseException:
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
    """One process and the socket to it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        root = str(Path(eagle_ds.__file__).resolve().parents[1])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))  # an empty entry would be the current folder
        environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-P", "-m", "eagle_ds.data.read_worker", str(theirs.fileno())]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment, start_new_session=True)
        theirs.close()
        self._connection = Connection(ours.detach())
        self._knows: _SharedMemory | None = None

    def ask(self, memory: _SharedMemory, share: list[RowsWanted]) -> None:
        """Start reading ``share``."""
        try:
            self._connection.send((None if memory is self._knows else memory.size, share))
            if memory is not self._knows:
                send_handle(self._connection, memory.descriptor, self._process.pid)
        except OSError as error:
            raise self._ended() from error
        self._knows = memory

    def answer(self) -> ReadStats:
        """Wait for the end of it. Raises what the process raised."""
        try:
            reply = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._ended() from error
        if isinstance(reply, BaseException):
            raise reply
        return reply

    def close(self) -> None:
        """End it, whatever it is doing."""
        self._connection.close()
        self._process.kill()
        self._process.wait()

    def _ended(self) -> StoreError:
        return StoreError(
            f"a process that reads hidden states ended with exit code {self._process.wait()} (-9: the system had no memory left); "
            "its last words are above. Lower data.read_processes, or set it to 0 to read in the training process"
        )
