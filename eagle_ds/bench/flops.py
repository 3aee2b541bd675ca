"""How much floating-point work a training step needs, and how fast this GPU can do such work.

``model_flops`` counts the work analytically. ``measure_ceilings`` measures the rates that the GPU reaches
with the fastest kernels known here; ``data_sheet_tflops`` gives the peak from the vendor's data sheet.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch

from eagle_ds.config.recipe import Recipe
from eagle_ds.estimate.devices import GIB, Device
from eagle_ds.estimate.step_time import projection_macs
from eagle_ds.estimate.tensor_sizes import draft_parameters
from eagle_ds.kernels.attention import KeyBounds
from eagle_ds.sharding import ranges as rg
from eagle_ds.sharding.sequence import SequenceSharding

DATA_SHEETS = (
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("H200", 989.0),
    ("B200", 2250.0),
    ("A100", 312.0),
)
"""(part of the device's name, dense bfloat16 TFLOP/s without sparsity). The first match counts."""

REST_S = 0.5


def model_flops(recipe: Recipe, sharding: SequenceSharding) -> float:
    """Return the FLOPs of forward and backward of one sequence, summed over its ranks.

    Counts the rows that the sharding computes, and each operation once: nothing that is recomputed is added.

    - A weight, for one row: 2 FLOPs forward and 4 backward.
    - A query-key pair of one head of width d: 4 d forward (scores, values) and 8 d backward. A flash kernel
      recomputes the scores, so its backward takes 10 d. The floor counts 10 d, this function does not.
    - The target's head: forward only, once per target row.
    """
    draft, steps, parameters = recipe.draft, sharding.ttt_steps, draft_parameters(recipe)
    query_width = draft.num_attention_heads * draft.head_dim
    context, rows = sharding.num_tokens, sharding.num_queries
    # Ranks read overlapping target rows; normalize() counts each row once.
    target_rows = (r for rank in range(sharding.world) for r in sharding.target_rows(rank))
    labels = rg.count(rg.normalize(target_rows))
    macs = context * parameters["fc"] + projection_macs(recipe, context, rows, labels)
    macs += rows * steps * (query_width * draft.hidden_size + parameters["mlp"] + parameters["lm_head"])
    # Each TTT step attends to the prefix; step k also to its k diagonal keys: 0 + 1 + ... + (T - 1) per row.
    prefix_pairs = steps * sum(sharding.attention_work(r) for r in range(sharding.ring))
    pairs = prefix_pairs + rows * steps * (steps - 1) // 2
    head = labels * draft.vocab_size * recipe.target.hidden_size
    return 6.0 * macs + 12.0 * pairs * query_width + 2.0 * head


def data_sheet_tflops(gpu: str) -> float | None:
    """Return the dense bfloat16 peak of the GPU named ``gpu`` in TFLOP/s; None for a GPU that is not listed.
    """
    return next((tflops for name, tflops in DATA_SHEETS if name in gpu), None)


@cache
def measure_ceilings(device: torch.device) -> Device:
    """Measure this GPU's rates in TFLOP/s, once per process.

    Matmul: 8192^3 in bfloat16. Attention: causal, 32K tokens, 32 query heads, 8 KV heads, d = 128, with
    cuDNN.
    """
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    matmul = 2 * 8192**3 / _seconds(lambda: a @ b, 20)
    rows, heads, width = 32768, 32, 128
    shapes = [(rows, count, width) for count in (heads, 8, 8, heads)]
    q, k, v, dout = (torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in shapes)
    bounds = KeyBounds.make(np.zeros(rows, dtype=np.int64), np.arange(1, rows + 1), device)
    from eagle_ds.kernels.attention_cudnn import CudnnBackend  # optional: CPU machines may have no Triton

    kernel, scale = CudnnBackend(), width**-0.5
    out, lse = kernel.forward(q, k, v, bounds, scale)
    dk, dv = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
    work = 4 * heads * width * rows * (rows + 1) / 2
    forward = work / _seconds(lambda: kernel.forward(q, k, v, bounds, scale), 5)
    backward_s = _seconds(lambda: kernel.backward(dout, q, k, v, out, lse, bounds, scale, dk, dv), 3)
    tflops = [rate / 1e12 for rate in (matmul, forward, 2.5 * work / backward_s)]
    total = torch.cuda.get_device_properties(device).total_memory / GIB
    return Device(torch.cuda.get_device_name(device), total, *tflops, "measured in this run")


def _seconds(work: Callable[[], Any], repeats: int) -> float:
    """Return the seconds of one call, from the fastest of three bursts.

    The GPU rests before each burst. A GPU that is hot from a training step lowers its clock, which would
    lower the ceilings and flatter the step.
    """
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
