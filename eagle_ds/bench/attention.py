"""Time the attention of one TTT step by itself: training's rows through training's kernels and others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eagle_ds.kernels.attention import KeyBounds, ReferenceAttention
from eagle_ds.kernels.backend import choose_attention
from eagle_ds.sharding import ranges as rg
from eagle_ds.sharding.sequence import Document

BACKWARD_WORK = 2.5  # FLOPs of the backward / FLOPs of the forward: five matmuls instead of two


@dataclass(frozen=True)
class Heads:
    """Number of query heads and KV heads of one rank, and the width of a head."""

    query: int
    kv: int
    width: int


def time_attention(
    documents: list[Document], heads: Heads, ttt_steps: int, repeats: int
) -> Iterator[dict[str, Any]]:
    """Time forward and backward for the trained rows of ``documents``, packed end to end. Needs a GPU.

    Inputs are random bfloat16 numbers. Trained rows follow the "serving" alignment.

    Yields:
        One dict per backend, with milliseconds (the fastest of ``repeats``) and TFLOP/s.

    Raises:
        ValueError: no GPU kernel supports this head width.
    """
    lo, hi, keys = intervals(documents, ttt_steps)
    bounds = KeyBounds.make(lo, hi, torch.device("cuda"))
    q, dout = (_random(len(lo), heads.query, heads.width) for _ in range(2))
    k, v = (_random(keys, heads.kv, heads.width) for _ in range(2))
    dk, dv = (torch.zeros(k.shape, device=k.device) for _ in range(2))
    # A query-key pair of one head costs 2 d for the score and 2 d for the weighted value.
    scale, work = heads.width**-0.5, 4.0 * float((hi - lo).sum()) * heads.query * heads.width
    for backend in _backends(heads.width):
        out, lse = backend.forward(q, k, v, bounds, scale)
        forward = _fastest_ms(lambda b=backend: b.forward(q, k, v, bounds, scale), repeats)
        # The defaults bind the loop's variables now; a plain closure would see their later values.
        backward = _fastest_ms(
            lambda b=backend, o=out, s=lse: b.backward(dout, q, k, v, o, s, bounds, scale, dk, dv), repeats
        )
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
    """Return for every trained row its first key and the end of its keys, and the number of all keys."""
    lo, hi, start = [], [], 0
    for document in documents:
        rows = start + rg.rows(document.trained_rows(ttt_steps, "serving"))
        lo.append(np.full_like(rows, start))
        hi.append(rows + 1)
        start += document.num_tokens
    return np.concatenate(lo), np.concatenate(hi), start


def _backends(width: int) -> list[ReferenceAttention]:
    """Return the backend that training chooses on this GPU and, if that is another one, Triton alone."""
    chosen = choose_attention("cuda", torch.bfloat16, width)
    if type(chosen) is ReferenceAttention:
        raise ValueError(f"no GPU kernel supports head width {width}; use a power of two from 16 to 256")
    from eagle_ds.kernels.attention_triton import TritonBackend  # optional: CPU machines may have no Triton

    if type(chosen) is TritonBackend:
        return [chosen]
    return [chosen, TritonBackend(width, chosen.programs)]


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
