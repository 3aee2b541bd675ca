"""RMSNorm in one pass over memory each way (arXiv:1910.07467).

Forward, for one row x [W]: u = x / rms(x) with rms(x) = sqrt(mean(x^2) + eps), and y = w * u.

Backward. With g = w * dy, dy/dx gives

    dx_j = g_j / rms - x_j / (W rms^3) * sum_i g_i x_i = (g_j - u_j * mean(g * u)) / rms
    dw   = sum over rows of dy * u

Nothing but x and w is saved: rms(x) is recomputed, one reduction over a row that is read anyway. The forward
moves 2W numbers a row, the backward 3W (read x and dy, write dx).

dw is a sum over all rows. Each program of the backward walks over many rows and keeps its partial sum in
registers, [W] in float32. The partial sums, at most PROGRAMS * W floats, are added afterwards: no atomics, so
the order of the additions, and with it the result, is always the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 528  # of the backward: four for each of the 132 multiprocessors of a Hopper GPU


@triton.jit
def _norm_forward_kernel(X, Rows, W, Y, x_row, y_row, eps, D: tl.constexpr, D_PADDED: tl.constexpr,
                         TABLE: tl.constexpr):  # fmt: skip
    """One program a row. With TABLE, row i of the input is row Rows[i] of X."""
    row = tl.program_id(0).to(tl.int64)  # int64: row * x_row exceeds 2^31 for long sequences
    source = tl.load(Rows + row) if TABLE else row
    width = tl.arange(0, D_PADDED)
    real = width < D
    x = tl.load(X + source * x_row + width, mask=real, other=0.0).to(tl.float32)
    w = tl.load(W + width, mask=real, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / D + eps) * w
    tl.store(Y + row * y_row + width, y.to(Y.dtype.element_ty), mask=real)


@triton.jit
def _norm_backward_kernel(DY, X, Rows, W, DX, DW, N, dy_row, x_row, eps, D: tl.constexpr,
                          D_PADDED: tl.constexpr, TABLE: tl.constexpr, WANTS_DX: tl.constexpr):  # fmt: skip
    """Handle the rows program, program + programs, ...; write their partial dw to row ``program`` of DW."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    width = tl.arange(0, D_PADDED)
    real = width < D
    w = tl.load(W + width, mask=real, other=0.0).to(tl.float32)
    dw = tl.zeros([D_PADDED], dtype=tl.float32)
    for n in tl.range(program, N, programs):
        row = tl.full([], 0, tl.int64) + n  # n as int64
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
    """Write the norm of x [M, W], or of the ``rows`` of a table x, to y [M, W] and return y.

    Rows of x and y may be strided: y may be columns of a wider tensor.
    """
    x = _rows_dense(x)
    if len(y):
        # Without a table the kernel does not read its row index; any pointer will do.
        index = x if rows is None else rows.contiguous()
        _norm_forward_kernel[(len(y),)](
            x, index, weight, y, x.stride(0), y.stride(0), eps, **_sizes(weight), TABLE=rows is not None
        )
    return y


def norm_backward(
    dy: Tensor, x: Tensor, rows: Tensor | None, weight: Tensor, eps: float, *, wants_dx: bool,
    dx: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Return (dx [M, W] or None, dw float32 [W]) for dy [M, W], whose rows may be strided.

    ``dx``, if given, must be contiguous and is overwritten.
    """
    dy, x = _rows_dense(dy), _rows_dense(x)
    if dx is None and wants_dx:
        dx = torch.empty(dy.shape, dtype=x.dtype, device=x.device)
    assert dx is None or (wants_dx and dx.is_contiguous() and dx.shape == dy.shape)
    programs = min(PROGRAMS, max(len(dy), 1))
    partial = torch.zeros(programs, len(weight), dtype=torch.float32, device=x.device)
    if len(dy):
        index, to = x if rows is None else rows.contiguous(), x if dx is None else dx
        _norm_backward_kernel[(programs,)](
            dy, x, index, weight, to, partial, len(dy), dy.stride(0), x.stride(0), eps, **_sizes(weight),
            TABLE=rows is not None, WANTS_DX=wants_dx,
        )  # fmt: skip
    return dx, partial.sum(0)


def _rows_dense(x: Tensor) -> Tensor:
    """Return x, copied if the numbers of a row are not adjacent in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _sizes(weight: Tensor) -> dict[str, int]:
    """Return the compile-time widths, and warps: one for each 512 columns, 1 to 16."""
    padded = triton.next_power_of_2(len(weight))
    return {"D": len(weight), "D_PADDED": padded, "num_warps": min(max(padded // 512, 1), 16)}
