"""Linear layers with other inputs and outputs than ``y = W x``, and the same parameters.

Two of them do an addition inside their matmul (``addmm``), which saves a pass over memory and a rounding. One
can return copies of its parameters. The reference for all is ``torch.nn.Linear`` and plain ``+``.

With DeepSpeed ZeRO-3 a rank holds a slice of each parameter. The whole parameter exists only while its module
is called: a hook before the call gathers it, a hook after the call frees it. So code that reads a parameter
must run inside ``forward``, and must copy there any values that are needed later.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)  # F.linear is looked up at every call, as DeepSpeed may replace it


class CopyableLinear(nn.Linear):
    """A linear layer that can also return copies of its parameters, for a matmul elsewhere."""

    def forward(self, *inputs: Tensor, compute: Callable[..., Any] = _linear) -> Any:
        """Return ``compute(*inputs, weight, bias)``, by default x [M, in] -> [M, out]."""
        return compute(*inputs, self.weight, self.bias)

    def copy_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Return differentiable copies of weight and bias (None without one)."""
        return self(compute=lambda weight, bias: (weight.clone(), None if bias is None else bias.clone()))


class ResidualLinear(nn.Linear):
    """y = residual + W x, in one ``addmm``.

    This is an ordinary operation, not an autograd Function, because of checkpointing. Recomputation of a
    block stops at the last tensor that a backward needs. The backward of addmm needs x and W, but not y. So
    this matmul, the last one of its block, is not recomputed; a Function would be. With ZeRO-3 the view
    ``weight.t()`` keeps the gathered values alive until the backward.
    """

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]
        """Map x [M, in] and residual [M, out] to [M, out]."""
        if self.bias is not None:
            residual = residual + self.bias
        return torch.addmm(residual, x, self.weight.t())


class ChainedLinear(nn.Linear):
    """y = W x, and x for the next layer that reads it: the gradients of x are then summed inside matmuls.

    If two layers read x, autograd computes two gradients and adds them in another pass over memory. If the
    second layer reads the x that this layer returns, its gradient comes back through this layer, whose
    backward adds its own gradient to it in one ``addmm``. The last layer that reads x is an ordinary one.
    """

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map x [M, in] to ([M, out], x)."""
        y, x = _Chained.apply(x, self.weight)
        return (y if self.bias is None else y + self.bias), x


class _Chained(torch.autograd.Function):
    """(y, x') = (x W^T, x), so dx = dx' + dy W and dW = dy^T x. dx' comes from the later readers of x.

    dy is None if nothing read y, and dx' is None if nothing read x'.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        # Save the parameter itself, not a view: ZeRO-3 frees its values until the backward, and a view of the
        # freed tensor would hold the old storage.
        ctx.save_for_backward(x, weight)
        return x @ weight.t(), x

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dx: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        if dy is None:
            return dx, None
        wants_x, wants_weight = ctx.needs_input_grad
        if wants_x:
            dx = dy @ weight if dx is None else torch.addmm(dx, dy, weight)
        return dx if wants_x else None, dy.t() @ x if wants_weight else None
