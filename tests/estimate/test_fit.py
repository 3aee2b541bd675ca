"""Estimates: time and memory fall as layouts promise, and a sequence that does not fit gets advice that
works.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from eagle_ds.config.deepspeed import read_ds_json
from eagle_ds.config.recipe import Recipe, load_recipe
from eagle_ds.estimate.devices import DEVICES, GIB, Device, find_device
from eagle_ds.estimate.fit import Setup, choose_ring_mode
from eagle_ds.estimate.memory import MemoryModel
from eagle_ds.estimate.plan_text import describe_plan
from eagle_ds.estimate.sequences import document_in_turns, sharding_for
from eagle_ds.estimate.step_time import floor_seconds
from eagle_ds.estimate.tensor_sizes import draft_parameters
from eagle_ds.sharding import ranges as rg

ROOT = Path(__file__).resolve().parents[2]
ZERO1 = read_ds_json(ROOT / "ds_configs/llama3_8b_zero1.json")
H200 = DEVICES["h200"]


def llama(*overrides: str) -> Recipe:
    return load_recipe(ROOT / "recipes/llama3_128k.json", overrides)


def total(recipe: Recipe, tokens: int, fraction: float = 1.0) -> float:
    sharding = sharding_for(recipe, [document_in_turns(tokens, fraction)])
    return MemoryModel(recipe, ZERO1, recipe.parallel.size, sharding).peak_bytes / GIB


@pytest.mark.parametrize(
    ("name", "memory_bytes"), [("48GiB", 48 * GIB), ("48gb", 48e9), ("23.5 GiB", 23.5 * GIB)]
)
def test_a_gpu_may_be_given_by_its_memory(name: str, memory_bytes: float) -> None:
    assert find_device(name).memory_gib * GIB == pytest.approx(memory_bytes)


def test_a_plan_for_a_memory_size_judges_what_fits_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    recipe = llama("--training.recompute", "none")  # needs 25 GiB on each of eight GPUs
    small, large = (describe_plan(recipe, Path("x.json"), 8, name) for name in ("16GiB", "48GiB"))
    assert "DOES NOT FIT" in small and "DOES NOT FIT" not in large
    assert "longest sequence in 45.6 usable GiB" in large
    assert "no rates were measured for a GPU of 48GiB" in large


def test_parameters_are_those_of_a_llama_layer_twice_as_wide_at_its_input() -> None:
    assert sum(draft_parameters(llama()).values()) == 424_673_280


@pytest.mark.parametrize(("ulysses", "seconds"), [(1, 9.08), (4, 2.27)])
def test_the_floor_at_128k_is_attention_and_matmuls_at_the_measured_rates(
    ulysses: int, seconds: float
) -> None:
    recipe = llama("--parallel.ulysses", str(ulysses))
    floor = floor_seconds(recipe, sharding_for(recipe, [document_in_turns(131072, 1.0)]), H200)
    assert sum(floor.values()) == pytest.approx(seconds, rel=0.01)


def test_the_floor_falls_with_the_trained_rows() -> None:
    recipe = llama("--parallel.ulysses", "4")
    all_rows, tenth = (
        sum(floor_seconds(recipe, sharding_for(recipe, [document_in_turns(131072, f)]), H200).values())
        for f in (1.0, 0.1)
    )
    assert tenth < 0.12 * all_rows


def test_turns_have_the_fraction_that_was_asked_for() -> None:
    for fraction in (0.1, 0.5, 1.0):
        assert rg.count(document_in_turns(131072, fraction).trained_spans) == pytest.approx(
            131072 * fraction, rel=0.03
        )


@pytest.mark.parametrize(
    ("fraction", "turn", "told"), [(0, 512, "above 0"), (1.5, 512, "most 1"), (0.5, 0, "1 or more")]
)
def test_an_impossible_fraction_or_turn_is_refused(fraction: float, turn: int, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        document_in_turns(1024, fraction, turn)


def test_sharded_memory_falls_as_one_over_the_ranks() -> None:
    def sharded(ulysses: int) -> float:
        recipe = llama("--parallel.ulysses", str(ulysses))
        parts = MemoryModel(
            recipe, ZERO1, ulysses, sharding_for(recipe, [document_in_turns(131072, 1.0)])
        ).peak()
        return sum(
            size for name, size in parts.items() if name.startswith(("query rows", "context rows", "K_0"))
        )

    # Compared from 2 ranks on: only then q has a head-sharded copy
    assert sharded(2) / sharded(8) == pytest.approx(4, rel=0.01)


def test_recomputing_more_keeps_less() -> None:
    none, mlp, full = (total(llama("--training.recompute", mode), 131072) for mode in ("none", "mlp", "full"))
    assert none > mlp > full


def test_zero_stages_and_offload_take_the_model_off_the_gpu() -> None:
    recipe = llama()
    sharding = sharding_for(recipe, [document_in_turns(1024, 1.0)])
    sizes = []
    for name in ("llama3_8b_zero1", "llama3_8b_zero2", "llama3_8b_zero3"):
        sizes.append(
            MemoryModel(recipe, read_ds_json(ROOT / f"ds_configs/{name}.json"), 8, sharding).peak_bytes
        )
    assert sizes == sorted(sizes, reverse=True)
    assert (
        MemoryModel(
            recipe, read_ds_json(ROOT / "ds_configs/llama3_8b_zero2_offload.json"), 8, sharding
        ).peak()["optimizer state"]
        == 0
    )


def test_the_ring_keeps_all_keys_while_they_fit_and_rotates_them_after() -> None:
    recipe = llama("--parallel.ulysses", "1", "--parallel.ring", "8")
    assert choose_ring_mode(recipe, 131072, 2, 80 * GIB) == "gather"
    assert choose_ring_mode(recipe, 1 << 24, 2, 80 * GIB) == "p2p"
    assert choose_ring_mode(llama("--parallel.ring_mode", "p2p"), 1024, 2, 80 * GIB) == "p2p"


def test_the_largest_length_fits_and_a_longer_one_does_not() -> None:
    recipe = llama("--parallel.ulysses", "4")
    length = Setup(recipe, ZERO1, 4, H200).largest_length()
    assert length % 1024 == 0
    assert total(recipe, length) <= H200.usable_bytes / GIB < total(recipe, length + 1024)


def test_a_sequence_that_does_not_fit_is_refused_with_gib_length_and_setting() -> None:
    recipe = llama("--parallel.ulysses", "4", "--training.recompute", "none")
    sharding = sharding_for(recipe, [document_in_turns(524288, 1.0)])
    needed, mended = (
        r"524288 tokens .* needs about [\d.]+ GiB a GPU on ulysses 4 \* ring 1",
        r"--training\.recompute \w+ makes it fit",
    )
    with pytest.raises(ValueError, match=rf"{needed}.* \d+ tokens would fit; {mended}"):
        Setup(recipe, ZERO1, 4, H200).check_fits(sharding)
    Setup(llama("--parallel.ulysses", "4"), ZERO1, 4, H200).check_fits(
        sharding_for(recipe, [document_in_turns(131072, 1.0)])
    )


@pytest.mark.parametrize(
    ("tokens", "settings", "expected"),
    [
        (131072, ("--training.recompute", "none"), r"--training\.recompute selective makes it fit"),
        (163840, ("--training.recompute", "none"), r"--training\.recompute mlp makes it fit"),
        (262144, (), r"--training\.recompute mlp makes it fit"),
        (327680, (), r"--training\.recompute full makes it fit"),
        (
            393216,
            ("--training.recompute", "full"),
            r"--training\.offload_activations true makes it fit, with \d+ GiB of host memory a GPU",
        ),
        (
            393216,
            ("--training.recompute", "mlp"),
            r"--training\.recompute full --training\.offload_activations true makes it fit, with \d+ GiB",
        ),
        (
            1 << 20,
            ("--training.recompute", "full"),
            r"4 times as many GPUs \(--parallel\.ring 4\) makes it fit",
        ),
        (1 << 28, (), "no setting here makes it fit; shorten data.max_length"),
    ],
)
def test_the_setting_that_costs_least_time_is_advised(
    tokens: int, settings: tuple[str, ...], expected: str
) -> None:
    recipe = llama("--parallel.ulysses", "1", *settings)
    with pytest.raises(ValueError, match=expected):
        Setup(recipe, ZERO1, 1, H200).check_fits(sharding_for(recipe, [document_in_turns(tokens, 1.0)]))


def test_a_refusal_names_the_setting_that_skips_the_check() -> None:
    recipe = llama("--parallel.ulysses", "1")
    with pytest.raises(ValueError, match=r"--training\.check_memory false tries it all the same"):
        Setup(recipe, ZERO1, 1, H200).check_fits(sharding_for(recipe, [document_in_turns(1 << 20, 1.0)]))


def test_advice_names_a_shorter_length_that_fits() -> None:
    recipe = llama("--parallel.ulysses", "4", "--training.recompute", "full")
    sharding = sharding_for(recipe, [document_in_turns(131072, 1.0)])
    found = Setup(recipe, ZERO1, 4, Device("h200", 20.0)).advice(sharding)
    assert re.match(r"\d+ tokens would fit; --training\.offload_activations true makes it fit", found)
    assert 65536 < int(found.split()[0]) < 131072


def test_a_cpu_has_no_time_estimate_and_no_memory_limit() -> None:
    recipe = load_recipe(ROOT / "recipes/smollm2_cpu.json")
    assert floor_seconds(recipe, sharding_for(recipe, [document_in_turns(1024, 1.0)]), DEVICES["cpu"]) == {}
    assert math.isinf(DEVICES["cpu"].memory_gib)


def test_a_faster_recompute_setting_that_fits_is_named() -> None:
    recipe = llama("--parallel.ulysses=1", "--training.recompute=full")
    short, long = (sharding_for(recipe, [document_in_turns(tokens, 1.0)]) for tokens in (16_384, 131_072))
    needs = Setup(recipe, ZERO1, 1, H200).recompute_bytes(long)
    assert (
        list(needs) == ["none", "selective", "mlp", "full"]
        and needs["none"] > needs["selective"] > needs["mlp"] > needs["full"]
    )
    assert (
        Setup(recipe, ZERO1, 1, H200)
        .faster_recompute(short)
        .startswith("--training.recompute none would fit too (about ")
    )
    assert (
        Setup(recipe, ZERO1, 1, H200)
        .faster_recompute(long)
        .startswith("--training.recompute selective would fit too (about ")
    )
    assert (
        Setup(recipe, ZERO1, 1, DEVICES["h100"])
        .faster_recompute(long)
        .startswith("--training.recompute mlp would fit too (about ")
    )
    assert Setup(recipe, ZERO1, 1, Device("62 GiB", 62)).faster_recompute(long) == ""
    assert Setup(llama("--parallel.ulysses=1"), ZERO1, 1, H200).faster_recompute(short) == ""
