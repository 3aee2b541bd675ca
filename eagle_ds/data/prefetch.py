"""Run an iterator ahead of its consumer, in a thread.

Reading releases the interpreter's lock (positional reads, inflate, copies), so a thread suffices and tensors need not travel
between processes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from queue import Empty, Full, Queue
from typing import Generic, TypeVar

import torch

from eagle_ds.data.dataset import MicroBatch

T = TypeVar("T")
POLL_S = 0.1


class Prefetcher(Generic[T]):
    """Iterates over ``items`` in a thread, at most ``depth`` finished ones ahead.

    An exception in the thread is raised again by ``next`` in its place; ``close`` ends the thread (and ``items``, if it is a generator).
    """

    def __init__(self, items: Iterable[T], depth: int, name: str) -> None:
        self._items = items
        self._ready: Queue[tuple[T | None, BaseException | None]] = Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
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
        return item

    def close(self) -> None:
        """Stop after the item in the making, and wait for that."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            for item in self._items:
                if not self._put(item, None):
                    return
            self._put(None, StopIteration())
        except BaseException as error:
            self._put(None, error)
        finally:
            close = getattr(self._items, "close", None)
            if close is not None:
                close()

    def _put(self, item: T | None, error: BaseException | None) -> bool:
        while not self._stop.is_set():
            try:
                self._ready.put((item, error), timeout=POLL_S)
                return True
            except Full:
                continue
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
