"""A process group written in Python: torch's calls brought down to eight that a subclass answers.

torch names the same collective differently from version to version (``_allgather_base`` became ``all_gather_single``) and has
several forms of each; every form that torch.distributed and DeepSpeed call is here, on top of those eight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Pending:
    """A collective under way: some works of other groups, and what is left to do once they are done."""

    def __init__(self, works: Sequence[Any] = (), finish: Callable[[], None] | None = None) -> None:
        self._works, self._finish = list(works), finish

    def wait(self, timeout: Any = None) -> bool:
        """Block until the result is there."""
        for work in self._works:
            work.wait()
        if self._finish is not None:
            with torch.no_grad():
                self._finish()
        self._works, self._finish = [], None
        return True

    def is_completed(self) -> bool:
        """Whether ``wait`` would return without waiting for another rank."""
        return all(work.is_completed() for work in self._works)


class PythonGroup(dist.ProcessGroup):
    """Lists of tensors are torch's: one list or tensor a device of this process, of which there is one."""

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Pending:
        """Reduce ``tensors[0]`` in place by ``opts.reduceOp``."""
        raise NotImplementedError

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> Pending:
        """``tensors[0]`` of rank ``opts.rootRank`` to all."""
        raise NotImplementedError

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Pending:
        """``outputs[0][r]`` becomes rank r's ``inputs[0]``; as many elements, in any shape."""
        raise NotImplementedError

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> Pending:
        """``outputs[0]`` of rank r becomes the reduction of all ranks' ``inputs[0][r]``, by ``opts.reduceOp``."""
        raise NotImplementedError

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Pending:
        """``outputs[r]`` becomes what rank r has at ``inputs[own rank]``; sizes may differ, zero included."""
        raise NotImplementedError

    def send(self, tensors: list[Tensor], dst: int, tag: int = 0) -> Pending:
        """Start sending ``tensors[0]``; it must not change before ``wait``."""
        raise NotImplementedError

    def recv(self, tensors: list[Tensor], src: int, tag: int = 0) -> Pending:
        """Start receiving; ``tensors[0]`` is filled by ``wait``."""
        raise NotImplementedError

    def barrier(self, opts: Any = None) -> Pending:
        """Wait for all ranks."""
        raise NotImplementedError

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Pending:
        return self.allgather([list(output.view(-1).tensor_split(self.size()))], [input])

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any) -> Pending:
        return self.reduce_scatter([output], [list(input.view(-1).tensor_split(self.size()))], opts)

    def all_to_all_single(
        self, output: Tensor, input: Tensor, output_splits: Sequence[int] | None, input_splits: Sequence[int] | None, opts: Any = None
    ) -> Pending:
        return self.alltoall(self._split(output, output_splits), self._split(input, input_splits))

    def reduce(self, tensors: list[Tensor], opts: Any) -> Pending:
        """Only the root's tensor changes."""
        own = tensors[0]
        return self.allreduce([own if self.rank() == opts.rootRank else own.clone()], opts)

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any) -> Pending:
        nothing = inputs[0].new_empty(0)
        received = outputs[0] if self.rank() == opts.rootRank else [nothing] * self.size()
        return self.alltoall(received, [inputs[0] if rank == opts.rootRank else nothing for rank in range(self.size())])

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> Pending:
        nothing = outputs[0].new_empty(0)
        sent = inputs[0] if self.rank() == opts.rootRank else [nothing] * self.size()
        return self.alltoall([outputs[0] if rank == opts.rootRank else nothing for rank in range(self.size())], sent)

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> Pending:
        return self._one_by_one(self.allreduce([tensor], opts) for tensor in tensors)

    def all_gather_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Pending:
        return self._one_by_one(self.all_gather_single(*pair, opts) for pair in zip(outputs, inputs, strict=True))

    def reduce_scatter_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Pending:
        return self._one_by_one(self.reduce_scatter_single(*pair, opts) for pair in zip(outputs, inputs, strict=True))

    # torch 2.11's names
    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    alltoall_base = all_to_all_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def _start_coalescing(self, device: Any = None) -> None:
        """torch collects what may go as one message; here each goes alone."""

    def _end_coalescing(self, device: Any = None) -> Pending:
        return Pending()

    def _one_by_one(self, works: Any) -> Pending:
        """Done when it returns: torch drops the work of a coalesced call in favour of ``_end_coalescing``'s."""
        for work in works:
            work.wait()
        return Pending()

    def _split(self, tensor: Tensor, splits: Sequence[int] | None) -> list[Tensor]:
        """Along the first dimension, a part for each rank."""
        return list(tensor.split(list(splits)) if splits else tensor.tensor_split(self.size()))
