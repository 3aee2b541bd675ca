"""Which attention runs on a GPU: cuDNN for large regular blocks, Triton for everything else.

cuDNN's kernels (through aten, which takes and returns lse) are the fastest, but they know only rectangles and causal
squares, and build a plan for each new shape (90 ms). So a sequence's rows are cut into parts:

    run      rows p = a .. b-1 that see keys lo .. p, at least ``min_run`` of them: one full block, keys [lo, a), and one
             causal square, keys [a, b)
    stairs   groups of ``STEP_ROWS`` rows of one document, however scattered: the keys that all rows of a group see, cut to
             a multiple of ``STEP_KEYS`` so that few shapes occur, are a full block; the rest of each row's keys go to Triton
    rows     anything else: Triton, which compiles no shape in
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from eagle_ds.model.attention import BlockAttention, KeyBounds, ReferenceAttention, merge

logger = logging.getLogger(__name__)

MIN_RUN = 4096  # rows; below it cuDNN's plan building and extra passes over dK/dV cost more than its kernels save
STEP_ROWS, STEP_KEYS = 2048, 4096  # at most 32 shapes up to 128K tokens, where Triton keeps about a fifth of the work


class Part(NamedTuple):
    """Query rows [start, stop) and how they are attended."""

    start: int
    stop: int
    kind: Literal["causal run", "full run", "stairs", "rows"]
    shared: tuple[int, ...] = ()  # stairs: keys of each group's full block, from the document's first on

    @property
    def size(self) -> int:
        """Rows."""
        return self.stop - self.start


def cut(bounds: KeyBounds, min_run: int, step: tuple[int, int]) -> Iterator[Part]:
    """Long runs, and between them stairs (of ``step`` rows and keys) and other rows."""
    start = 0
    for a, b, causal in bounds.runs:
        if b - a >= min_run:
            yield from _cut_irregular(bounds, start, a, *step)
            yield Part(a, b, "causal run" if causal else "full run")
            start = b
    yield from _cut_irregular(bounds, start, len(bounds.lo), *step)


def _cut_irregular(bounds: KeyBounds, start: int, stop: int, group: int, keys: int) -> Iterator[Part]:
    """Stairs of each document with rows enough, and the rows between them, joined."""
    edges = np.concatenate([[start], start + 1 + np.flatnonzero(np.diff(bounds.lo[start:stop])), [stop]])
    for i in np.flatnonzero(np.diff(edges) >= group).tolist():  # a window has as many edges as rows
        a, b = int(edges[i]), int(edges[i + 1])
        first_rows = np.arange(a, b - group + 1, group)
        shared = (bounds.hi[first_rows] - bounds.lo[first_rows]) // keys * keys
        first_rows, shared = first_rows[shared > 0], shared[shared > 0]
        if not len(shared):
            continue
        if first_rows[0] > start:
            yield Part(start, int(first_rows[0]), "rows")
        start = int(first_rows[-1]) + group
        yield Part(int(first_rows[0]), start, "stairs", tuple(shared.tolist()))
    if start < stop:
        yield Part(start, stop, "rows")


class TritonBackend:
    """Interval attention and diagonals in Triton."""

    def __init__(self, head_dim: int = 128) -> None:
        from eagle_ds.model import diagonal_triton
        from eagle_ds.model.attention_triton import TritonAttention

        intervals = TritonAttention(head_dim)
        self.forward, self.backward = intervals.forward, intervals.backward
        self.diagonal_forward, self.diagonal_backward = diagonal_triton.diagonal_forward, diagonal_triton.diagonal_backward


class CudnnBackend(TritonBackend):
    """cuDNN for runs and stairs, Triton for the other rows and for the diagonals."""

    def __init__(self, head_dim: int = 128, min_run: int = MIN_RUN, step: tuple[int, int] = (STEP_ROWS, STEP_KEYS)) -> None:
        super().__init__(head_dim)
        self.triton_forward, self.triton_backward = self.forward, self.backward
        self.forward, self.backward = self._forward, self._backward
        self.min_run, self.step = min_run, step

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, bounds: KeyBounds, scale: float) -> tuple[Tensor, Tensor]:
        done = []
        for part in self.parts(bounds):
            rows = (q[part.start : part.stop], k, v, _rows_of(bounds, part))
            if part.kind == "stairs":
                done.append(self.triton_forward(*rows, scale, _stairs_forward(*rows[:3], bounds, part, scale)))
            elif part.kind == "rows":
                done.append(self.triton_forward(*rows, scale))
            else:
                done.append(self._run_forward(*rows, part.kind == "causal run", scale))
        if len(done) == 1:
            return done[0]
        return torch.cat([out for out, _ in done]), torch.cat([lse for _, lse in done])

    def _backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bounds: KeyBounds, scale: float,
        dk: Tensor, dv: Tensor,
    ) -> Tensor:  # fmt: skip
        done = []
        for part in self.parts(bounds):
            a, b = part.start, part.stop
            rows = (dout[a:b], q[a:b], k, v, out[a:b], lse[a:b])
            own = _rows_of(bounds, part)
            if part.kind == "stairs":
                done.append(self.triton_backward(*rows, own, scale, dk, dv, _stairs_backward(*rows, bounds, part, scale, dk, dv)))
            elif part.kind == "rows":
                done.append(self.triton_backward(*rows, own, scale, dk, dv))
            else:
                done.append(self._run_backward(*rows, own, part.kind == "causal run", scale, dk, dv))
        return done[0] if len(done) == 1 else torch.cat(done)

    def parts(self, bounds: KeyBounds) -> list[Part]:
        """How the rows are cut, worked out once for each bounds."""
        key = (self.min_run, self.step)
        if key not in bounds.memo:
            bounds.memo[key] = list(cut(bounds, *key)) or [Part(0, 0, "rows")]
        return bounds.memo[key]

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


def _rows_of(bounds: KeyBounds, part: Part) -> KeyBounds:
    """Bounds of the part's rows; for stairs, of the keys behind the full blocks."""
    if part not in bounds.memo:
        own = bounds.rows(part.start, part.stop)
        if part.kind == "stairs":
            behind = own.lo + np.repeat(part.shared, part.size // len(part.shared))
            own = KeyBounds.make(behind, own.hi, own.lo_device.device)
        bounds.memo[part] = own
    return bounds.memo[part]


def _stairs(bounds: KeyBounds, part: Part) -> Iterator[tuple[slice, slice]]:
    """(rows of the part, keys) of each group's full block."""
    group, first = part.size // len(part.shared), int(bounds.lo[part.start])
    for n, shared in enumerate(part.shared):
        yield slice(n * group, (n + 1) * group), slice(first, first + shared)


def _stairs_forward(q: Tensor, k: Tensor, v: Tensor, bounds: KeyBounds, part: Part, scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse) of the part's rows over their full blocks."""
    done = [_cudnn_forward(q[rows], k[keys], v[keys], False, scale) for rows, keys in _stairs(bounds, part)]
    return torch.cat([out for out, _ in done]), torch.cat([lse for _, lse in done])


def _stairs_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bounds: KeyBounds, part: Part, scale: float,
    dk: Tensor, dv: Tensor,
) -> Tensor:  # fmt: skip
    """dq of the part's rows from their full blocks, whose dk and dv are added."""
    done = []
    for rows, keys in _stairs(bounds, part):
        dq, block_dk, block_dv = _cudnn_backward(dout[rows], q[rows], k[keys], v[keys], out[rows], lse[rows], False, scale)
        dk[keys] += block_dk
        dv[keys] += block_dv
        done.append(dq)
    return torch.cat(done)


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
    if head_dim > 128 or torch.cuda.get_device_capability(device) < (9, 0) or not torch.backends.cudnn.is_available():
        return TritonBackend(head_dim), "cuDNN's attention with lse wants head_dim up to 128 and compute capability 9.0 or newer"
    return CudnnBackend(head_dim), f"cuDNN {torch.backends.cudnn.version()} for large blocks, Triton for the rest"
