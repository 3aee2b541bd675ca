"""Losses, counts, hidden states and gradients equal those of another project's trainer (the golden files).

tests/golden/README.md says how the files were made, and gives the reason for the bounds.
"""

from __future__ import annotations

import pytest
import torch

from eagle_ds.data.batch import Batch
from eagle_ds.model.loss import step_decays
from eagle_ds.sharding.sequence import shard_sequence
from tests.golden_cases import SERVED_NAMES, GoldenCase, case_names
from tests.micro_batch import (
    WholeHead,
    WholeSequence,
    gradients,
    prefix_for,
    rank_batch,
    relative_error,
    run_step,
)

LOSS_BOUND, GRADIENT_BOUND = 1e-6, 2e-5


@pytest.fixture(params=case_names())
def case(request: pytest.FixtureRequest) -> GoldenCase:
    return GoldenCase.load(request.param)


def rank_zero(case: GoldenCase, *, trained_rows_only: bool) -> Batch:
    """Return the case as the batch of one rank."""
    sharding = shard_sequence(
        [case.document()], ttt_steps=case.config["ttt_length"], alignment="feature",
        trained_rows_only=trained_rows_only,
    )  # fmt: skip
    aux, hidden = (case.arrays[f"in.{name}"].float() for name in ("aux_hidden_state", "hidden_state"))
    return rank_batch(sharding, 0, WholeSequence([case.token_labels()], aux, hidden), "feature")


def whole_head(case: GoldenCase) -> WholeHead:
    full, t2d = case.arrays["in.target_lm_head"].float(), case.arrays["in.t2d"]
    return WholeHead(full[t2d], t2d, case.arrays["in.d2t"], full)


@pytest.mark.parametrize("trained_rows_only", [True, False])
def test_losses_counts_and_every_gradient_equal_the_golden_ones(
    case: GoldenCase, trained_rows_only: bool
) -> None:
    size, model = case.config["seq_len"], case.draft(torch.float32)
    decay = step_decays(case.config["step_decay"], case.config["ttt_length"])
    batch = rank_zero(case, trained_rows_only=trained_rows_only)
    loss, sums = run_step(model, batch, whole_head(case), decay / size)

    assert relative_error(sums["loss"] / size, case.arrays["out.step_loss"]) < LOSS_BOUND
    assert relative_error(loss, case.arrays["out.total_loss"]) < LOSS_BOUND
    assert sums["correct"].tolist() == case.arrays["out.step_correct"].tolist()
    assert sums["trained"].tolist() == case.arrays["out.step_denom"].tolist()
    assert sums["counted"].tolist() == case.arrays["out.step_trained"].tolist()
    rate = sums["alpha"] / sums["counted"].clamp(min=1)
    assert relative_error(rate, case.arrays["out.step_acceptance_rate"]) < LOSS_BOUND
    for name, gradient in gradients(model).items():
        expected = "grad." + SERVED_NAMES.get(name, name)
        if expected in case.arrays:
            assert relative_error(gradient, case.arrays[expected]) < GRADIENT_BOUND, name


def test_hidden_states_of_every_ttt_step_equal_the_golden_ones(case: GoldenCase) -> None:
    model, batch = case.draft(torch.float32), rank_zero(case, trained_rows_only=False)
    with torch.no_grad():
        states = model.unroll(batch, prefix_for(model, batch.sharding))
    for step, state in enumerate(states):
        # Later rows read token ids beyond the end of the document. No loss is computed from them.
        real = case.config["seq_len"] - 1 - step
        assert relative_error(state[:real], case.arrays["out.hidden"][step, :real]) < LOSS_BOUND


def test_every_golden_gradient_is_compared(case: GoldenCase) -> None:
    names = {"grad." + SERVED_NAMES.get(n, n) for n, _ in case.draft(torch.float32).named_parameters()}
    assert {key for key in case.arrays if key.startswith("grad.")} <= names
