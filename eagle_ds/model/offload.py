"""Move what autograd saves to pinned host memory during the forward, and back before the backward uses it.

``torch.autograd.graph.saved_tensors_hooks`` shows every tensor that is saved for the backward: by PyTorch's
own nodes, by the joint attention, and as inputs of checkpointed functions. (Tensors saved inside a
checkpointed function are recomputed, so they do not appear here.) A storage is moved once, even if several of
its views are saved, into slabs of host memory that are reused from step to step.

Copies run on their own stream, while the main stream computes:

    main stream   | layer work ...       | more work       | wait for copy A |  A's memory may be reused
    copy stream        | copy A to host -------| copy B ...

Forward: storage A stays referenced until the main stream has been told to wait for A's copy. Otherwise its
memory could be given to another tensor too early. At most IN_FLIGHT copies are in that state.
Backward: while one storage is used, the next AHEAD storages are fetched. The backward reads storages in the
reverse order of the forward, by the last time that each was saved.

With full recomputation, a row of an 8B draft saves 24 KiB per TTT step. Copying that takes half a microsecond
over a 50 GB/s link in each direction, and the row's attention to 128K keys takes four microseconds.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

MIN_BYTES = 1 << 20  # smaller storages stay on the device: launching a copy would cost more than it saves
# Pinned memory is allocated in powers of two: whole tensors would waste up to half of it, slabs almost none.
SLAB_BYTES = 64 << 20
IN_FLIGHT = 2  # storages on their way to the host
AHEAD = 2  # storages fetched before the backward asks for them

Key = tuple[int, int]
"""Identifies saved data: a storage's address and its version, which every in-place operation changes."""


class Slabs:
    """Host memory in equal slabs, pinned if there is a GPU; returned slabs are reused and never freed."""

    def __init__(self, slab_bytes: int, *, pin: bool) -> None:
        self.slab_bytes, self.pin = slab_bytes, pin
        self.made = 0  # slabs allocated so far
        self._free: list[Tensor] = []

    def take(self, num_bytes: int) -> list[Tensor]:
        """Return uint8 slabs for ``num_bytes``. Raises RuntimeError if the host has no more memory to pin."""
        wanted = -(-num_bytes // self.slab_bytes)
        while len(self._free) < wanted:
            self._free.append(torch.empty(self.slab_bytes, dtype=torch.uint8, pin_memory=self.pin))
            self.made += 1
        return [self._free.pop() for _ in range(wanted)]

    def give_back(self, slabs: list[Tensor]) -> None:
        """Let copies that are started from now on overwrite ``slabs``."""
        self._free += slabs


class Copies:
    """Copies between device and slabs, on a stream of their own. On a CPU they are done at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def out(self, data: Tensor, slabs: list[Tensor]) -> torch.cuda.Event | None:
        """Start copying ``data`` (uint8 [n]) to ``slabs``; the returned event marks the copy's end."""
        return self._copy([(slab[: len(piece)], piece) for piece, slab in self._pieces(data, slabs)])

    def back(self, data: Tensor, slabs: list[Tensor]) -> torch.cuda.Event | None:
        """Start copying ``slabs`` to ``data``; the returned event marks the copy's end."""
        return self._copy([(piece, slab[: len(piece)]) for piece, slab in self._pieces(data, slabs)])

    def wait(self, event: torch.cuda.Event | None) -> None:
        """Make the current stream, not the host, wait for ``event``."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def _copy(self, pairs: list[tuple[Tensor, Tensor]]) -> torch.cuda.Event | None:
        if self.stream is None:
            for to, source in pairs:
                to.copy_(source)
            return None
        # Wait for earlier work on the main stream: it writes the source, or still reads the memory
        # of the destination.
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for to, source in pairs:
                to.copy_(source, non_blocking=True)
            return self.stream.record_event()

    @staticmethod
    def _pieces(data: Tensor, slabs: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(data.split(len(slabs[0])), slabs, strict=True)


class Stored:
    """One storage in host memory; ``data`` is its copy on the device, once it has been fetched."""

    def __init__(
        self, key: Key, storage: torch.UntypedStorage, slabs: list[Tensor], forget: Callable[[Stored], None]
    ) -> None:
        self.key, self.num_bytes = key, storage.nbytes()
        self.slabs, self._forget = slabs, forget
        self._source = StorageWeakRef(storage)  # while it lives, no other storage gets the same address
        self.data: Tensor | None = None
        self.arrival: torch.cuda.Event | None = None
        self.asked_for = False

    def __del__(self) -> None:
        self._forget(self)


@dataclass(frozen=True)
class View:
    """What autograd keeps instead of a tensor: the stored storage, and the tensor's view of it."""

    stored: Stored
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class ActivationOffload:
    """Moves what a forward saves to the host. One instance serves all micro-batches of a rank, one at a time.

    On the device stay parameters, integers (the batch holds them anyway), and storages below ``min_bytes``.
    """

    def __init__(
        self, device: torch.device, *, min_bytes: int = MIN_BYTES, slab_bytes: int = SLAB_BYTES
    ) -> None:
        self.device, self.min_bytes = device, min_bytes
        self.slabs = Slabs(slab_bytes, pin=device.type == "cuda")
        self._copies = Copies(device)
        self._stored: dict[Key, weakref.ref[Stored]] = {}  # in the order of their last saving
        self._leaving: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self._staying: dict[int, torch.UntypedStorage] = {}

    def stay(self, *tensors: Tensor) -> None:
        """Keep these on the device in this forward: the backward reads them first."""
        self._staying |= {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Move what is saved for the backward in this context to the host."""
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
                yield
        finally:
            self._let_go(0)
            self._staying.clear()

    def _pack(self, tensor: Tensor) -> Tensor | View:
        """Called by autograd when it saves ``tensor``; what it returns is kept instead."""
        if not self._moves(tensor):
            return tensor
        storage = tensor.untyped_storage()
        key = (storage._cdata, tensor._version)
        ref = self._stored.pop(key, None)
        stored = ref() if ref is not None else None
        if stored is None:
            stored = self._send(key, storage)
        self._stored[key] = weakref.ref(stored)  # popped and inserted again: now the last one
        return View(stored, tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset())

    def _moves(self, tensor: Tensor) -> bool:
        if tensor.device != self.device or not tensor.is_floating_point():
            return False
        if isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter):
            return False
        storage = tensor.untyped_storage()
        return storage.nbytes() >= self.min_bytes and storage._cdata not in self._staying

    def _send(self, key: Key, storage: torch.UntypedStorage) -> Stored:
        data = torch.empty(0, dtype=torch.uint8, device=self.device).set_(storage)
        stored = Stored(key, storage, self.slabs.take(len(data)), self._forget)
        self._leaving.append((data, self._copies.out(data, stored.slabs)))
        self._let_go(IN_FLIGHT)
        return stored

    def _let_go(self, keep: int) -> None:
        """Drop references to storages being copied, the oldest first, until ``keep`` of them remain."""
        while len(self._leaving) > keep:
            data, event = self._leaving.popleft()
            self._copies.wait(event)  # what the main stream writes to this memory next comes after the copy
            del data

    def _unpack(self, packed: Tensor | View) -> Tensor:
        """Called by autograd when the backward reads what ``_pack`` returned."""
        if isinstance(packed, Tensor):
            return packed
        stored = packed.stored
        self._fetch(stored)
        if not stored.asked_for:
            stored.asked_for = True
            self._fetch_ahead()
            self._copies.wait(stored.arrival)
        assert stored.data is not None
        view = torch.empty(0, dtype=packed.dtype, device=self.device)
        return view.set_(stored.data.untyped_storage(), packed.offset, packed.size, packed.stride)

    def _fetch(self, stored: Stored) -> None:
        if stored.data is None:
            stored.data = torch.empty(stored.num_bytes, dtype=torch.uint8, device=self.device)
            stored.arrival = self._copies.back(stored.data, stored.slabs)

    def _fetch_ahead(self) -> None:
        """Fetch what the backward needs next: of the storages not asked for yet, those saved last."""
        latest_first = (ref() for ref in reversed(list(self._stored.values())))
        waiting = (stored for stored in latest_first if stored is not None and not stored.asked_for)
        for stored in islice(waiting, AHEAD):
            self._fetch(stored)

    def _forget(self, stored: Stored) -> None:
        """Return the slabs of a storage that nothing refers to any more, for reuse."""
        self._stored.pop(stored.key, None)
        # The slabs can be reused at once: later copies into them run after this one, on the same stream. The
        # device memory cannot if it was fetched and never read, because the main stream may get it next.
        self._copies.wait(stored.arrival)
        self.slabs.give_back(stored.slabs)
