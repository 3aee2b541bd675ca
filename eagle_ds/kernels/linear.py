"""Linear layers and products that do more than y = W x: add what stands beside them in the same matmul, which saves a pass over memory
and a rounding each, or lend their weights.

The layers are ``torch.nn.Linear`` with other inputs and outputs; ``y = linear(x)`` and plain ``+`` are their reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from eagle_ds.kernels.fused import is_half_on_gpu


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b; on a GPU in one kernel, which rounds nothing on the way to a float32 ``total``."""
    if is_half_on_gpu(a):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


class LendingLinear(nn.Linear):
    """Called with nothing, hands out copies of its parameters, for matmuls elsewhere. As a call, because ZeRO-3 has the numbers of a
    parameter there only while its module is called."""

    def forward(self, x: Tensor | None = None) -> Any:  # type: ignore[override]
        """x [M, in] -> [M, out]; None -> (weight, bias)."""
        if x is None:
            return self.weight.clone(), None if self.bias is None else self.bias.clone()
        return super().forward(x)


class ResidualLinear(nn.Linear):
    """The result is added to what it changes. By autograd's own addmm, because recomputation ends in front of it and not behind, as it
    would with a Function; under ZeRO-3 its view of the weight keeps the gathered numbers until the backward."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]
        """x [M, in], residual [M, out] -> [M, out]."""
        if self.bias is not None:
            residual = residual + self.bias
        return torch.addmm(residual, x, self.weight.t())


class PassingLinear(nn.Linear):
    """Hands its input on to the next reader, whose gradient for it comes back through here and is added to by the matmul. The last
    reader is an ordinary layer."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [M, in] -> ([M, out], x)."""
        y, x = _Passing.apply(x, self.weight)
        return (y if self.bias is None else y + self.bias), x


class _Passing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight)  # the parameter itself, no view of it: ZeRO-3 lets go of its numbers in between
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
