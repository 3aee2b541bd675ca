"""RoPE and SwiGLU: each kind of RoPE scaling follows its formula; the fused kernels agree with the plain
versions, values and gradients.
"""

from __future__ import annotations

import math

import pytest
import torch

from eagle_ds.config.sections import ROPE_NEEDS, RopeScaling
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


# One example for each kind of RoPE scaling. Below, its formula is written a second time, for one pair in
# plain floats.
D, THETA = 64, 10000.0
SCALINGS = {
    "linear": RopeScaling(rope_type="linear", factor=4),
    "llama3": RopeScaling(
        rope_type="llama3", factor=8, low_freq_factor=1, high_freq_factor=4,
        original_max_position_embeddings=1024,
    ),
    "yarn": RopeScaling(rope_type="yarn", factor=4, original_max_position_embeddings=1024),
}


def linear_frequency(i: int) -> float:
    return THETA ** (-2 * i / D) / 4


def llama3_frequency(i: int) -> float:
    frequency = THETA ** (-2 * i / D)
    turns = 1024 * frequency / (2 * math.pi)
    if turns >= 4:
        return frequency
    if turns <= 1:
        return frequency / 8
    kept = (turns - 1) / (4 - 1)
    return kept * frequency + (1 - kept) * frequency / 8


def yarn_frequency(i: int) -> float:
    # The pair that makes n turns has THETA^(2i/D) = 1024 / (2 pi n): i = 5.66 for 32 turns, 17.70 for one.
    kept = 1 - min(max((i - 5) / (18 - 5), 0), 1)
    frequency = THETA ** (-2 * i / D)
    return kept * frequency + (1 - kept) * frequency / 4


FORMULAS = {  # kind -> frequency of the pair i, and the factor on cos and sin
    "linear": (linear_frequency, 1.0),
    "llama3": (llama3_frequency, 1.0),
    "yarn": (yarn_frequency, 0.1 * math.log(4) + 1),
}


@pytest.mark.parametrize("kind", [kind for kind in ROPE_NEEDS if kind != "default"])
def test_every_kind_of_rope_scaling_follows_its_formula(kind: str) -> None:
    formula, expected_factor = FORMULAS[kind]
    found, factor = inverse_frequencies(D, THETA, SCALINGS[kind])
    expected = torch.tensor([formula(i) for i in range(D // 2)], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert factor == pytest.approx(expected_factor, rel=1e-12)
    # The example has pairs that change, so a kind that computes plain RoPE fails.
    assert not torch.equal(found, inverse_frequencies(D, THETA, None)[0])


def test_an_unknown_kind_of_rope_scaling_is_refused() -> None:
    unknown = SCALINGS["yarn"].model_copy(update={"rope_type": "unheard_of"})
    with pytest.raises(ValueError, match="rope_type unheard_of has no frequencies here; the kinds are"):
        inverse_frequencies(D, THETA, unknown)


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
