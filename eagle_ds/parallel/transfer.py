"""Small copies between host and GPU for which the host does not wait.

A plain ``to`` waits until the GPU has done all that it was ever asked to do, and then the GPU waits for the host to think of
something more: at 32K tokens on four GPUs, a few such pauses are as long as all the all-to-alls (docs/benchmarks/h200.md).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """``values`` of the host on ``device``, as soon as whatever reads them there gets to run."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def to_host(values: Tensor) -> Callable[[], Tensor]:
    """Begin to copy ``values`` to the host. What is returned waits until the device has done all that was asked of it before, but
    nothing that was asked of it since, and returns them."""
    copy = values.detach().to("cpu", non_blocking=True)
    if not values.is_cuda:
        return lambda: copy
    there = torch.cuda.Event()
    there.record()

    def arrived() -> Tensor:
        there.synchronize()
        return copy

    return arrived
