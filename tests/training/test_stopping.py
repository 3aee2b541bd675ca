"""If ranks disagree, cannot read, or compute a number that is not finite, all stop at once with the same
message.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from eagle_ds.config.run_folder import lock_run
from eagle_ds.launch import set_aside
from eagle_ds.store.store import Sample, Store, StoreInfo, StoreWriter
from tests.gloo_pool import GlooPool
from tests.training.tiny_run import MASKS, H, Tiny, V, make_tiny
from tests.training.training_ranks import error_of_training, run_training, take_steps

SECONDS = 100  # seconds, for hangs only: idle, a case takes about 1 s; gloo would give up after 30 minutes


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    return make_tiny(tmp_path)


def messages(pool: GlooPool, world: int, *args: Any) -> list[str]:
    found = pool.run(error_of_training, world, *args)
    assert all(seconds < SECONDS for _, seconds in found)
    assert len({text for text, _ in found}) == 1, found
    return [text for text, _ in found]


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("other_store", ", store manifest (rank 0: "),
        ("other_seed", "ranks differ in recipe (rank 0: "),
        ("other_samples", "ranks hold different data at this step (rank 0: step 3 micro-batch 0: sample-"),
        ("broken_read", "rank 1: store/samples/ab/cd.h5: the file was cut"),
    ],
)
def test_every_rank_stops_when_one_differs(pool: GlooPool, tiny: Tiny, fault: str, expected: str) -> None:
    assert expected in messages(pool, 2, tiny.recipe(parallel__ring=2), fault, 1)[0]


@pytest.mark.parametrize(
    "settings", [{}, {"training__save_interval": 1}, {"training__max_steps": 1}], ids=["next", "save", "end"]
)
def test_a_line_that_cannot_be_written_stops_every_rank(
    pool: GlooPool, tiny: Tiny, settings: dict[str, Any]
) -> None:
    """Three places write it: the next step after its forward, a checkpoint before it saves, the end of the
    loop.
    """
    found = messages(pool, 2, tiny.recipe(parallel__ring=2, **settings), "unwritable_log", 0)[0]
    assert (
        found.startswith("rank 0: cannot write") and "log.jsonl" in found and "run again to resume" in found
    )


def test_an_error_in_another_data_parallel_group_stops_all_ranks(pool: GlooPool, tiny: Tiny) -> None:
    assert messages(pool, 4, tiny.recipe(parallel__ulysses=2), "broken_read", 3)[0].startswith("rank 3: ")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"data__store": "/nowhere/store"}, "is not a hidden-state store"),
        ({"target__model": "./nowhere"}, "target ./nowhere is not a folder here"),
        ({"target__num_layers": 9}, "target.num_layers=9 in the recipe but"),
        (
            {"target__aux_layer_ids": (2, 3, 4)},
            "was captured with aux_layer_ids [1, 3, 4], the recipe says [2, 3, 4]",
        ),
        (
            {"target__template_kwargs": {"enable_thinking": False}},
            "was captured with template_kwargs {}, the recipe says {'enable_thinking': False}",
        ),
        ({"data__max_length": 1}, "nothing to train on: 0 of 10 samples"),
        (
            {"training__gradient_accumulation": 50},
            "one optimizer step takes dp 1 * gradient_accumulation 50 = 50 sequences",
        ),
        ({"draft__init_from": "/nowhere"}, "/nowhere"),
        ({"parallel__ring": 3}, "not a multiple of ulysses * ring"),
    ],
)
def test_bad_input_is_one_sentence_on_all_ranks(
    pool: GlooPool, tiny: Tiny, overrides: dict[str, Any], expected: str
) -> None:
    assert expected in messages(pool, 2, tiny.recipe(**{"parallel__ring": 2, **overrides}))[0]
    assert not (tiny.root / "runs").exists()


def test_a_store_of_other_weights_is_refused(pool: GlooPool, tiny: Tiny) -> None:
    info = StoreInfo("tiny", "another hash", "none", H, (1, 3, 4), V, dtype="float32")
    write_one(tiny.root / "other", info, torch.randn(9, H))
    found = messages(pool, 1, tiny.recipe(data__store=str(tiny.root / "other")))[0]
    assert "was captured from other weights (tiny, hash another hash)" in found


def test_an_empty_store_is_refused(pool: GlooPool, tiny: Tiny) -> None:
    with StoreWriter(tiny.root / "empty", Store(tiny.root / "train").info):
        pass
    assert "holds no samples" in messages(pool, 1, tiny.recipe(data__store=str(tiny.root / "empty")))[0]


def write_one(root: Path, info: StoreInfo, hidden: torch.Tensor, name: str = "bad") -> None:
    size = len(hidden)
    ids, mask = torch.zeros(size, dtype=torch.int32), torch.ones(size, dtype=torch.uint8)
    with StoreWriter(root, info) as writer:
        writer.add(Sample(name, ids, mask, torch.zeros(size, 3 * H), hidden, ids, torch.zeros(size)))


@pytest.fixture
def poisoned(tiny: Tiny) -> Tiny:
    """The training store with one more sample, whose target states hold a NaN."""
    hidden = torch.randn(9, H)
    hidden[5, 3] = math.nan
    write_one(tiny.root / "train", Store(tiny.root / "train").info, hidden, "poison")
    return tiny


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_loss_that_is_not_finite_stops_all_ranks_and_names_the_sample(
    pool: GlooPool, poisoned: Tiny, stage: int
) -> None:
    recipe = poisoned.recipe(
        training__max_steps=9, parallel__ulysses=2, deepspeed=str(poisoned.root / f"ds_stage{stage}.json")
    )
    found = messages(pool, 2, recipe)[0]
    assert "a loss or gradient is not finite" in found and "samples with such a loss: poison;" in found
    assert "the weights are as before this step" in found


@pytest.mark.parametrize("ds_json", ["stage0", "stage1", "stage2", "stage3", "bf16_stage0", "bf16_stage1"])
@pytest.mark.parametrize("layout", ["R2", "dp2"])
def test_skipping_leaves_the_weights_alone(pool: GlooPool, poisoned: Tiny, ds_json: str, layout: str) -> None:
    """A step takes the whole store, and one sample of it is bad; under dp2 only one rank has it."""
    overrides = {
        "R2": {"parallel__ring": 2, "training__gradient_accumulation": 9},
        "dp2": {"data__pack_tokens": 130},
    }[layout]
    path = str(poisoned.root / f"ds_{ds_json}.json")
    recipe = poisoned.recipe(training__max_steps=2, training__non_finite="skip", deepspeed=path, **overrides)
    steps = pool.run(take_steps, 2, recipe, "AdamW")[0]
    assert steps.applied == [False, False]
    assert not any(map(math.isfinite, steps.norms))
    assert all(torch.equal(steps.before[name], after) for name, after in steps.after.items())


def test_a_run_that_skips_a_step_continues_and_counts_it(pool: GlooPool, poisoned: Tiny) -> None:
    recipe = poisoned.recipe(training__max_steps=9, training__non_finite="skip", parallel__ring=2)
    pool.run(run_training, 2, recipe)
    lines = [json.loads(line) for line in (recipe.run_dir / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 8 and lines[-1]["skipped_steps"] == 1
    assert all(math.isfinite(line["loss"]) for line in lines)


def test_the_tiny_store_has_a_sample_without_trained_tokens() -> None:
    assert any("1" not in mask for mask in MASKS)


def test_a_second_run_in_the_same_folder_is_refused(pool: GlooPool, tiny: Tiny) -> None:
    recipe = tiny.recipe(parallel__ring=2)
    recipe.run_dir.mkdir(parents=True)
    with lock_run(recipe.run_dir):
        found = messages(pool, 2, recipe)[0]
        with pytest.raises(ValueError, match="another run is active"):
            set_aside(recipe.run_dir)
    assert "another run is active in" in found and f"process {os.getpid()} on" in found and "SIGTERM" in found
    assert not (recipe.run_dir / "log.jsonl").exists()
    assert messages(pool, 2, recipe) == ["", ""]
