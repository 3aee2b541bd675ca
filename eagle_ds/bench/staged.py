"""Process groups whose tensors travel through host memory over gloo, so that several ranks can share one GPU.

NCCL refuses two ranks on one GPU, and gloo takes GPU tensors for some collectives only. Here every collective copies to the
host, lets gloo carry it, and copies back in ``wait``. That proves layouts with the GPU's kernels on a machine with one GPU. It
is slow and blocks the GPU's stream at every call: nothing timed under it means anything.

Types narrower than float32 are summed in float32 and rounded once. What only moves goes as bytes, so every type does.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from eagle_ds.bench.python_group import Pending, PythonGroup

BACKEND = "staged"
ALL_TO_ALL_TAG = 1 << 16  # of the messages that an all-to-all is made of; those of send and recv are the caller's, usually 0


def register_staged() -> None:
    """Make ``init_process_group(BACKEND)`` and ``new_group(backend=BACKEND)`` known to torch.distributed."""
    dist.Backend.register_backend(BACKEND, _make_group, extended_api=True, devices=["cpu", "cuda"])


def _make_group(options: Any, _: Any) -> StagedGroup:
    return StagedGroup(dist.ProcessGroupGloo(options.store, options.group_rank, options.group_size, timeout=options.timeout))


class StagedGroup(PythonGroup):
    """Ranks that talk through ``gloo``; tensors may lie on any device."""

    def __init__(self, gloo: dist.ProcessGroupGloo) -> None:
        super().__init__(gloo.rank(), gloo.size())
        self._gloo = gloo

    def getBackendName(self) -> str:
        """What torch calls it in messages."""
        return BACKEND

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

        def finish() -> None:
            for output, host in zip(outputs[0], hosts, strict=True):
                _bring_back(output, host)

        return Pending([work], finish)

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
        others = [rank for rank in range(self.size()) if rank != self.rank()]
        works = [self._gloo.recv([_bytes(received[rank])], rank, ALL_TO_ALL_TAG) for rank in others if received[rank].numel()]
        works += [self._gloo.send([_bytes(sent[rank])], rank, ALL_TO_ALL_TAG) for rank in others if sent[rank].numel()]

        def finish() -> None:
            for output, host in zip(outputs, received, strict=True):
                _bring_back(output, host)

        return Pending(works, finish)

    def send(self, tensors: list[Tensor], dst: int, tag: int = 0) -> Pending:
        return Pending([self._gloo.send([_bytes(_to_host(tensors[0]))], dst, tag)])  # gloo's work keeps the copy alive

    def recv(self, tensors: list[Tensor], src: int, tag: int = 0) -> Pending:
        (tensor,) = tensors
        host = torch.empty(tensor.shape, dtype=tensor.dtype)
        return Pending([self._gloo.recv([_bytes(host)], src, tag)], lambda: _bring_back(tensor, host))

    def barrier(self, opts: Any = None) -> Pending:
        return Pending([self._gloo.barrier()])

    def _reduce(self, host: Tensor, opts: Any) -> tuple[Any, float]:
        """Gloo's work, and what to multiply its result with: it knows no average."""
        ours, wanted = dist.AllreduceOptions(), dist.ReduceOp.SUM if opts is None else opts.reduceOp
        average = wanted == dist.ReduceOp.AVG
        ours.reduceOp = dist.ReduceOp.SUM if average else wanted
        return self._gloo.allreduce([host], ours), 1 / self.size() if average else 1.0


def _to_host(tensor: Tensor) -> Tensor:
    """A contiguous copy, after all that the current stream has been given."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _wide(host: Tensor) -> Tensor:
    """On the host, so that the GPU's memory holds no wide copy."""
    return host.float() if host.is_floating_point() and host.itemsize < 4 else host


def _bytes(host: Tensor) -> Tensor:
    return host.view(-1).view(torch.uint8)


def _bring_back(tensor: Tensor, host: Tensor, scale: float = 1.0) -> None:
    if scale != 1.0:
        host = host * scale
    tensor.copy_(host.to(tensor.dtype).view(tensor.shape))
