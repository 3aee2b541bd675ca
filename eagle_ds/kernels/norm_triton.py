"""RMSNorm in one pass over memory each way; what it computes stands in ``norm.py``.

With u = x / rms(x): y = w * u, dw = sum over rows of dy * u, dx = (w * dy - u * mean(w * dy * u)) / rms(x). A program of the
backward walks over many rows and keeps its part of dw in registers; the parts are summed afterwards, so the order is fixed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 528  # of the backward: four for each multiprocessor of a Hopper GPU


@triton.jit
def _norm_forward_kernel(X, Rows, W, Y, x_row, y_row, eps, D: tl.constexpr, D_PADDED: tl.constexpr, TABLE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(Rows + row) if TABLE else row
    width = tl.arange(0, D_PADDED)
    real = width < D
    x = tl.load(X + source * x_row + width, mask=real, other=0.0).to(tl.float32)
    w = tl.load(W + width, mask=real, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / D + eps) * w
    tl.store(Y + row * y_row + width, y.to(Y.dtype.element_ty), mask=real)


@triton.jit
def _norm_backward_kernel(DY, X, Rows, W, DX, DW, N, dy_row, x_row, eps, D: tl.constexpr, D_PADDED: tl.constexpr,
                          TABLE: tl.constexpr, WANTS_DX: tl.constexpr):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    width = tl.arange(0, D_PADDED)
    real = width < D
    w = tl.load(W + width, mask=real, other=0.0).to(tl.float32)
    dw = tl.zeros([D_PADDED], dtype=tl.float32)
    for n in tl.range(program, N, programs):
        row = tl.full([], 0, tl.int64) + n
        source = tl.load(Rows + row) if TABLE else row
        x = tl.load(X + source * x_row + width, mask=real, other=0.0).to(tl.float32)
        dy = tl.load(DY + row * dy_row + width, mask=real, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
        u = x * inverse
        dw += dy * u
        if WANTS_DX:
            g = w * dy
            dx = (g - u * (tl.sum(g * u, 0) / D)) * inverse
            tl.store(DX + row * D + width, dx.to(DX.dtype.element_ty), mask=real)
    tl.store(DW + program * D + width, dw, mask=real)


def norm_forward(x: Tensor, rows: Tensor | None, weight: Tensor, eps: float, y: Tensor) -> Tensor:
    """Write the norm of x [M, W], or of the ``rows`` of a table x, into y [M, W], whose rows may lie apart. Returns y."""
    x = _rows_dense(x)
    if len(y):
        _norm_forward_kernel[(len(y),)](
            x, x if rows is None else rows.contiguous(), weight, y, x.stride(0), y.stride(0), eps, **_sizes(weight), TABLE=rows is not None
        )
    return y


def norm_backward(
    dy: Tensor, x: Tensor, rows: Tensor | None, weight: Tensor, eps: float, *, wants_dx: bool, dx: Tensor | None = None
) -> tuple[Tensor | None, Tensor]:
    """(dx [M, W] if asked for, written to the dense ``dx`` if given; dw float32 [W]) for dy [M, W], whose rows may lie apart."""
    dy, x = _rows_dense(dy), _rows_dense(x)
    if dx is None and wants_dx:
        dx = torch.empty(dy.shape, dtype=x.dtype, device=x.device)
    assert dx is None or (wants_dx and dx.is_contiguous() and dx.shape == dy.shape)
    parts = torch.zeros(min(PROGRAMS, max(len(dy), 1)), len(weight), dtype=torch.float32, device=x.device)
    if len(dy):
        _norm_backward_kernel[(len(parts),)](
            dy, x, x if rows is None else rows.contiguous(), weight, x if dx is None else dx, parts, len(dy), dy.stride(0), x.stride(0),
            eps, **_sizes(weight), TABLE=rows is not None, WANTS_DX=wants_dx,
        )  # fmt: skip
    return dx, parts.sum(0)


def _rows_dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _sizes(weight: Tensor) -> dict[str, int]:
    padded = triton.next_power_of_2(len(weight))
    return {"D": len(weight), "D_PADDED": padded, "num_warps": min(max(padded // 512, 1), 16)}
