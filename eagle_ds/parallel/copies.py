"""Copy strided tensors in 8-byte words, and small tensors without making the host wait for the GPU.

PyTorch copies a tensor that is not dense one number at a time. With 2 bytes each that reaches 1 TB/s on an
H200; in words of 8 bytes it reaches 2 TB/s (docs/benchmarks/h200.md).

A plain ``to`` between host and GPU waits until the GPU has finished all work queued on the current stream.
The queue is then empty, and the GPU is idle until the host has launched more work.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WORD_BYTES = 8


def in_words(x: Tensor) -> Tensor:
    """View ``x`` as int64, 8 bytes a word, where its memory allows that; else return ``x`` itself.

    The last dimension must be dense and a whole number of words long, and every row must start at a whole
    word. The result shares memory with ``x``; no autograd.
    """
    ratio = WORD_BYTES // x.element_size()
    whole = x.dim() > 0 and not any(n % ratio for n in (x.shape[-1], x.storage_offset(), *x.stride()[:-1]))
    return x.detach().view(torch.int64) if ratio > 1 and whole and x.stride(-1) == 1 else x


def dense(x: Tensor) -> Tensor:
    """Return ``x.contiguous()``, copied in words where possible; no autograd."""
    return in_words(x).contiguous().view(x.dtype)


def copy_rows(to: Tensor, rows: Tensor) -> None:
    """Do ``to.copy_(rows)`` for tensors of the same shape and type, in words where possible; no autograd."""
    words = in_words(to), in_words(rows)
    if words[0].dtype == words[1].dtype:
        words[0].copy_(words[1])
    else:
        to.copy_(rows)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy host ``values`` to ``device`` in stream order. The host does not wait.

    Only pinned memory is copied asynchronously, so the values are copied into pinned memory first.
    """
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def to_host(values: Tensor) -> Callable[[], Tensor]:
    """Start copying ``values`` to the host, and return a function that waits for the copy and returns it.

    The wait covers the work that was queued before this call, and nothing queued later. On a CPU the function
    returns ``values`` itself, so nobody may change them until then.
    """
    copy = values.detach().to("cpu", non_blocking=True)
    if not values.is_cuda:
        return lambda: copy
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> Tensor:
        copied.synchronize()
        return copy

    return wait
