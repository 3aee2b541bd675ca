"""Attention of one TTT step by itself: the rows that training makes, through the kernels that training picks, beside the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eagle_ds.kernels.attention import BlockAttention, KeyBounds, ReferenceAttention
from eagle_ds.kernels.attention_cuda import TritonBackend, choose_attention
from eagle_ds.sharding import ranges as rg
from eagle_ds.sharding.sequence import Document

BACKWARD_WORK = 2.5  # of the forward's: five matmuls, not two


@dataclass(frozen=True)
class Heads:
    """Query heads, KV heads and their width, on one rank."""

    query: int
    kv: int
    width: int


def time_attention(documents: list[Document], heads: Heads, ttt_steps: int, repeats: int) -> Iterator[dict[str, Any]]:
    """One line a backend: ms and TFLOP/s of forward and backward, the fastest of ``repeats``, for the trained rows of ``documents``
    packed end to end. Of random bf16 numbers; rows that are trained are those of ``serving`` alignment.

    Raises ValueError for a head width that no GPU kernel takes."""
    lo, hi, keys = intervals(documents, ttt_steps)
    bounds = KeyBounds.make(lo, hi, torch.device("cuda"))
    q, dout = (_random(len(lo), heads.query, heads.width) for _ in range(2))
    k, v = (_random(keys, heads.kv, heads.width) for _ in range(2))
    dk, dv = (torch.zeros(k.shape, device=k.device) for _ in range(2))
    scale, work = heads.width**-0.5, 4.0 * float((hi - lo).sum()) * heads.query * heads.width
    for backend in _backends(heads.width):
        out, lse = backend.forward(q, k, v, bounds, scale)
        forward = _fastest_ms(lambda b=backend: b.forward(q, k, v, bounds, scale), repeats)
        backward = _fastest_ms(lambda b=backend, o=out, s=lse: b.backward(dout, q, k, v, o, s, bounds, scale, dk, dv), repeats)
        yield {
            "backend": type(backend).__name__,
            "rows": len(lo),
            "keys": keys,
            "documents": len(documents),
            "heads": [heads.query, heads.kv, heads.width],
            "forward_ms": round(forward, 3),
            "forward_tflops": round(work / forward / 1e9),
            "backward_ms": round(backward, 3),
            "backward_tflops": round(BACKWARD_WORK * work / backward / 1e9),
        }


def intervals(documents: Iterable[Document], ttt_steps: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(first key, key behind the last, number of keys) of every trained row."""
    lo, hi, start = [], [], 0
    for document in documents:
        rows = start + rg.rows(document.trained_rows(ttt_steps, "serving"))
        lo.append(np.full_like(rows, start))
        hi.append(rows + 1)
        start += document.num_tokens
    return np.concatenate(lo), np.concatenate(hi), start


def _backends(width: int) -> list[BlockAttention]:
    """What training picks on this GPU, and Triton alone."""
    chosen = choose_attention("cuda", torch.bfloat16, width)
    if isinstance(chosen, ReferenceAttention):
        raise ValueError(f"no GPU kernel takes heads of {width} numbers; give a power of two from 16 to 256")
    return [chosen] if type(chosen) is TritonBackend else [chosen, TritonBackend(width, chosen.programs)]


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def _fastest_ms(work: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return min(times)
