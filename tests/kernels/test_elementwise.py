"""RoPE and SwiGLU: the fused kernels agree with the plain versions, values and gradients."""

from __future__ import annotations

import pytest
import torch

from eagle_ds.kernels.backend import PlainOperations, operations_for
from eagle_ds.kernels.rope import inverse_frequencies, rotation
from tests.micro_batch import relative_error

BF16_BOUND = 4e-3  # one rounding to bfloat16 is 2e-3 in the mean


def angles(rows: int, d: int, dtype: torch.dtype, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Return (cos, sin) of the positions 0, 7, 14, ..., each [rows, 1, d/2]."""
    frequencies, factor = inverse_frequencies(d, 10000.0, None)
    return rotation(torch.arange(rows, device=device) * 7, frequencies.to(device), factor, dtype)


def test_rope_keeps_lengths_and_its_dot_products_depend_on_distance_alone() -> None:
    x, y = (torch.randn(1, 2, 8, dtype=torch.float64) for _ in range(2))
    cos, sin = angles(6, 8, torch.float64)
    rotated_x, rotated_y = (operations_for(v).rope(v.expand(6, 2, 8), cos, sin) for v in (x, y))
    assert torch.allclose(rotated_x.norm(dim=-1), x.norm(dim=-1).expand(6, 2))
    # x at position i + 1 and y at position i: always the same distance, so always the same product.
    dots = (rotated_x[1:] * rotated_y[:-1]).sum(-1)
    assert torch.allclose(dots, dots[:1].expand_as(dots))


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "d"), [(32, 128), (9, 64), (1, 16)])
def test_fused_rope_agrees(heads: int, d: int) -> None:
    x = torch.randn(133, heads, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    cos, sin = angles(133, d, torch.float32, "cuda")
    grad = torch.randn_like(x)
    plain = x.detach().double().requires_grad_()
    expected = PlainOperations.rope(plain, cos.double(), sin.double())
    expected.backward(grad.double())
    found = operations_for(x).rope(x, cos, sin)
    found.backward(grad)
    assert relative_error(found, expected.detach()) < BF16_BOUND
    assert relative_error(x.grad, plain.grad) < BF16_BOUND


@pytest.mark.gpu
@pytest.mark.parametrize("overwrite", [False, True])
def test_fused_swiglu_agrees(overwrite: bool) -> None:
    gate, up = (torch.randn(77, 333, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    grad = torch.randn_like(gate)
    plain = [x.detach().double().requires_grad_() for x in (gate, up)]
    expected = PlainOperations.swiglu(*plain)
    expected.backward(grad.double())
    # Copies of gate and up, because overwrite requires that nothing else reads them.
    found = operations_for(gate).swiglu(gate * 1, up * 1, overwrite=overwrite)
    found.backward(grad)
    assert relative_error(found, expected.detach()) < BF16_BOUND
    assert all(relative_error(x.grad, p.grad) < BF16_BOUND for x, p in zip((gate, up), plain, strict=True))
