"""What autograd keeps for the backward, moved to pinned host memory while the forward goes on, and back ahead of its use.

``torch.autograd.graph.saved_tensors_hooks`` shows every tensor that is saved: by PyTorch's own nodes, by the joint attention,
and the inputs of checkpointed functions. What is saved inside a checkpointed function is the checkpoint's own affair. A
storage is moved once however many views of it are saved (tiles of a state, say), into slabs of host memory that are kept
from step to step. Copies run on a stream of their own. In the forward a storage stays referenced until the main stream has
been told to wait for its copy, at most ``IN_FLIGHT`` copies later; in the backward the ``AHEAD`` storages that come next are
fetched while the current one is worked on. The order of the backward is the forward's reversed, by the last time that a
storage was saved.

A row of an 8B draft leaves 24 KiB a step where all is recomputed: half a microsecond of a 50 GB/s link each way, beside
the four microseconds that its attention to 128K keys takes.
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

MIN_BYTES = 1 << 20  # smaller storages stay: they are not worth a copy's launch
SLAB_BYTES = 64 << 20  # pinned memory is handed out in powers of two, so a whole tensor could waste as much as it takes
IN_FLIGHT = 2
AHEAD = 2

Key = tuple[int, int]
"""A storage and its version: what was saved before an in-place change is not what is saved after it."""


class Slabs:
    """Host memory in equal pieces, pinned where there is a GPU. Pieces that are given back are used again, never freed."""

    def __init__(self, slab_bytes: int, *, pin: bool) -> None:
        self.slab_bytes, self.pin = slab_bytes, pin
        self.made = 0
        self._free: list[Tensor] = []

    def take(self, num_bytes: int) -> list[Tensor]:
        """uint8 slabs that together hold ``num_bytes``. Raises RuntimeError where the host has no more memory to pin."""
        wanted = -(-num_bytes // self.slab_bytes)
        while len(self._free) < wanted:
            self._free.append(torch.empty(self.slab_bytes, dtype=torch.uint8, pin_memory=self.pin))
            self.made += 1
        return [self._free.pop() for _ in range(wanted)]

    def give_back(self, slabs: list[Tensor]) -> None:
        """``slabs`` may be overwritten by copies that are started from now on."""
        self._free += slabs


class Copies:
    """Copies between device and slabs on a stream of their own; on a CPU they are plain and at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def out(self, data: Tensor, slabs: list[Tensor]) -> torch.cuda.Event | None:
        """Start copying ``data`` (uint8 [n], complete once the current stream is) to ``slabs``; done when the event is."""
        return self._copy([(slab[: len(piece)], piece) for piece, slab in self._pieces(data, slabs)])

    def back(self, data: Tensor, slabs: list[Tensor]) -> torch.cuda.Event | None:
        """The other way."""
        return self._copy([(piece, slab[: len(piece)]) for piece, slab in self._pieces(data, slabs)])

    def wait(self, event: torch.cuda.Event | None) -> None:
        """Let the current stream wait for ``event``; the host does not."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def _copy(self, pairs: list[tuple[Tensor, Tensor]]) -> torch.cuda.Event | None:
        if self.stream is None:
            for to, source in pairs:
                to.copy_(source)
            return None
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for to, source in pairs:
                to.copy_(source, non_blocking=True)
            return self.stream.record_event()

    @staticmethod
    def _pieces(data: Tensor, slabs: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(data.split(len(slabs[0])), slabs, strict=True)


class Stored:
    """One storage in host memory, and on the device again once it has been asked for or fetched ahead."""

    def __init__(self, key: Key, storage: torch.UntypedStorage, slabs: list[Tensor], forget: Callable[[Stored], None]) -> None:
        self.key, self.num_bytes, self.slabs, self._forget = key, storage.nbytes(), slabs, forget
        self._source = StorageWeakRef(storage)  # while this lives no other storage gets the same key
        self.data: Tensor | None = None
        self.arrival: torch.cuda.Event | None = None
        self.asked_for = False

    def __del__(self) -> None:
        self._forget(self)


@dataclass(frozen=True)
class View:
    """What autograd holds in place of a tensor: where it lay in its storage."""

    stored: Stored
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class ActivationOffload:
    """Moves what a forward keeps to the host. One instance serves all micro-batches of a rank, one at a time.

    ``min_bytes``: storages smaller than this stay where they are. Integers stay too, since batches hold them anyway, and so do
    parameters.
    """

    def __init__(self, device: torch.device, *, min_bytes: int = MIN_BYTES, slab_bytes: int = SLAB_BYTES) -> None:
        self.device, self.min_bytes = device, min_bytes
        self.slabs = Slabs(slab_bytes, pin=device.type == "cuda")
        self._copies = Copies(device)
        self._stored: dict[Key, weakref.ref[Stored]] = {}  # the last saved last
        self._leaving: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self._staying: dict[int, torch.UntypedStorage] = {}

    def stay(self, *tensors: Tensor) -> None:
        """Leave these where they are, in this forward: what the first moment of the backward reads again gains nothing."""
        self._staying |= {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}

    @contextmanager
    def saving(self) -> Iterator[None]:
        """What is saved for a backward in here goes to the host."""
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
                yield
        finally:
            self._let_go(0)
            self._staying.clear()

    @property
    def kept_bytes(self) -> int:
        """Bytes of all storages that are in host memory now."""
        return sum(stored.num_bytes for ref in self._stored.values() if (stored := ref()) is not None)

    def _pack(self, tensor: Tensor) -> Tensor | View:
        if not self._moves(tensor):
            return tensor
        storage = tensor.untyped_storage()
        key = (storage._cdata, tensor._version)
        ref = self._stored.pop(key, None)
        stored = ref() if ref is not None else None
        if stored is None:
            stored = self._send(key, storage)
        self._stored[key] = weakref.ref(stored)
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

    def _let_go(self, still: int) -> None:
        """Drop the oldest references to what is being copied, until ``still`` are left."""
        while len(self._leaving) > still:
            data, event = self._leaving.popleft()
            self._copies.wait(event)  # so that whoever gets this memory next, in stream order, comes after the copy
            del data

    def _unpack(self, packed: Tensor | View) -> Tensor:
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
        """Start on the next of the backward, which are the last saved of those not asked for yet."""
        waiting = (stored for ref in reversed(list(self._stored.values())) if (stored := ref()) is not None and not stored.asked_for)
        for stored in islice(waiting, AHEAD):
            self._fetch(stored)

    def _forget(self, stored: Stored) -> None:
        """Nothing refers to it any more. Later copies to its slabs come after earlier ones from them: one stream."""
        self._stored.pop(stored.key, None)
        self._copies.wait(stored.arrival)
        self.slabs.give_back(stored.slabs)
