"""Recomputation changes neither loss nor gradients, and repeats the matmuls that each mode's name says.

On a GPU the gradients of gate and up overwrite both tensors. Some tests do the same on the CPU, to prove that
nothing reads gate and up afterwards.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from eagle_ds.kernels.backend import PlainOperations
from eagle_ds.model import draft
from eagle_ds.model.arch import DraftArch
from eagle_ds.model.loss import LossSettings, head_loss
from eagle_ds.model.offload import ActivationOffload
from eagle_ds.sharding import tiles
from tests.layout_cases import TINY, Case
from tests.micro_batch import gradients, make_targets, prefix_for, rank_batch

CASE = Case((("0" * 9 + "1" * 30 + "000" + "1" * 11,),))


class Step(NamedTuple):
    """Results of one forward and backward."""

    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]
    flops: int  # of the backward's matmuls


def step(recompute: str, case: Case = CASE, offload: ActivationOffload | None = None) -> Step:
    model, batch, head = case.model(), rank_batch(case.sharding(0), 0, case.whole(0), "serving"), case.head()
    targets, settings = make_targets(batch, head), LossSettings(torch.ones(case.steps, dtype=torch.float64))
    prefix = prefix_for(model, batch.sharding)
    loss, _ = model(batch, prefix, lambda *states: head_loss(*states, targets, settings), recompute, offload)
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    return Step(loss.detach(), gradients(model), counter.get_total_flops())


def assert_same(found: Step, expected: Step) -> None:
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-13, atol=0)
    for name, grad in expected.gradients.items():
        torch.testing.assert_close(found.gradients[name], grad, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("arch", [TINY, replace(TINY, norm_before_residual=True, qk_norm=True)])
@pytest.mark.parametrize("recompute", ["selective", "mlp", "full"])
def test_recomputation_changes_no_result(
    recompute: str, arch: DraftArch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "TILE_ROWS", 7)  # several tiles, the last one short
    case = replace(CASE, arch=arch)
    assert_same(step(recompute, case), step("none", case))


def swiglu_backward_in_place(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, *, in_place: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Overwrite gate and up with their gradients, as the GPU's kernel does: autograd does not notice."""
    assert in_place
    g, u = (x.clone().requires_grad_() for x in (gate, up))
    with torch.enable_grad():
        d_gate, d_up = torch.autograd.grad(PlainOperations.swiglu(g, u), (g, u), grad)
    gate.numpy()[:] = d_gate.numpy()  # through NumPy, because autograd would notice a tensor operation
    up.numpy()[:] = d_up.numpy()
    return gate, up


@pytest.fixture
def overwriting_swiglu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the draft the GPU's autograd Function for SwiGLU, with kernels in plain PyTorch."""
    gpu = pytest.importorskip("eagle_ds.kernels.operations_triton", reason="Triton is not installed")
    monkeypatch.setattr(gpu.elementwise, "swiglu_forward", PlainOperations.swiglu)
    monkeypatch.setattr(gpu.elementwise, "swiglu_backward", swiglu_backward_in_place)

    class Overwriting(PlainOperations):
        swiglu = staticmethod(gpu.TritonOperations.swiglu)

    monkeypatch.setattr(draft, "operations_for", lambda _: Overwriting)


@pytest.mark.parametrize("offloads", [False, True])
@pytest.mark.parametrize("recompute", ["none", "selective", "mlp", "full"])
def test_nothing_reads_gate_and_up_after_their_gradients_have_overwritten_them(
    recompute: str, offloads: bool, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(tiles, "TILE_ROWS", 7)
    expected = step("none")
    request.getfixturevalue("overwriting_swiglu")  # from here on
    offload = ActivationOffload(torch.device("cpu"), min_bytes=1, slab_bytes=1000) if offloads else None
    assert_same(step(recompute, offload=offload), expected)


@pytest.mark.usefixtures("overwriting_swiglu")
def test_a_second_backward_through_overwritten_tensors_raises() -> None:
    gate, up = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    product = draft.operations_for(gate).swiglu(gate * 1, up * 1, overwrite=True).sum()
    product.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_selective_recomputes_no_matmul_and_full_recomputes_more_of_them_than_mlp() -> None:
    none, selective, mlp, full = (step(mode).flops for mode in ("none", "selective", "mlp", "full"))
    assert none == selective < mlp < full


def test_selective_recomputes_no_matmul_if_a_projection_is_as_wide_as_the_mlp() -> None:
    """It may drop the result of ``down_proj`` only, which it recognises by the inner dimension."""
    square = replace(CASE, arch=replace(TINY, intermediate_size=2 * TINY.hidden_size, attention_bias=True))
    assert step("none", square).flops == step("selective", square).flops
