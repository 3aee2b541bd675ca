"""RoPE, SwiGLU and row gather/scatter-add, each in one pass over memory.

All kernels here are bound by memory. Bytes per element, with 2-byte inputs:

    rotate           read x, write y: 4. The angles, float32 [M, d/2] twice, are shared by all heads of a row.
    SwiGLU forward   read gate and up, write y: 6
    SwiGLU backward  read grad, gate and up, write dgate and dup: 10, in place or not
    take_rows        read and write 2 bytes each; one program moves BLOCK columns of one row
    add_rows         read 2, read and write 4 bytes of the float32 total: 10
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # elements of one SwiGLU program
ROW_BLOCK = 2048  # columns of one program that moves rows


@triton.jit
def _rotate_kernel(X, Y, Cos, Sin, x_row, y_row, HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr,
                   HALF: tl.constexpr, BACK: tl.constexpr):  # fmt: skip
    """Rotate all heads of one row: (a, b) -> (a cos - b sin, b cos + a sin) for the pairs (i, i + d/2)."""
    row = tl.program_id(0).to(tl.int64)
    # Triton's ranges are powers of two long; HEADS (9, say) need not be, so the rest is masked.
    head, half = tl.arange(0, HEADS_PADDED), tl.arange(0, HALF)
    real = (head < HEADS)[:, None]
    cos = tl.load(Cos + row * HALF + half)[None, :]
    sin = tl.load(Sin + row * HALF + half)[None, :]
    if BACK:
        sin = -sin
    # Heads are dense within a row, d = 2 * HALF numbers each. Rows may be strided (x_row, y_row).
    at = head[:, None] * 2 * HALF + half[None, :]
    first = tl.load(X + row * x_row + at, mask=real, other=0.0).to(tl.float32)
    second = tl.load(X + row * x_row + at + HALF, mask=real, other=0.0).to(tl.float32)
    out = Y + row * y_row + at
    tl.store(out, (first * cos - second * sin).to(Y.dtype.element_ty), mask=real)
    tl.store(out + HALF, (second * cos + first * sin).to(Y.dtype.element_ty), mask=real)


@triton.jit
def _swiglu_forward_kernel(Gate, Up, Y, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = at < size
    gate = tl.load(Gate + at, mask=real, other=0.0).to(tl.float32)
    up = tl.load(Up + at, mask=real, other=0.0).to(tl.float32)
    tl.store(Y + at, (gate * tl.sigmoid(gate) * up).to(Y.dtype.element_ty), mask=real)


@triton.jit
def _swiglu_backward_kernel(Grad, Gate, Up, DGate, DUp, size, BLOCK: tl.constexpr):
    """d silu(g) = sigmoid(g) * (1 + g * (1 - sigmoid(g)))."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = at < size
    grad = tl.load(Grad + at, mask=real, other=0.0).to(tl.float32)
    # All loads come before the stores: DGate and DUp may be Gate and Up.
    gate = tl.load(Gate + at, mask=real, other=0.0).to(tl.float32)
    up = tl.load(Up + at, mask=real, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    tl.store(DUp + at, (grad * gate * s).to(DUp.dtype.element_ty), mask=real)
    tl.store(DGate + at, (grad * up * s * (1 + gate * (1 - s))).to(DGate.dtype.element_ty), mask=real)


@triton.jit
def _take_rows_kernel(Table, Index, Y, table_row, columns, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = at < columns
    source = tl.load(Index + row)
    tl.store(Y + row * columns + at, tl.load(Table + source * table_row + at, mask=real), mask=real)


@triton.jit
def _add_rows_kernel(Total, Index, X, total_row, columns, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = at < columns
    # No atomics, just load, add and store: rows with the same index are zero, so losing one of two additions
    # to the same place changes nothing.
    to = Total + tl.load(Index + row) * total_row + at
    x = tl.load(X + row * columns + at, mask=real, other=0.0).to(tl.float32)
    tl.store(to, tl.load(to, mask=real, other=0.0) + x, mask=real)


def rotate_into(y: Tensor, x: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> None:
    """Do ``PlainOperations.rotate_into`` for float32 angles. Heads must be dense within a row of y."""
    rows, heads, d = x.shape
    if x.stride()[1:] != (d, 1):
        x = x.contiguous()
    assert y.stride()[1:] == (d, 1)
    if rows:
        sizes = heads, triton.next_power_of_2(heads), d // 2, back
        cos, sin = cos.contiguous(), sin.contiguous()
        _rotate_kernel[(rows,)](x, y, cos, sin, x.stride(0), y.stride(0), *sizes, num_warps=4)


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up."""
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    if y.numel():
        _swiglu_forward_kernel[(triton.cdiv(y.numel(), BLOCK),)](gate, up, y, y.numel(), BLOCK)
    return y


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor, *, in_place: bool) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up; ``in_place`` writes them over gate and up."""
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    d_gate, d_up = (gate, up) if in_place else (torch.empty_like(gate), torch.empty_like(up))
    size = grad.numel()
    if size:
        _swiglu_backward_kernel[(triton.cdiv(size, BLOCK),)](grad, gate, up, d_gate, d_up, size, BLOCK)
    return d_gate, d_up


def take_rows(table: Tensor, index: Tensor, columns: int) -> Tensor:
    """Do ``PlainOperations.take_rows``."""
    y = torch.empty(len(index), columns, dtype=table.dtype, device=table.device)
    if y.numel():
        _take_rows_kernel[_grid(y)](table, index.contiguous(), y, table.stride(0), columns, ROW_BLOCK)
    return y


def add_rows(total: Tensor, index: Tensor, rows: Tensor) -> None:
    """Do ``PlainOperations.add_rows``; ``total`` must be float32 and ``rows`` contiguous."""
    assert total.dtype == torch.float32 and rows.is_contiguous()
    if rows.numel():
        columns = rows.shape[1]
        _add_rows_kernel[_grid(rows)](total, index.contiguous(), rows, total.stride(0), columns, ROW_BLOCK)


def _grid(x: Tensor) -> tuple[int, int]:
    """Return one program for each row and each ROW_BLOCK columns."""
    return len(x), triton.cdiv(x.shape[1], ROW_BLOCK)
