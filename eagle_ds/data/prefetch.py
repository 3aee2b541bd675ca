"""Prepare the next micro-batches while the current one trains: one thread reads ahead, another copies ahead.

Positional reads, inflating and copies release Python's global interpreter lock. So threads are enough, and
tensors need not be sent between processes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from queue import Empty, Queue
from typing import Generic, TypeVar

import torch

from eagle_ds.data.dataset import MicroBatch

T = TypeVar("T")
POLL_S = 0.1  # how often a waiting thread checks whether it should stop


class Prefetcher(Generic[T]):
    """Iterate over ``items`` in a thread that runs at most ``depth`` items ahead.

    The item in the making counts too, because an item may take gigabytes.

    ``next`` lets the thread start another item at once. `take` does not: the thread stays idle until
    `advance` or the next `take`. The trainer uses `take`, launches the forward, and then calls `advance`,
    because a busy thread takes the interpreter lock and would delay the launches.

    An exception in the thread is raised by the ``next`` or `take` that would have returned the item. `close`
    ends the thread, and ``items`` if it is a generator.
    """

    def __init__(self, items: Iterable[T], depth: int, name: str) -> None:
        self._items = items
        self._ready: Queue[tuple[T | None, BaseException | None]] = Queue()
        self._slots = threading.Semaphore(depth)  # items that the thread may still start
        self._holds_slot = False  # whether the slot of the item taken last is still to be released
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        item = self.take()
        self.advance()
        return item

    def advance(self) -> None:
        """Let the thread start one more item. Does nothing if it may start one already."""
        if self._holds_slot:
            self._holds_slot = False
            self._slots.release()

    def take(self) -> T:
        """Return the next item without letting the thread start another.

        Raises StopIteration after the last.
        """
        self.advance()
        while True:
            try:
                item, error = self._ready.get(timeout=POLL_S)
                break
            except Empty:
                if self._stop.is_set():
                    raise StopIteration from None
        if error is not None:
            self._stop.set()
            raise error
        self._holds_slot = True
        return item

    def close(self) -> None:
        """Stop the thread, after the item that it is making, and wait until it has ended."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            items = iter(self._items)
            while self._acquire_slot():
                self._ready.put((next(items), None))
        except BaseException as error:  # StopIteration too: it reaches the consumer after the last item
            self._ready.put((None, error))
        finally:
            _close(self._items)

    def _acquire_slot(self) -> bool:
        """Wait until one more item may be started. Returns False once the prefetcher is closed."""
        while not self._stop.is_set():
            if self._slots.acquire(timeout=POLL_S):
                return True
        return False


class DeviceCopy:
    """Iterate over micro-batches, copied to ``device``, with hidden states converted to ``dtype``.

    Copies run on their own CUDA stream, in parallel with the training. A batch is yielded when its copy has
    ended. The thread that trains must call `record_use` on each batch before it uses it.
    """

    def __init__(self, items: Iterable[MicroBatch], device: torch.device, dtype: torch.dtype) -> None:
        self._items, self.device, self.dtype = items, device, dtype
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __iter__(self) -> Iterator[MicroBatch]:
        for item in self._items:
            if self._stream is None:
                item.batch = item.batch.to(self.device, float_dtype=self.dtype)
                yield item
                continue
            with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
                item.batch = item.batch.to(self.device, float_dtype=self.dtype, non_blocking=True)
                self._stream.synchronize()
            yield item

    def close(self) -> None:
        """Close the iterator that gives the micro-batches."""
        _close(self._items)


def _close(items: object) -> None:
    """Close a generator or another object with a ``close`` method; do nothing for a list."""
    if (close := getattr(items, "close", None)) is not None:
        close()


def record_use(item: MicroBatch, device: torch.device) -> MicroBatch:
    """Tell the CUDA allocator that the current stream uses the batch, which the copy stream allocated.

    Without this the allocator could give the batch's memory to the next copy while kernels still read it.
    """
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device)
        for value in vars(item.batch).values():
            if isinstance(value, torch.Tensor):
                value.record_stream(stream)
    return item
