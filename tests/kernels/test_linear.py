"""Layers that add inside their matmul agree with an ordinary layer and ordinary sums, gradients included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from eagle_ds.kernels.linear import ChainedLinear, ResidualLinear


def gradients(output: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    seed = torch.arange(output.numel(), dtype=output.dtype).view_as(output)
    return list(torch.autograd.grad(output, leaves, seed, allow_unused=True))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("readers", [0, 1, 2])
def test_a_chained_layer_sums_the_gradients_of_later_readers(bias: bool, readers: int) -> None:
    layers = [ChainedLinear(5, 4, bias=bias).double() for _ in range(readers + 1)]
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    leaves, passed, parts = [x, *(p for layer in layers for p in layer.parameters())], x, []
    for layer in layers:
        part, passed = layer(passed)
        parts.append(part)
    expected = sum(nn.functional.linear(x, layer.weight, layer.bias) for layer in layers) + x[:, :4] ** 2
    output = sum(parts) + passed[:, :4] ** 2
    torch.testing.assert_close(output, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(gradients(output, leaves), gradients(expected, leaves), rtol=1e-13, atol=1e-13)


def test_a_chained_layer_without_later_readers_or_whose_output_is_not_read() -> None:
    layer, x = ChainedLinear(5, 4).double(), torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    y, passed = layer(x)
    expected = gradients(nn.functional.linear(x, layer.weight, layer.bias), [x])
    torch.testing.assert_close(gradients(y, [x]), expected, rtol=1e-13, atol=0)
    dx, dw = gradients(layer(x)[1] * 2, [x, layer.weight])
    assert torch.equal(dx, 2 * torch.arange(35.0, dtype=torch.float64).view(7, 5))
    assert dw is None and passed.shape == x.shape


@pytest.mark.parametrize("bias", [False, True])
def test_a_residual_layer_adds(bias: bool) -> None:
    layer = ResidualLinear(5, 4, bias=bias).double()
    x, residual = (torch.randn(7, width, dtype=torch.float64, requires_grad=True) for width in (5, 4))
    leaves = [x, residual, *layer.parameters()]
    output, expected = layer(x, residual), nn.functional.linear(x, layer.weight, layer.bias) + residual
    torch.testing.assert_close(output, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(gradients(output, leaves), gradients(expected, leaves), rtol=1e-13, atol=1e-13)
