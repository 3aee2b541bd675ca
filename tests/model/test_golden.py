"""The maths is a peer's maths: losses, counts, hidden states and gradients of the golden files, to the bounds of their README."""

from __future__ import annotations

import pytest
import torch

from eagle_ds.model.loss import uniform_decay
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


def _whole(case: GoldenCase, dtype: torch.dtype) -> WholeSequence:
    return WholeSequence([case.token_labels()], case.arrays["in.aux_hidden_state"].to(dtype), case.arrays["in.hidden_state"].to(dtype))


def _head(case: GoldenCase, dtype: torch.dtype) -> WholeHead:
    full, t2d = case.arrays["in.target_lm_head"].to(dtype), case.arrays["in.t2d"]
    return WholeHead(full[t2d], t2d, case.arrays["in.d2t"], full)


@pytest.mark.parametrize("trained_rows_only", [True, False])
def test_losses_counts_and_every_gradient_are_the_peers(case: GoldenCase, trained_rows_only: bool) -> None:
    steps, size = case.config["ttt_length"], case.config["seq_len"]
    sharding = shard_sequence([case.document()], ttt_steps=steps, alignment="feature", trained_rows_only=trained_rows_only)
    model = case.draft(torch.float32)
    batch = rank_batch(sharding, 0, _whole(case, torch.float32), "feature")
    decay = uniform_decay(case.config["step_decay"], steps)
    loss, sums = run_step(model, batch, _head(case, torch.float32), decay / size)

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


def test_hidden_states_of_every_step_are_the_peers(case: GoldenCase) -> None:
    steps, size = case.config["ttt_length"], case.config["seq_len"]
    sharding = shard_sequence([case.document()], ttt_steps=steps, alignment="feature", trained_rows_only=False)
    model = case.draft(torch.float32)
    with torch.no_grad():
        states = model.unroll(rank_batch(sharding, 0, _whole(case, torch.float32), "feature"), prefix_for(model, sharding))
    for step, state in enumerate(states):
        real = size - 1 - step  # rows past that read ids beyond the end, which nobody trains on
        assert relative_error(state[:real], case.arrays["out.hidden"][step, :real]) < LOSS_BOUND


def test_every_golden_gradient_is_compared(case: GoldenCase) -> None:
    names = {"grad." + SERVED_NAMES.get(n, n) for n, _ in case.draft(torch.float32).named_parameters()}
    assert {key for key in case.arrays if key.startswith("grad.")} <= names
