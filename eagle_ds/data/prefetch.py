"""Run an iterator ahead of its consumer, in a thread.

Reading releases the interpreter's lock (positional reads, inflate, copies), so a thread suffices and tensors need not travel
between processes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from queue import Empty, Queue
from typing import Generic, TypeVar

import torch

from eagle_ds.data.dataset import MicroBatch

T = TypeVar("T")
POLL_S = 0.1


class Prefetcher(Generic[T]):
    """Iterates over ``items`` in a thread, at most ``depth`` ahead, the one in the making included: each may be gigabytes.

    ``next`` makes room for another item at once, ``take`` only when ``go_on`` is called or the next item is taken: until then the
    thread, which takes the interpreter's lock, has nothing new to do.

    An exception in the thread is raised again by ``next`` in its place; ``close`` ends the thread (and ``items``, if it is a generator).
    """

    def __init__(self, items: Iterable[T], depth: int, name: str) -> None:
        self._items = items
        self._ready: Queue[tuple[T | None, BaseException | None]] = Queue()
        self._room = threading.Semaphore(depth)
        self._holds_room = False  # for the item taken last
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        item = self.take()
        self.go_on()
        return item

    def go_on(self) -> None:
        """The thread may make one more item."""
        if self._holds_room:
            self._holds_room = False
            self._room.release()

    def take(self) -> T:
        """The next item; raises StopIteration behind the last."""
        self.go_on()
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
        self._holds_room = True
        return item

    def close(self) -> None:
        """Stop after the item in the making, and wait for that."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            items = iter(self._items)
            while self._has_room():
                self._ready.put((next(items), None))
        except BaseException as error:  # StopIteration too
            self._ready.put((None, error))
        finally:
            close = getattr(self._items, "close", None)
            if close is not None:
                close()

    def _has_room(self) -> bool:
        """Wait until one more item may be made; False once nobody wants any."""
        while not self._stop.is_set():
            if self._room.acquire(timeout=POLL_S):
                return True
        return False


class DeviceCopy:
    """Iterates over micro-batches on ``device``, hidden states in ``dtype``; copies run, and end, on a stream of their own.

    Call ``adopt`` on each before use, in the thread that uses it.
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
        """End the iterator behind this one."""
        close = getattr(self._items, "close", None)
        if close is not None:
            close()


def adopt(item: MicroBatch, device: torch.device) -> MicroBatch:
    """Tell the allocator that the current stream uses what the copy stream allocated."""
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device)
        for value in vars(item.batch).values():
            if isinstance(value, torch.Tensor):
                value.record_stream(stream)
    return item
