"""Small copies between host and GPU for which the host does not wait.

A plain ``to`` waits until the GPU has done all that the current stream holds, and then the GPU waits for the host to think of
something more (docs/benchmarks/h200.md has what such pauses cost).
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
    """Begin to copy ``values`` to the host. What is returned waits for what the current stream held before, but for nothing that came
    since, and returns the copy; on a CPU that is ``values`` itself, which nobody may change until then."""
    copy = values.detach().to("cpu", non_blocking=True)
    if not values.is_cuda:
        return lambda: copy
    there = torch.cuda.Event()
    there.record()

    def arrived() -> Tensor:
        there.synchronize()
        return copy

    return arrived
