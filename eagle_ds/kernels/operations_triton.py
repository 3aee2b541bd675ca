"""The operations of `backend.PlainOperations` with Triton kernels, for half precision on a GPU.

This file holds the autograd Functions; the kernels are in norm_triton.py and elementwise_triton.py. Every
kernel computes in float32 and rounds once, while plain PyTorch would write float32 copies of its inputs to
memory.

A Function saves its inputs only. The backward recomputes rms(x) and sigmoid(gate) from them. That costs no
time, because the kernels are bound by memory and not by arithmetic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eagle_ds.kernels import elementwise_triton as elementwise
from eagle_ds.kernels.backend import PlainOperations
from eagle_ds.kernels.loss_triton import TritonKernels
from eagle_ds.kernels.norm_triton import norm_backward, norm_forward


class _Norm(torch.autograd.Function):
    """y = w * u with u = x / rms(x); norm_triton.py derives dx and dw."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        return norm_forward(x, None, weight, eps, y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None]:
        x, weight = ctx.saved_tensors
        dx, d_weight = norm_backward(grad, x, None, weight, ctx.eps, wants_dx=ctx.needs_input_grad[0])
        return dx, d_weight.to(weight.dtype), None


class _NormInto(torch.autograd.Function):
    """z' = z with some columns replaced by norm(x), or by norm(table[rows]).

    In place: z is marked dirty and returned, so no second tensor of its size exists. The backward applies the
    norm's backward to the gradient's columns, and returns the gradient of z' as that of z. Strictly, the
    replaced columns of it should be zero. Zeroing them would cost a pass over memory, and is not needed: no
    value that needs a gradient was in them.
    """

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, x: Tensor, weight: Tensor, rows: Tensor | None, column: int, eps: float
    ) -> Tensor:
        norm_forward(x, rows, weight, eps, z[:, column : column + len(weight)])
        ctx.mark_dirty(z)
        ctx.column, ctx.eps = column, eps
        # Keep a table as an attribute and save only the row numbers. It is no activation, so offloading must
        # not see it.
        ctx.table = None if rows is None else x
        ctx.save_for_backward(weight, x if rows is None else rows)
        return z

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor, None, None, None]:
        weight, saved = ctx.saved_tensors
        x, rows = (saved, None) if ctx.table is None else (ctx.table, saved)
        grad = dz[:, ctx.column : ctx.column + len(weight)]
        dx, d_weight = norm_backward(grad, x, rows, weight, ctx.eps, wants_dx=ctx.needs_input_grad[1])
        return (dz if ctx.needs_input_grad[0] else None), dx, d_weight.to(weight.dtype), None, None, None


class _Rope(torch.autograd.Function):
    """y = R x with R a rotation. R is orthogonal, so dx = R^T dy is the rotation back; x is not saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        elementwise.rotate_into(y, x, cos, sin)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        dx = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
        elementwise.rotate_into(dx, grad, *ctx.saved_tensors, back=True)
        return dx, None, None


class _SwiGLU(torch.autograd.Function):
    """y = silu(g) * u with silu(g) = g * s, s = sigmoid(g).

    du = dy * g * s and dg = dy * u * s * (1 + g * (1 - s)) are elementwise in g and u. So the gradient
    of each element can overwrite it once it has been read, which saves two tensors [M, I] at the peak
    of the backward.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, overwrite: bool) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.overwrite = overwrite
        return elementwise.swiglu_forward(gate, up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        # Detach, because the gradients are returned in the same memory and must not be views of tensors
        # in the graph.
        gate, up = (x.detach() for x in ctx.saved_tensors)
        gradients = elementwise.swiglu_backward(grad, gate, up, in_place=ctx.overwrite)
        if ctx.overwrite:
            # Autograd does not see what a kernel writes. With a new version number, a second backward raises
            # an error instead of computing wrong gradients.
            torch.autograd.graph.increment_version([gate, up])
        return *gradients, None


class TritonOperations(PlainOperations):
    """`PlainOperations` for half precision on a GPU. The docstrings of the methods are there."""

    loss = TritonKernels
    rms_norm = staticmethod(_Norm.apply)
    rope = staticmethod(_Rope.apply)
    rotate_into = staticmethod(elementwise.rotate_into)
    take_rows = staticmethod(elementwise.take_rows)
    add_rows = staticmethod(elementwise.add_rows)

    @staticmethod
    def norm_into(z: Tensor, column: int, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See ``PlainOperations``."""
        return _NormInto.apply(z, x, weight, None, column, eps)

    @staticmethod
    def norm_rows_into(
        z: Tensor, column: int, table: Tensor, rows: Tensor, weight: Tensor, eps: float
    ) -> Tensor:
        """See ``PlainOperations``."""
        return _NormInto.apply(z, table.detach(), weight, rows, column, eps)

    @staticmethod
    def rms_norm_gradients(
        grad: Tensor, x: Tensor, weight: Tensor, eps: float, rows: Tensor | None = None,
        dx: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """See ``PlainOperations``."""
        return norm_backward(grad, x, rows, weight, eps, wants_dx=dx is not None, dx=dx)[1]

    @staticmethod
    def swiglu(gate: Tensor, up: Tensor, *, overwrite: bool = False) -> Tensor:
        """See ``PlainOperations``."""
        return _SwiGLU.apply(gate, up, overwrite)

    @staticmethod
    def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
        """See ``PlainOperations``."""
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
