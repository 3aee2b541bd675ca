"""RMSNorm: the plain version equals the formula; values and gradients of the fused kernels agree with it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eagle_ds.kernels.backend import PlainOperations, operations_for
from tests.micro_batch import relative_error

BF16_BOUND = 4e-3  # one rounding to bfloat16 is 2e-3 in the mean
EPS = 1e-5


def formula(x: Tensor, weight: Tensor) -> Tensor:
    """Return weight * x / sqrt(mean(x^2) + eps)."""
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def halves(
    operations: type[PlainOperations], table: Tensor, rows: Tensor, x: Tensor, weights: list[Tensor]
) -> Tensor:
    """Return z = [norm of the table's rows ; norm of x]."""
    z = x.new_empty(len(x), 2 * x.shape[1])
    z = operations.norm_rows_into(z, 0, table, rows, weights[0], EPS)
    return operations.norm_into(z, x.shape[1], x, weights[1], EPS)


def test_rms_norm_equals_the_formula() -> None:
    x, weight = torch.randn(5, 12, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    assert torch.allclose(operations_for(x).rms_norm(x, weight, EPS), formula(x, weight))


def test_norms_into_halves_equal_the_formula_and_a_table_gets_no_gradient() -> None:
    table, x = (torch.randn(n, 12, dtype=torch.float64, requires_grad=True) for n in (9, 5))
    weights = [torch.randn(12, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    rows = torch.tensor([3, 3, 0, 8, 1])
    found = halves(operations_for(x), table, rows, x, weights)
    expected = torch.cat([formula(table[rows].detach(), weights[0]), formula(x, weights[1])], -1)
    grad = torch.randn_like(found)
    torch.testing.assert_close(found, expected)
    leaves = [x, *weights]
    gradients, gradients_expected = (torch.autograd.grad(z, leaves, grad) for z in (found, expected))
    torch.testing.assert_close(gradients, gradients_expected)


@pytest.mark.gpu
@pytest.mark.parametrize(("count", "width"), [(133, 576), (2000, 4096), (7, 12288), (0, 64)])
def test_the_fused_norm_agrees(count: int, width: int) -> None:
    # Half of a wider tensor, so the rows are strided.
    strided = (torch.randn(count, 2 * width, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    x, grad = (whole[:, :width] for whole in strided)
    weight = torch.randn(width, device="cuda", dtype=torch.bfloat16)
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, weight)]
        y = operations_for(leaves[0]).rms_norm(*leaves, EPS)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, grad.to(dtype))])
    assert all(relative_error(*pair) < BF16_BOUND for pair in zip(*results, strict=True) if pair[0].numel())


@pytest.mark.gpu
@pytest.mark.parametrize(("count", "width"), [(133, 576), (1000, 4096)])
def test_fused_norms_into_halves_agree(count: int, width: int) -> None:
    shapes = ((300, width), (count, width), (count, 2 * width))
    table, x, grad = (torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
    rows = torch.randint(300, (count, 2), device="cuda")[:, 0]
    weights = torch.randn(2, width, device="cuda", dtype=torch.bfloat16)
    results = []
    for operations, dtype in ((operations_for(x), torch.bfloat16), (PlainOperations, torch.float64)):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, *weights)]
        z = halves(operations, table.to(dtype), rows, leaves[0], leaves[1:])
        results.append([z.detach(), *torch.autograd.grad(z, leaves, grad.to(dtype))])
    assert all(relative_error(*pair) < BF16_BOUND for pair in zip(*results, strict=True))
