"""Process groups that simulate a larger machine: several ranks on one GPU, or one rank without the others.

``StagedGroup``: NCCL refuses two ranks on one GPU, and gloo takes GPU tensors for some collectives only. Here
every collective copies its tensors to host memory, sends them over gloo, and copies the results back in
``wait``. Layouts can be checked with the real GPU kernels on a machine with one GPU. Results are exact; every
call blocks the GPU's stream, so times mean nothing.

``AloneGroup``: one process claims to be one rank of N and answers every collective from its own tensors. The
GPU does exactly one rank's computation in exactly one rank's memory and never waits for another rank. The
numbers are finite but wrong: data that other ranks would have sent is made of the data that this rank sent.

``PythonGroup`` is the base of both. torch has several forms of each collective, and their names change
between versions (``_allgather_base`` became ``all_gather_single``). PythonGroup implements every form that
torch.distributed and DeepSpeed call by means of eight methods; a subclass implements those eight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

STAGED = "staged"
ALONE = "alone"
"""Names of the two backends, for ``init_process_group`` and ``new_group``."""

ALL_TO_ALL_TAG = 1 << 16
"""Tag of the messages of an all-to-all. ``send`` and ``recv`` use the caller's tag, usually 0."""


def register_staged() -> None:
    """Make the backend ``STAGED`` known to torch.distributed."""
    dist.Backend.register_backend(STAGED, _make_staged, extended_api=True, devices=["cpu", "cuda"])


def register_alone(*, fills_gathers_in_place: bool) -> None:
    """Make the backend ``ALONE`` known to torch.distributed; see AloneGroup for the argument."""
    make = partial(_make_alone, fills_gathers_in_place)
    dist.Backend.register_backend(ALONE, make, extended_api=True, devices=["cpu", "cuda"])


def _make_staged(options: Any, _: Any) -> StagedGroup:
    rank, size, timeout = options.group_rank, options.group_size, options.timeout
    return StagedGroup(dist.ProcessGroupGloo(options.store, rank, size, timeout=timeout))


def _make_alone(fills_gathers_in_place: bool, options: Any, _: Any) -> AloneGroup:
    return AloneGroup(
        options.group_rank, options.group_size, fills_gathers_in_place=fills_gathers_in_place
    )


class Pending:
    """A collective in progress: the works of another group, and a function to run when they are done."""

    def __init__(self, works: Sequence[Any] = (), finish: Callable[[], None] | None = None) -> None:
        self._works, self._finish = list(works), finish

    def wait(self, timeout: Any = None) -> bool:
        """Block until the result is in place."""
        for work in self._works:
            work.wait()
        if self._finish is not None:
            with torch.no_grad():
                self._finish()
        self._works, self._finish = [], None
        return True

    def is_completed(self) -> bool:
        """Return whether ``wait`` would return without waiting for another rank."""
        return all(work.is_completed() for work in self._works)


class PythonGroup(dist.ProcessGroup):
    """A process group written in Python.

    Nested lists of tensors are torch's convention: the outer list has one entry per device of this process.
    There is always one device, so only entry 0 is used.
    """

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Pending:
        """Reduce ``tensors[0]`` in place by ``opts.reduceOp``."""
        raise NotImplementedError

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> Pending:
        """Copy ``tensors[0]`` of rank ``opts.rootRank`` to all ranks."""
        raise NotImplementedError

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Pending:
        """Fill ``outputs[0][r]`` with rank r's ``inputs[0]``. Shapes may differ, element counts may not."""
        raise NotImplementedError

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> Pending:
        """Fill ``outputs[0]`` of rank r with the reduction of all ``inputs[0][r]`` by ``opts.reduceOp``."""
        raise NotImplementedError

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Pending:
        """Fill ``outputs[r]`` with rank r's ``inputs[own rank]``. Sizes may differ and may be zero."""
        raise NotImplementedError

    def send(self, tensors: list[Tensor], dst: int, tag: int = 0) -> Pending:
        """Start to send ``tensors[0]``, which must not change before ``wait``."""
        raise NotImplementedError

    def recv(self, tensors: list[Tensor], src: int, tag: int = 0) -> Pending:
        """Start to receive; ``wait`` fills ``tensors[0]``."""
        raise NotImplementedError

    def barrier(self, opts: Any = None) -> Pending:
        """Wait for all ranks."""
        raise NotImplementedError

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Pending:
        return self.allgather([list(output.view(-1).tensor_split(self.size()))], [input])

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any) -> Pending:
        return self.reduce_scatter([output], [list(input.view(-1).tensor_split(self.size()))], opts)

    def all_to_all_single(
        self, output: Tensor, input: Tensor,
        output_splits: Sequence[int] | None, input_splits: Sequence[int] | None, opts: Any = None,
    ) -> Pending:
        return self.alltoall(self._split(output, output_splits), self._split(input, input_splits))

    def reduce(self, tensors: list[Tensor], opts: Any) -> Pending:
        """Reduce to the root; the other ranks' tensors stay unchanged."""
        own = tensors[0]
        return self.allreduce([own if self.rank() == opts.rootRank else own.clone()], opts)

    # Gather and scatter are all-to-alls in which every message that the root is not part of is empty.

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any) -> Pending:
        nothing = inputs[0].new_empty(0)
        received = outputs[0] if self.rank() == opts.rootRank else [nothing] * self.size()
        return self.alltoall(
            received, [inputs[0] if r == opts.rootRank else nothing for r in range(self.size())]
        )

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> Pending:
        nothing = outputs[0].new_empty(0)
        sent = inputs[0] if self.rank() == opts.rootRank else [nothing] * self.size()
        return self.alltoall(
            [outputs[0] if r == opts.rootRank else nothing for r in range(self.size())], sent
        )

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> Pending:
        return self._one_by_one(self.allreduce([tensor], opts) for tensor in tensors)

    def all_gather_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> Pending:
        pairs = zip(outputs, inputs, strict=True)
        return self._one_by_one(self.all_gather_single(*pair, opts) for pair in pairs)

    def reduce_scatter_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> Pending:
        pairs = zip(outputs, inputs, strict=True)
        return self._one_by_one(self.reduce_scatter_single(*pair, opts) for pair in pairs)

    # The names that torch 2.11 uses for the same methods.
    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    alltoall_base = all_to_all_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def _start_coalescing(self, device: Any = None) -> None:
        """Do nothing: torch would collect calls into one message; here each call is sent by itself."""

    def _end_coalescing(self, device: Any = None) -> Pending:
        return Pending()

    def _one_by_one(self, works: Any) -> Pending:
        """Finish every work before returning, because torch keeps only the result of ``_end_coalescing``."""
        for work in works:
            work.wait()
        return Pending()

    def _split(self, tensor: Tensor, splits: Sequence[int] | None) -> list[Tensor]:
        """Split along the first dimension into one piece per rank."""
        return list(tensor.split(list(splits)) if splits else tensor.tensor_split(self.size()))


class StagedGroup(PythonGroup):
    """Ranks that exchange tensors of any device through host memory, over ``gloo``.

    Types narrower than float32 are summed in float32 and rounded once. Collectives that only move data send
    bytes, so they work for every dtype.
    """

    def __init__(self, gloo: dist.ProcessGroupGloo) -> None:
        super().__init__(gloo.rank(), gloo.size())
        self._gloo = gloo

    def getBackendName(self) -> str:
        """Return the name that torch shows in messages."""
        return STAGED

    def shutdown(self) -> None:
        """End gloo's threads and connections."""
        del self._gloo

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Pending:
        (tensor,) = tensors
        summed = _wide(_to_host(tensor))
        work, scale = self._reduce(summed, opts)
        return Pending([work], lambda: _bring_back(tensor, summed, scale))

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> Pending:
        (tensor,) = tensors
        host = _to_host(tensor)
        return Pending([self._gloo.broadcast([_bytes(host)], opts)], lambda: _bring_back(tensor, host))

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Pending:
        own = _to_host(inputs[0])
        hosts = [torch.empty_like(own) for _ in outputs[0]]
        work = self._gloo.allgather([[_bytes(host) for host in hosts]], [_bytes(own)])
        return Pending([work], lambda: _bring_all_back(outputs[0], hosts))

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> Pending:
        parts = [_to_host(part).view(-1) for part in inputs[0]]
        summed = _wide(torch.cat(parts))
        work, scale = self._reduce(summed, opts)
        own = summed.split([part.numel() for part in parts])[self.rank()]
        return Pending([work], lambda: _bring_back(outputs[0], own, scale))

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Pending:
        sent = [_to_host(part) for part in inputs]
        received = [torch.empty(part.shape, dtype=part.dtype) for part in outputs]
        received[self.rank()] = sent[self.rank()]
        works = []
        # Post every receive before the first send. Empty messages are left out on both sides.
        for call, tensors in ((self._gloo.recv, received), (self._gloo.send, sent)):
            for rank, tensor in enumerate(tensors):
                if rank != self.rank() and tensor.numel():
                    works.append(call([_bytes(tensor)], rank, ALL_TO_ALL_TAG))
        return Pending(works, lambda: _bring_all_back(outputs, received))

    def send(self, tensors: list[Tensor], dst: int, tag: int = 0) -> Pending:
        # gloo's work keeps the host copy alive until it has been sent.
        return Pending([self._gloo.send([_bytes(_to_host(tensors[0]))], dst, tag)])

    def recv(self, tensors: list[Tensor], src: int, tag: int = 0) -> Pending:
        (tensor,) = tensors
        host = torch.empty(tensor.shape, dtype=tensor.dtype)
        return Pending([self._gloo.recv([_bytes(host)], src, tag)], lambda: _bring_back(tensor, host))

    def barrier(self, opts: Any = None) -> Pending:
        return Pending([self._gloo.barrier()])

    def _reduce(self, host: Tensor, opts: Any) -> tuple[Any, float]:
        """Start gloo's reduction of ``host``; return its work, and a factor for averages, which gloo lacks.
        """
        ours, wanted = dist.AllreduceOptions(), dist.ReduceOp.SUM if opts is None else opts.reduceOp
        average = wanted == dist.ReduceOp.AVG
        ours.reduceOp = dist.ReduceOp.SUM if average else wanted
        return self._gloo.allreduce([host], ours), 1 / self.size() if average else 1.0


def _to_host(tensor: Tensor) -> Tensor:
    """Copy to contiguous host memory; waits for all work queued on the current stream."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _wide(host: Tensor) -> Tensor:
    """Widen narrow floats to float32. Done on the host, so the GPU's memory never holds the wide copy."""
    return host.float() if host.is_floating_point() and host.itemsize < 4 else host


def _bytes(host: Tensor) -> Tensor:
    return host.view(-1).view(torch.uint8)


def _bring_back(tensor: Tensor, host: Tensor, scale: float = 1.0) -> None:
    if scale != 1.0:
        host = host * scale
    tensor.copy_(host.to(tensor.dtype).view(tensor.shape))


def _bring_all_back(tensors: Sequence[Tensor], hosts: Sequence[Tensor]) -> None:
    for tensor, host in zip(tensors, hosts, strict=True):
        _bring_back(tensor, host)


class AloneGroup(PythonGroup):
    """One rank that simulates all others; every call is complete when it returns.

    Args:
        fills_gathers_in_place: what a gather whose input lies in its output does with the other ranks' parts.
            False: leave them. ZeRO-1 and 2 gather updated weights in place, so the other ranks' weights keep
            their values. True: fill them too. ZeRO-3 gathers into a new buffer, whose other parts hold
            whatever was in that memory before, NaN included.
    """

    def __init__(self, rank: int, size: int, *, fills_gathers_in_place: bool = False) -> None:
        super().__init__(rank, size)
        self.fills_gathers_in_place = fills_gathers_in_place
        self._sent: Tensor | None = None

    def getBackendName(self) -> str:
        """Return the name that torch shows in messages."""
        return ALONE

    def shutdown(self) -> None:
        """Do nothing: the group holds no resources."""

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Pending:
        """Leave the tensor as it is, as if all other ranks had zeros."""
        return Pending()

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> Pending:
        """Leave the tensor as it is, as if the root had the same."""
        return Pending()

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Pending:
        """Fill every output with this rank's input; see the class for gathers in place."""
        own = outputs[0][self.rank()]
        in_place = own.data_ptr() == inputs[0].data_ptr()
        if not in_place or self.fills_gathers_in_place:
            for output in outputs[0]:
                if not in_place or output is not own:
                    _fill(output, inputs[0])
        return Pending()

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> Pending:
        """Return this rank's own part, as if all other ranks had zeros."""
        own = inputs[0][self.rank()]
        if outputs[0].data_ptr() != own.data_ptr():
            _fill(outputs[0], own)
        return Pending()

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Pending:
        """Fill the output from rank r with the data sent to rank r; if that is empty, with the longest input.
        """
        longest = max(inputs, key=Tensor.numel)
        for output, own in zip(outputs, inputs, strict=True):
            _fill(output, own if own.numel() else longest)
        return Pending()

    def send(self, tensors: list[Tensor], dst: int, tag: int = 0) -> Pending:
        """Keep the tensor for the next ``recv``."""
        (self._sent,) = tensors
        return Pending()

    def recv(self, tensors: list[Tensor], src: int, tag: int = 0) -> Pending:
        """Fill with the tensor that was sent last, or with zeros if none was."""
        sent, self._sent = self._sent, None
        _fill(tensors[0], tensors[0].new_empty(0) if sent is None else sent)
        return Pending()

    def barrier(self, opts: Any = None) -> Pending:
        """Return at once."""
        return Pending()


@torch.no_grad()
def _fill(output: Tensor, source: Tensor) -> None:
    """Repeat ``source`` until ``output`` is full; write zeros if ``source`` is empty."""
    to, source = output.view(-1), source.reshape(-1)
    if not source.numel():
        to.zero_()
        return
    whole = to.numel() // source.numel() * source.numel()
    to[:whole].view(-1, source.numel()).copy_(source)
    to[whole:].copy_(source[: to.numel() - whole])
