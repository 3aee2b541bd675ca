"""What the backward computes again changes neither loss nor gradients, and costs the matmuls that its name says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from eagle_ds.kernels.backend import PlainOperations
from eagle_ds.model import draft
from eagle_ds.model.loss import LossSettings, head_loss
from eagle_ds.model.offload import ActivationOffload
from eagle_ds.sharding import tiles
from tests.layout_cases import TINY, Case
from tests.micro_batch import gradients, make_targets, prefix_for, rank_batch

CASE = Case((("0" * 9 + "1" * 30 + "000" + "1" * 11,),))


def step(recompute: str, case: Case = CASE, offload: ActivationOffload | None = None) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Loss, gradients, and the matmul operations of the backward."""
    model, batch, head = case.model(), rank_batch(case.sharding(0), 0, case.whole(0), "serving"), case.head()
    targets, settings = make_targets(batch, head), LossSettings(torch.ones(case.steps, dtype=torch.float64))
    loss, _ = model(batch, prefix_for(model, batch.sharding), lambda *states: head_loss(*states, targets, settings), recompute, offload)
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    return loss.detach(), gradients(model), counter.get_total_flops()


@pytest.mark.parametrize("recompute", ["selective", "mlp", "full"])
def test_recomputing_changes_nothing(recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE_ROWS", 7)  # several tiles, the last one short
    loss, grads, _ = step("none")
    again, grads_again, _ = step(recompute)
    torch.testing.assert_close(again, loss, rtol=1e-13, atol=0)
    for name, grad in grads.items():
        torch.testing.assert_close(grads_again[name], grad, rtol=1e-12, atol=1e-13)


def write_over(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, *, in_place: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What the GPU's kernel does, unseen by autograd as there."""
    assert in_place
    g, u = (x.clone().requires_grad_() for x in (gate, up))
    with torch.enable_grad():
        d_gate, d_up = torch.autograd.grad(PlainOperations.swiglu(g, u), (g, u), grad)
    gate.numpy()[:], up.numpy()[:] = d_gate.numpy(), d_up.numpy()
    return gate, up


@pytest.fixture
def written_over(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = pytest.importorskip("eagle_ds.kernels.operations_triton", reason="Triton is not installed")
    monkeypatch.setattr(gpu.elementwise, "swiglu_forward", PlainOperations.swiglu)
    monkeypatch.setattr(gpu.elementwise, "swiglu_backward", write_over)

    class Overwriting(PlainOperations):
        swiglu = staticmethod(gpu.TritonOperations.swiglu)

    monkeypatch.setattr(draft, "operations_for", lambda _: Overwriting)


@pytest.mark.parametrize("offloads", [False, True])
@pytest.mark.parametrize("recompute", ["none", "selective", "mlp", "full"])
def test_nobody_reads_gate_and_up_after_their_gradients_are_written_over_them(
    recompute: str, offloads: bool, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(tiles, "TILE_ROWS", 7)
    loss, grads, _ = step("none")
    request.getfixturevalue("written_over")
    offload = ActivationOffload(torch.device("cpu"), min_bytes=1, slab_bytes=1000) if offloads else None
    again, grads_again, _ = step(recompute, offload=offload)
    torch.testing.assert_close(again, loss, rtol=1e-13, atol=0)
    for name, grad in grads.items():
        torch.testing.assert_close(grads_again[name], grad, rtol=1e-12, atol=1e-13)


@pytest.mark.usefixtures("written_over")
def test_a_second_backward_of_what_was_written_over_is_refused() -> None:
    gate, up = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    product = draft.operations_for(gate).swiglu(gate * 1, up * 1, overwrite=True).sum()
    product.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_selective_recomputes_no_matmul_and_the_others_more_and_more() -> None:
    none, selective, mlp, full = (step(mode)[2] for mode in ("none", "selective", "mlp", "full"))
    assert none == selective < mlp < full


def test_selective_keeps_projections_that_are_as_wide_as_the_mlp() -> None:
    square = replace(CASE, arch=replace(TINY, intermediate_size=2 * TINY.hidden_size, attention_bias=True))
    assert step("none", square)[2] == step("selective", square)[2]
