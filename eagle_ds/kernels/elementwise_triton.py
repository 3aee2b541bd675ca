"""Rotary embedding and SwiGLU in one pass over memory each way; the plain versions are in ``elementwise.py``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _rotate_kernel(X, Y, Cos, Sin, x_row, y_row, HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, HALF: tl.constexpr,
                   BACK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head, half = tl.arange(0, HEADS_PADDED), tl.arange(0, HALF)
    real = (head < HEADS)[:, None]
    cos = tl.load(Cos + row * HALF + half)[None, :]
    sin = tl.load(Sin + row * HALF + half)[None, :]
    if BACK:
        sin = -sin
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
    gate = tl.load(Gate + at, mask=real, other=0.0).to(tl.float32)
    up = tl.load(Up + at, mask=real, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    tl.store(DUp + at, (grad * gate * s).to(DUp.dtype.element_ty), mask=real)
    tl.store(DGate + at, (grad * up * s * (1 + gate * (1 - s))).to(DGate.dtype.element_ty), mask=real)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool, y: Tensor | None = None) -> Tensor:
    """[M, heads, d] rotated by (or back from) float32 angles, cos and sin [M, 1, d/2]; into ``y`` if given, whose rows may lie apart."""
    rows, heads, d = x.shape
    if x.stride()[1:] != (d, 1):
        x = x.contiguous()
    if y is None:
        y = torch.empty(rows, heads, d, dtype=x.dtype, device=x.device)
    assert y.stride()[1:] == (d, 1)
    if rows:
        padded = triton.next_power_of_2(heads)
        cos, sin = cos.contiguous(), sin.contiguous()
        _rotate_kernel[(rows,)](x, y, cos, sin, x.stride(0), y.stride(0), heads, padded, d // 2, back, num_warps=4)
    return y


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    if y.numel():
        _swiglu_forward_kernel[(triton.cdiv(y.numel(), BLOCK),)](gate, up, y, y.numel(), BLOCK)
    return y


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor, *, in_place: bool = False) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up; ``in_place``: written over them, each element after it was read."""
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    d_gate, d_up = (gate, up) if in_place else (torch.empty_like(gate), torch.empty_like(up))
    if grad.numel():
        _swiglu_backward_kernel[(triton.cdiv(grad.numel(), BLOCK),)](grad, gate, up, d_gate, d_up, grad.numel(), BLOCK)
    return d_gate, d_up
