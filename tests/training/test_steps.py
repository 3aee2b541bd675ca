"""Every ZeRO stage and layout takes the optimizer step of a single process: the gradient of the global loss.

Plain SGD shows gradients as they are; the reference is the dense float64 program over the whole store.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.gloo_pool import GlooPool
from tests.micro_batch import relative_error
from tests.training.dense_reference import Dense, dense_step
from tests.training.tiny_run import Tiny, make_tiny
from tests.training.training_ranks import Steps, take_offloading_steps, take_steps

BOUND = 2e-5
RATE = 1.0  # of SGD: large, so that the change of a weight is not lost in its rounding
CLIP = 1.0
ADAM_BOUND = 2e-3  # Adam's first steps are lr * sign(gradient): a gradient near zero may change sign
# An epoch of the tiny store is 4 packs, so dp * accumulation = 4 makes it one step whatever the layout.
LAYOUTS = {
    "1": (1, {"training__gradient_accumulation": 4}),
    "U2": (2, {"parallel__ulysses": 2, "training__gradient_accumulation": 4}),
    "R2": (2, {"parallel__ring": 2, "training__gradient_accumulation": 4}),
    "dp2": (2, {"training__gradient_accumulation": 2}),
    "U2R2": (4, {"parallel__ulysses": 2, "parallel__ring": 2, "training__gradient_accumulation": 4}),
    "R2p2p_dp2": (
        4,
        {"parallel__ring": 2, "parallel__ring_mode": "p2p", "training__gradient_accumulation": 2},
    ),
    "dp4": (4, {}),
}
OFFLOAD = {
    "stage2": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "stage3": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
    },
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    tiny = make_tiny(tmp_path_factory.mktemp("tiny"))
    for name, zero in OFFLOAD.items():
        (tiny.root / f"ds_offload_{name}.json").write_text(
            json.dumps({"zero_optimization": zero, "zero_force_ds_cpu_optimizer": False})
        )
    return tiny


def run(
    pool: GlooPool, tiny: Tiny, layout: str, ds_json: str, optimizer: str = "SGD", **overrides: Any
) -> tuple[Steps, Dense]:
    """(the steps, the dense reference of the first)."""
    world, settings = LAYOUTS[layout]
    base = {
        "deepspeed": str(tiny.root / ds_json),
        "data__pack_tokens": 70,
        "training__max_steps": 1,
        "training__learning_rate": RATE,
    }
    recipe = tiny.recipe(**{**base, "training__gradient_clipping": 0.0, **settings, **overrides})
    steps = pool.run(take_steps, world, recipe, optimizer)[0]
    return steps, dense_step(recipe, steps.before)


def check(steps: Steps, dense: Dense, scale: float = 1.0) -> None:
    """The loss, the norm, and every weight's move, which is ``scale`` of the gradient."""
    assert steps.metrics[0].loss == pytest.approx(dense.loss, rel=BOUND)
    assert steps.norms[0] == pytest.approx(dense.norm, rel=BOUND)
    for name, gradient in dense.gradients.items():
        moved = (steps.before[name].double() - steps.after[name].double()) / RATE
        assert relative_error(moved, gradient * scale) < BOUND, name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_is_the_single_process_step(pool: GlooPool, tiny: Tiny, layout: str, stage: int) -> None:
    check(*run(pool, tiny, layout, f"ds_stage{stage}.json"))


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize(("layout", "stage"), [("U2", 1), ("R2", 3)])
def test_norms_that_every_ttt_step_calls_get_the_whole_gradient(
    pool: GlooPool, tiny: Tiny, layout: str, stage: int, recompute: str
) -> None:
    """ZeRO counts how often a module is called; these norms are called outside of the copied weights."""
    variant = {"draft__norm_before_residual": True, "draft__qk_norm": True, "training__recompute": recompute}
    check(*run(pool, tiny, layout, f"ds_stage{stage}.json", **variant))


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("layout", ["R2", "dp2"])
def test_a_step_is_the_single_process_step_under_offload(
    pool: GlooPool, tiny: Tiny, layout: str, stage: int
) -> None:
    check(*run(pool, tiny, layout, f"ds_offload_stage{stage}.json"))


@pytest.mark.parametrize("layout", ["U2", "dp2"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_clipping_scales_the_whole_gradient_and_logs_its_norm_before(
    pool: GlooPool, tiny: Tiny, layout: str, stage: int
) -> None:
    steps, dense = run(pool, tiny, layout, f"ds_stage{stage}.json", training__gradient_clipping=CLIP)
    assert dense.norm > 2 * CLIP
    check(steps, dense, CLIP / dense.norm)


@pytest.mark.parametrize("layout", ["1", "R2", "dp2"])
def test_loss_by_positions_divides_by_all_tokens_of_the_step(pool: GlooPool, tiny: Tiny, layout: str) -> None:
    check(
        *run(
            pool,
            tiny,
            layout,
            "ds_stage1.json",
            training__loss_normalization="positions",
            training__mask_alignment="feature",
        )
    )


@pytest.mark.parametrize("kind", ["alpha", "lambda"])
def test_acceptance_losses_over_one_pack_spread_over_ranks(pool: GlooPool, tiny: Tiny, kind: str) -> None:
    one_pack = {"data__pack_tokens": 500, "training__gradient_accumulation": 1}
    check(*run(pool, tiny, "U2R2", "ds_stage1.json", training__loss=kind, **one_pack))


@pytest.mark.parametrize("layout", ["U2R2", "R2p2p_dp2", "dp4", "R2"])
def test_adam_steps_stay_with_the_single_process(pool: GlooPool, tiny: Tiny, layout: str) -> None:
    settings = {"training__max_steps": 3, "training__learning_rate": 1e-3, "training__gradient_clipping": 0.5}
    steps, _ = run(pool, tiny, layout, "ds_stage1.json", "AdamW", **settings)
    alone, _ = run(pool, tiny, "1", "ds_stage0.json", "AdamW", **settings)
    assert [m.loss for m in steps.metrics] == pytest.approx([m.loss for m in alone.metrics], rel=1e-5)
    assert steps.norms == pytest.approx(alone.norms, rel=1e-4)
    for name, after in alone.after.items():
        assert (
            relative_error(steps.after[name] - steps.before[name], after - alone.before[name]) < ADAM_BOUND
        ), name


def test_recomputing_changes_nothing(pool: GlooPool, tiny: Tiny) -> None:
    for recompute in ("selective", "mlp", "full"):
        check(*run(pool, tiny, "R2", "ds_stage2.json", training__recompute=recompute))


@pytest.mark.parametrize(("layout", "stage"), [("U2", 1), ("R2p2p_dp2", 2), ("R2", 3)])
def test_offloading_activations_changes_nothing(pool: GlooPool, tiny: Tiny, layout: str, stage: int) -> None:
    (world, settings), base = (
        LAYOUTS[layout],
        {"data__pack_tokens": 70, "training__max_steps": 1, "training__learning_rate": RATE},
    )
    offloading = {
        "training__recompute": "full",
        "training__offload_activations": True,
        "training__gradient_clipping": 0.0,
    }
    recipe = tiny.recipe(deepspeed=str(tiny.root / f"ds_stage{stage}.json"), **base, **offloading, **settings)
    found = pool.run(take_offloading_steps, world, recipe)
    assert all(slabs > 0 for _, slabs in found)
    check(found[0][0], dense_step(recipe, found[0][0].before))


def test_counts_are_those_of_the_whole_batch(pool: GlooPool, tiny: Tiny) -> None:
    steps, dense = run(pool, tiny, "R2p2p_dp2", "ds_stage1.json")
    found, sums = steps.metrics[0], dense.sums
    assert found.accuracy == pytest.approx((sums.correct / sums.trained).tolist())
    assert found.acceptance == pytest.approx((sums.alpha / sums.trained).tolist(), rel=1e-4)
    assert found.simulated_length == pytest.approx(1 + float(sums.length[0] / sums.length[1]), rel=1e-5)
