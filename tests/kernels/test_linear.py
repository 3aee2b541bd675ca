"""Layers that add in their matmuls against an ordinary layer and ordinary sums."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from eagle_ds.kernels.linear import PassingLinear, ResidualLinear


def gradients(output: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(output, leaves, torch.arange(output.numel(), dtype=output.dtype).view_as(output), allow_unused=True))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("readers", [0, 1, 2])
def test_a_passing_layer_gathers_the_gradients_of_later_readers(bias: bool, readers: int) -> None:
    layers = [PassingLinear(5, 4, bias=bias).double() for _ in range(readers + 1)]
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    leaves, handed, parts = [x, *(p for layer in layers for p in layer.parameters())], x, []
    for layer in layers:
        part, handed = layer(handed)
        parts.append(part)
    expected = sum(nn.functional.linear(x, layer.weight, layer.bias) for layer in layers) + x[:, :4] ** 2
    output = sum(parts) + handed[:, :4] ** 2
    torch.testing.assert_close(output, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(gradients(output, leaves), gradients(expected, leaves), rtol=1e-13, atol=1e-13)


def test_a_passing_layer_nobody_reads_after_or_that_nobody_reads() -> None:
    layer, x = PassingLinear(5, 4).double(), torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    y, handed = layer(x)
    torch.testing.assert_close(gradients(y, [x]), gradients(nn.functional.linear(x, layer.weight, layer.bias), [x]), rtol=1e-13, atol=0)
    dx, dw = gradients(layer(x)[1] * 2, [x, layer.weight])
    assert torch.equal(dx, 2 * torch.arange(35.0, dtype=torch.float64).view(7, 5)) and dw is None and handed.shape == x.shape


@pytest.mark.parametrize("bias", [False, True])
def test_a_residual_layer_adds(bias: bool) -> None:
    layer = ResidualLinear(5, 4, bias=bias).double()
    x, residual = (torch.randn(7, width, dtype=torch.float64, requires_grad=True) for width in (5, 4))
    leaves = [x, residual, *layer.parameters()]
    output, expected = layer(x, residual), nn.functional.linear(x, layer.weight, layer.bias) + residual
    torch.testing.assert_close(output, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(gradients(output, leaves), gradients(expected, leaves), rtol=1e-13, atol=1e-13)
