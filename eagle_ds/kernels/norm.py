"""RMSNorm (arXiv:1910.07467): plain PyTorch, and Triton where a GPU would otherwise pass over memory several times.

``norm_into`` writes its result into columns of a tensor that is there already, and may take its rows out of a table on the
way: so z = [norm(embedding) ; norm(state)] is made without a copy of the embedding or of either half, and nothing of the
embedding is kept for the backward but the token ids.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eagle_ds.kernels.fused import is_half_on_gpu


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension, in float32 at least, returned in the type of x [M, W]."""
    return _Norm.apply(x, weight, eps) if is_half_on_gpu(x) else rms_norm_plain(x, weight, eps)


def norm_into(z: Tensor, column: int, x: Tensor, weight: Tensor, eps: float, rows: Tensor | None = None) -> Tensor:
    """``z`` [M, *] with its columns from ``column`` on overwritten by ``rms_norm`` of x [M, W], or of the ``rows`` (int64 [M]) of
    a table x that learns nothing. Whatever stood in those columns must learn nothing either: its gradient is not cut off."""
    if is_half_on_gpu(z):
        return _NormInto.apply(z, x.detach() if rows is not None else x, weight, rows, column, eps)
    return norm_into_plain(z, column, x, weight, eps, rows)


def rms_norm_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, rows: Tensor | None = None, *, dx: Tensor | None = None
) -> Tensor:
    """dw [W] of ``rms_norm``, or of ``norm_into``, for grad [M, W], not rounded to half precision; ``dx`` [M, W], if given, is
    overwritten. No autograd."""
    if is_half_on_gpu(grad):
        from eagle_ds.kernels.norm_triton import norm_backward

        return norm_backward(grad, x, rows, weight, eps, wants_dx=dx is not None, dx=dx)[1]
    leaves = [t.detach().requires_grad_() for t in (x if rows is None else x[rows], weight)]
    with torch.enable_grad():
        y = rms_norm_plain(*leaves, eps)
    d_x, d_weight = torch.autograd.grad(y, leaves, grad)
    if dx is not None:
        dx.copy_(d_x)
    return d_weight


def rms_norm_plain(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The reference for ``rms_norm``."""
    return F.rms_norm(x, weight.shape, weight, eps)


def norm_into_plain(z: Tensor, column: int, x: Tensor, weight: Tensor, eps: float, rows: Tensor | None = None) -> Tensor:
    """The reference for ``norm_into``."""
    x = x if rows is None else F.embedding(rows, x.detach())
    z[:, column : column + len(weight)] = rms_norm_plain(x, weight, eps)
    return z


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        from eagle_ds.kernels.norm_triton import norm_forward

        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return norm_forward(x, None, weight, eps, torch.empty_like(x, memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None]:
        from eagle_ds.kernels.norm_triton import norm_backward

        x, weight = ctx.saved_tensors
        dx, d_weight = norm_backward(grad, x, None, weight, ctx.eps, wants_dx=ctx.needs_input_grad[0])
        return dx, d_weight.to(weight.dtype), None


class _NormInto(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, x: Tensor, weight: Tensor, rows: Tensor | None, column: int, eps: float) -> Tensor:
        from eagle_ds.kernels.norm_triton import norm_forward

        norm_forward(x, rows, weight, eps, z[:, column : column + len(weight)])
        ctx.mark_dirty(z)
        ctx.column, ctx.eps = column, eps
        ctx.table = None if rows is None else x  # no activation: nothing that offloading should carry away
        ctx.save_for_backward(weight, *(() if rows is not None else (x,)), *(() if rows is None else (rows,)))
        return z

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor, None, None, None]:
        from eagle_ds.kernels.norm_triton import norm_backward

        weight, other = ctx.saved_tensors
        x, rows = (other, None) if ctx.table is None else (ctx.table, other)
        grad = dz[:, ctx.column : ctx.column + len(weight)]
        dx, d_weight = norm_backward(grad, x, rows, weight, ctx.eps, wants_dx=ctx.needs_input_grad[1])
        return (dz if ctx.needs_input_grad[0] else None), dx, d_weight.to(weight.dtype), None, None, None
