"""How fast this GPU can be: rates measured here, and the peak that its data sheet promises."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch

from eagle_ds.estimate.planner import GIB, Device
from eagle_ds.kernels.attention import KeyBounds
from eagle_ds.kernels.attention_cuda import CudnnBackend

DATA_SHEETS = (
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("H200", 989.0),
    ("B200", 2250.0),
    ("A100", 312.0),
)
"""(part of the device's name, dense bfloat16 TFLOP/s without sparsity), the first that matches."""

REST_S = 0.5


def data_sheet_tflops(gpu: str) -> float | None:
    """Dense bfloat16 peak of the GPU called ``gpu``; None for one that is not listed."""
    return next((tflops for name, tflops in DATA_SHEETS if name in gpu), None)


@cache
def measure_ceilings(device: torch.device) -> Device:
    """This GPU's rates, TFLOP/s: matmul 8192^3, and causal attention of 32K tokens, 32 heads over 8, d = 128. Once a process."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    matmul = 2 * 8192**3 / _seconds(lambda: a @ b, 20)
    rows = 32768
    q, k, v, dout = (torch.randn(rows, heads, 128, device=device, dtype=torch.bfloat16) for heads in (32, 8, 8, 32))
    bounds = KeyBounds.make(np.zeros(rows, dtype=np.int64), np.arange(1, rows + 1), device)
    kernel, scale = CudnnBackend(), 128**-0.5
    out, lse = kernel.forward(q, k, v, bounds, scale)
    dk, dv = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
    work = 4 * 32 * 128 * rows * (rows + 1) / 2
    forward = work / _seconds(lambda: kernel.forward(q, k, v, bounds, scale), 5)
    backward = 2.5 * work / _seconds(lambda: kernel.backward(dout, q, k, v, out, lse, bounds, scale, dk, dv), 3)
    total = torch.cuda.get_device_properties(device).total_memory / GIB
    return Device(torch.cuda.get_device_name(device), total, matmul / 1e12, forward / 1e12, backward / 1e12, "measured in this run")


def _seconds(work: Callable[[], Any], repeats: int) -> float:
    """The fastest of three bursts, each after a rest: a GPU that comes hot from a step clocks down, and would flatter the step."""
    work()
    bursts = []
    for _ in range(3):
        torch.cuda.synchronize()
        time.sleep(REST_S)
        started = time.perf_counter()
        for _ in range(repeats):
            work()
        torch.cuda.synchronize()
        bursts.append((time.perf_counter() - started) / repeats)
    return min(bursts)
