"""What the backward computes again changes neither loss nor gradients, and costs the matmuls that its name says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from eagle_ds.loss import LossSettings, head_loss
from eagle_ds.model import draft
from tests.cases import TINY, Case
from tests.steps import gradients, make_targets, prefix_for, rank_batch

CASE = Case((("0" * 9 + "1" * 30 + "000" + "1" * 11,),))


def step(recompute: str, case: Case = CASE) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Loss, gradients, and the matmul operations of the backward."""
    model, batch, head = case.model(), rank_batch(case.plan(0), 0, case.whole(0), "serving"), case.head()
    targets, settings = make_targets(batch, head), LossSettings(torch.ones(case.steps, dtype=torch.float64))
    loss, _ = model(batch, prefix_for(model, batch.plan), lambda *states: head_loss(*states, targets, settings), recompute)
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    return loss.detach(), gradients(model), counter.get_total_flops()


@pytest.mark.parametrize("recompute", ["selective", "mlp", "full"])
def test_recomputing_changes_nothing(recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft, "TILE_ROWS", 7)  # several tiles, the last one short
    loss, grads, _ = step("none")
    again, grads_again, _ = step(recompute)
    torch.testing.assert_close(again, loss, rtol=1e-13, atol=0)
    for name, grad in grads.items():
        torch.testing.assert_close(grads_again[name], grad, rtol=1e-12, atol=1e-13)


def test_selective_recomputes_no_matmul_and_the_others_more_and_more() -> None:
    none, selective, mlp, full = (step(mode)[2] for mode in ("none", "selective", "mlp", "full"))
    assert none == selective < mlp < full


def test_selective_keeps_projections_that_are_as_wide_as_the_mlp() -> None:
    square = replace(CASE, arch=replace(TINY, intermediate_size=2 * TINY.hidden_size, attention_bias=True))
    assert step("none", square)[2] == step("selective", square)[2]
