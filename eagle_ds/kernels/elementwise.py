"""The draft's elementwise work: plain PyTorch, and one Triton kernel each way where a GPU would otherwise move float32 copies.

All pick by device and type; both versions compute in float32 (float64 for float64) and round once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eagle_ds.kernels.fused import is_half_on_gpu


def rotate_plain(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The reference for ``rope``."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def swiglu_plain(gate: Tensor, up: Tensor) -> Tensor:
    """The reference for ``swiglu``."""
    return F.silu(gate) * up


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [M, heads, d] by float32 angles given as cos and sin [M, 1, d/2], pairs (i, i + d/2)."""
    return _Rope.apply(x, cos, sin) if is_half_on_gpu(x) else rotate_plain(x, cos, sin)


def rotate_into(y: Tensor, x: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> None:
    """y overwritten by ``rope`` of x, or by the rotation back; both [M, heads, d], and their rows may lie apart. No autograd."""
    if is_half_on_gpu(x):
        from eagle_ds.kernels.elementwise_triton import rotate

        rotate(x, cos, sin, back=back, y=y)
    else:
        y.copy_(rotate_plain(x, cos, -sin if back else sin))


def swiglu(gate: Tensor, up: Tensor, *, spent: bool = False) -> Tensor:
    """silu(gate) * up, [M, I] (arXiv:2002.05202). Keeps gate and up for the backward, nothing else.

    ``spent``: nothing but this backward reads gate and up, so it writes their gradients over them; a second backward through
    the same graph raises RuntimeError."""
    return _SwiGLU.apply(gate, up, spent) if is_half_on_gpu(gate) else swiglu_plain(gate, up)


class _Rope(torch.autograd.Function):
    """A rotation's transpose is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        from eagle_ds.kernels.elementwise_triton import rotate

        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin, back=False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        from eagle_ds.kernels.elementwise_triton import rotate

        return rotate(grad, *ctx.saved_tensors, back=True), None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, spent: bool) -> Tensor:
        from eagle_ds.kernels.elementwise_triton import swiglu_forward

        ctx.save_for_backward(gate, up)
        ctx.spent = spent
        return swiglu_forward(gate, up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        from eagle_ds.kernels.elementwise_triton import swiglu_backward

        gate, up = (x.detach() for x in ctx.saved_tensors)
        gradients = swiglu_backward(grad, gate, up, in_place=ctx.spent)
        if ctx.spent:
            torch.autograd.graph.increment_version([gate, up])  # a kernel's writes pass autograd by
        return *gradients, None
