"""Which attention runs on a GPU: cuDNN for long runs of rows, Triton for everything else.

A run of rows p = a .. b-1 that sees keys lo .. p is one full block, keys [lo, a) for all of it, and one causal square,
keys [a, b): two calls of cuDNN's kernels (through aten, which takes and returns lse), merged by ``merge``. cuDNN builds
a plan for each new shape, so short and irregular runs go to the Triton kernel, which compiles no shape in.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from eagle_ds.model.attention import BlockAttention, KeyBounds, ReferenceAttention, merge

logger = logging.getLogger(__name__)

MIN_RUN = 4096  # rows; below it cuDNN's plan building and extra passes over dK/dV cost more than its kernels save


class TritonBackend:
    """Interval attention and diagonals in Triton."""

    def __init__(self) -> None:
        from eagle_ds.model import diagonal_triton
        from eagle_ds.model.attention_triton import TritonAttention

        intervals = TritonAttention()
        self.forward, self.backward = intervals.forward, intervals.backward
        self.diagonal_forward, self.diagonal_backward = diagonal_triton.diagonal_forward, diagonal_triton.diagonal_backward


class CudnnBackend(TritonBackend):
    """cuDNN for runs of at least ``min_run`` rows, Triton for the rows between them and for the diagonals."""

    def __init__(self, min_run: int = MIN_RUN) -> None:
        super().__init__()
        self.triton_forward, self.triton_backward = self.forward, self.backward
        self.forward, self.backward = self._forward, self._backward
        self.min_run = min_run

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, bounds: KeyBounds, scale: float) -> tuple[Tensor, Tensor]:
        parts = [
            self._run_forward(q[a:b], k, v, bounds.rows(a, b), causal, scale)
            if causal is not None
            else self.triton_forward(q[a:b], k, v, bounds.rows(a, b), scale)
            for a, b, causal in self._parts(bounds)
        ]
        if len(parts) == 1:
            return parts[0]
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])

    def _backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bounds: KeyBounds, scale: float,
        dk: Tensor, dv: Tensor,
    ) -> Tensor:  # fmt: skip
        dq = []
        for a, b, causal in self._parts(bounds):
            rows = (dout[a:b], q[a:b], k, v, out[a:b], lse[a:b], bounds.rows(a, b))
            dq.append(self.triton_backward(*rows, scale, dk, dv) if causal is None else self._run_backward(*rows, causal, scale, dk, dv))
        return dq[0] if len(dq) == 1 else torch.cat(dq)

    def _parts(self, bounds: KeyBounds) -> list[tuple[int, int, bool | None]]:
        """Long runs, and the rows between them joined (None)."""
        parts: list[tuple[int, int, bool | None]] = []
        for a, b, causal in bounds.runs:
            if b - a >= self.min_run:
                parts.append((a, b, causal))
            elif parts and parts[-1][2] is None:
                parts[-1] = (parts[-1][0], b, None)
            else:
                parts.append((a, b, None))
        return parts or [(0, 0, None)]

    def _run_forward(self, q: Tensor, k: Tensor, v: Tensor, bounds: KeyBounds, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        done = None
        for keys, square in _run_blocks(bounds, causal):
            block = _cudnn_forward(q, k[keys], v[keys], square, scale)
            done = block if done is None else merge(*done, *block)
        if done is None:  # a run that sees nothing in this block of keys
            return torch.zeros_like(q), torch.full(q.shape[:2], -torch.inf, device=q.device)
        return done[0].to(q.dtype), done[1]

    def _run_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bounds: KeyBounds,
        causal: bool, scale: float, dk: Tensor, dv: Tensor,
    ) -> Tensor:  # fmt: skip
        total = None
        for keys, square in _run_blocks(bounds, causal):
            dq, block_dk, block_dv = _cudnn_backward(dout, q, k[keys], v[keys], out, lse, square, scale)
            dk[keys] += block_dk
            dv[keys] += block_dv
            total = dq if total is None else total + dq
        return torch.zeros_like(q) if total is None else total


def _run_blocks(bounds: KeyBounds, causal: bool) -> Iterator[tuple[slice, bool]]:
    """(keys, whether it is a causal square) of one run."""
    lo, first, last = int(bounds.lo[0]), int(bounds.hi[0]), int(bounds.hi[-1])
    if last <= lo:
        return
    if not causal:
        yield slice(lo, last), False
        return
    if lo < first - 1:
        yield slice(lo, first - 1), False
    yield slice(first - 1, last), True


def _heads_first(x: Tensor) -> Tensor:
    """[rows, heads, d] -> [1, heads, rows, d], a view."""
    return x.transpose(0, 1).unsqueeze(0)


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        _heads_first(q), _heads_first(k), _heads_first(v), None, True, 0.0, causal, False, scale=scale
    )
    return out.squeeze(0).transpose(0, 1), lse.reshape(q.shape[1], q.shape[0]).t()


def _cudnn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    seed = torch.zeros((), dtype=torch.int64, device=q.device)
    grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        _heads_first(dout), _heads_first(q), _heads_first(k), _heads_first(v), _heads_first(out),
        lse.t().contiguous().view(1, q.shape[1], q.shape[0], 1), seed, seed, None, None, None, q.shape[0], k.shape[0],
        0.0, causal, scale=scale,
    )  # fmt: skip
    dq, dk, dv = (g.squeeze(0).transpose(0, 1) for g in grads)
    return dq, dk, dv


def choose_attention(device: torch.device | str, dtype: torch.dtype, head_dim: int) -> BlockAttention:
    """The fastest backend that this device and these shapes have; the choice is logged once."""
    backend, reason = _choose(torch.device(device), dtype, head_dim)
    logger.info("attention backend: %s (%s)", type(backend).__name__, reason)
    return backend


def _choose(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[BlockAttention, str]:
    if device.type != "cuda":
        return ReferenceAttention(), f"plain PyTorch on {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return ReferenceAttention(), f"plain PyTorch: the GPU kernels take bfloat16 and float16, not {dtype}"
    if head_dim & (head_dim - 1) or not 16 <= head_dim <= 256:
        return ReferenceAttention(), f"plain PyTorch: head_dim {head_dim} is not a power of two from 16 to 256"
    if torch.cuda.get_device_capability(device) < (9, 0) or not torch.backends.cudnn.is_available():
        return TritonBackend(), "cuDNN's attention with lse wants compute capability 9.0 or newer"
    return CudnnBackend(), f"cuDNN {torch.backends.cudnn.version()} for runs of {MIN_RUN} rows or more, Triton for the rest"
