"""Every layout trains the same model: loss, counts and every gradient equal the dense reference's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.gloo_pool import GlooPool
from tests.layout_cases import TINY, Case, reference_step
from tests.micro_batch import relative_error
from tests.parallel.layout_ranks import layout_step

BOUNDS = {"float64": 1e-10, "float32": 2e-5}

ONE = "0001111111100000111110111110000111111111"
HOLES = "1010011101110000000000000000011111101"
LATE = "0" * 30 + "1" * 7
LONE = "0000000000111"
PACK = ("00111111", "0000011111111111100", "0111", "01", "0000000001111111110")
NONE_TRAINED = "00000000000000000"

LAYOUTS = [
    (1, 1, "gather"), (2, 1, "gather"), (1, 2, "gather"), (1, 2, "p2p"), (4, 1, "gather"), (2, 2, "gather"),
    (2, 2, "p2p"), (1, 4, "gather"), (1, 4, "p2p"),
]


@pytest.fixture(scope="module")
def pool() -> Iterator[GlooPool]:
    with GlooPool(4) as workers:
        yield workers


def check(pool: GlooPool, case: Case) -> None:
    loss, sums, grads = reference_step(case)
    bound = BOUNDS[case.dtype]
    for rank, (found_loss, found, found_grads) in enumerate(pool.run(layout_step, case.world, case)):
        assert relative_error(found_loss, loss) < bound, f"loss on rank {rank}"
        for name in ("counted", "trained", "correct"):
            assert found[name].tolist() == getattr(sums, name).tolist(), f"{name} on rank {rank}"
        assert relative_error(found["alpha"], sums.alpha) < bound
        assert relative_error(found.lengths, sums.length) < bound
        assert set(found_grads) == set(grads)
        for name, gradient in grads.items():
            assert relative_error(found_grads[name], gradient) < bound, f"{name} on rank {rank}"


@pytest.mark.parametrize(("ulysses", "ring", "mode"), LAYOUTS)
@pytest.mark.parametrize("trained_rows_only", [True, False])
@pytest.mark.parametrize("masks", [(ONE,), PACK], ids=["alone", "packed"])
def test_every_layout_gives_the_reference(
    pool: GlooPool, ulysses: int, ring: int, mode: str, trained_rows_only: bool, masks: tuple[str, ...]
) -> None:
    layout = {"ulysses": ulysses, "ring": ring, "ring_mode": mode}
    check(pool, Case((masks,), **layout, trained_rows_only=trained_rows_only))


@pytest.mark.parametrize(("ulysses", "ring", "mode"), LAYOUTS)
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputing_changes_no_layout(
    pool: GlooPool, ulysses: int, ring: int, mode: str, recompute: str
) -> None:
    check(pool, Case((PACK,), ulysses=ulysses, ring=ring, ring_mode=mode, recompute=recompute))


@pytest.mark.parametrize(
    ("ulysses", "ring", "mode"), [(1, 1, "gather"), (2, 1, "gather"), (1, 2, "p2p"), (1, 2, "gather")]
)
def test_data_parallel_composes_with_every_layout(pool: GlooPool, ulysses: int, ring: int, mode: str) -> None:
    check(pool, Case(((ONE,), PACK), ulysses=ulysses, ring=ring, ring_mode=mode))


@pytest.mark.parametrize(("ulysses", "ring", "mode"), LAYOUTS)
@pytest.mark.parametrize("mask", [HOLES, LATE, LONE, "00111", "111", "1" * 21, "1" * 3 + "0" * 20], ids=str)
def test_awkward_masks(pool: GlooPool, ulysses: int, ring: int, mode: str, mask: str) -> None:
    check(pool, Case(((mask,),), ulysses=ulysses, ring=ring, ring_mode=mode, alignment="serving"))


@pytest.mark.parametrize(("ulysses", "ring", "mode"), LAYOUTS)
def test_peer_alignment_under_every_layout(pool: GlooPool, ulysses: int, ring: int, mode: str) -> None:
    layout = {"ulysses": ulysses, "ring": ring, "ring_mode": mode}
    check(pool, Case(((HOLES, "0110", LATE),), **layout, alignment="feature"))


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
@pytest.mark.parametrize(("ulysses", "ring"), [(1, 1), (2, 1), (4, 1), (2, 2)])
def test_every_ratio_of_query_to_kv_heads(pool: GlooPool, kv_heads: int, ulysses: int, ring: int) -> None:
    check(pool, Case(((ONE,),), arch=replace(TINY, num_key_value_heads=kv_heads), ulysses=ulysses, ring=ring))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ulysses"), [(12, 4, 3), (12, 3, 4), (12, 3, 2), (6, 2, 3), (9, 3, 3)]
)
def test_ratios_that_do_not_divide(pool: GlooPool, heads: int, kv_heads: int, ulysses: int) -> None:
    arch = replace(TINY, num_attention_heads=heads, num_key_value_heads=kv_heads)
    check(pool, Case(((ONE,),), arch=arch, ulysses=ulysses))


def test_ulysses_that_cannot_work_is_refused_with_what_can(pool: GlooPool) -> None:
    with pytest.raises(
        AssertionError, match=r"ulysses=4 does not divide 6 query heads; use one of \[1, 2, 3, 6\]"
    ):
        pool.run(layout_step, 4, Case(((ONE,),), arch=replace(TINY, num_attention_heads=6), ulysses=4))


VARIANTS = {
    "window": {"sliding_window": 6},
    "window_shorter_than_unroll": {"sliding_window": 2},
    "fc_norm": {"fc_norm": True},
    "norm_output": {"norm_output": True},
    "norm_before_fc": {"norm_before_fc": True},
    "norm_before_residual": {"norm_before_residual": True},
    "norm_before_residual_and_output": {"norm_before_residual": True, "norm_output": True},
    "qk_norm": {"qk_norm": True},
    "qk_norm_window": {"qk_norm": True, "sliding_window": 6},
    "bias": {"attention_bias": True},
    "own_width": {"target_hidden_size": 30},
    "full_vocabulary": {"draft_vocab_size": 37},
    "four_layers": {"num_aux": 4},
}


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize(("ulysses", "ring", "mode"), [(1, 1, "gather"), (2, 2, "p2p"), (2, 2, "gather")])
def test_draft_variants(pool: GlooPool, variant: str, ulysses: int, ring: int, mode: str) -> None:
    arch = replace(TINY, **VARIANTS[variant])
    check(pool, Case(((HOLES, ONE),), arch=arch, ulysses=ulysses, ring=ring, ring_mode=mode))


@pytest.mark.parametrize("kind", ["alpha", "lambda"])
@pytest.mark.parametrize(("ulysses", "ring", "mode"), [(1, 1, "gather"), (2, 2, "p2p")])
def test_acceptance_losses(pool: GlooPool, kind: str, ulysses: int, ring: int, mode: str) -> None:
    check(pool, Case(((ONE, HOLES),), kind=kind, ulysses=ulysses, ring=ring, ring_mode=mode))


@pytest.mark.parametrize(("ulysses", "ring", "mode"), LAYOUTS)
def test_float32_keeps_its_bound(pool: GlooPool, ulysses: int, ring: int, mode: str) -> None:
    check(pool, Case(((ONE,),), ulysses=ulysses, ring=ring, ring_mode=mode, dtype="float32"))


def test_a_sequence_without_trained_rows_beside_one_with(pool: GlooPool) -> None:
    check(pool, Case(((ONE,), (NONE_TRAINED,)), ulysses=2))


masks = st.lists(st.text("01", min_size=1, max_size=40), min_size=1, max_size=4)
masks = masks.filter(lambda ms: any("111" in m for m in ms))


@settings(
    max_examples=60, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    sequences=masks,
    layout=st.sampled_from(LAYOUTS),
    trained_rows_only=st.booleans(),
    alignment=st.sampled_from(["serving", "feature"]),
    kv_heads=st.sampled_from([1, 2, 4, 8]),
    window=st.sampled_from([None, 3, 9]),
    seed=st.integers(0, 1000),
)
def test_random_problems(
    pool: GlooPool, sequences: list[str], layout: tuple, trained_rows_only: bool, alignment: str,
    kv_heads: int, window: int | None, seed: int,
) -> None:
    ulysses, ring, mode = layout
    arch = replace(TINY, num_key_value_heads=kv_heads, sliding_window=window)
    check(pool, Case((tuple(sequences),), arch, ulysses, ring, mode, trained_rows_only, alignment, seed=seed))
