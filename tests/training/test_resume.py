"""A resumed run equals an uninterrupted one bit for bit, and an incomplete checkpoint is never resumed
from.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from eagle_ds.drafts.loading import load_draft
from eagle_ds.training.checkpoint import find_resumable, latest
from tests.gloo_pool import GlooPool
from tests.training.tiny_run import MASKS, Tiny, make_tiny, write_store
from tests.training.training_ranks import (
    error_of_training,
    messages_of_training,
    run_training,
    train_onto_a_full_disk,
    train_until,
)

TIMED = {"tokens_per_s", "step_s", "data_wait_s", "read_s", "peak_gib"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def lines(path: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in json.loads(text).items() if k not in TIMED}
        for text in path.read_text().splitlines()
    ]


def settings(stage: int, tiny: Tiny) -> dict[str, Any]:
    return {
        "deepspeed": str(tiny.root / f"ds_stage{stage}.json"),
        "data__pack_tokens": 50,
        "training__max_steps": 5,
        "training__save_interval": 2,
        "training__eval_interval": 3,
        "training__gradient_accumulation": 2,
        "training__warmup_ratio": 0.3,
    }


RESUMED = [(0, 2, None), (1, 2, "ring"), (2, 2, "ulysses"), (3, 2, "ring"), (1, 4, "ulysses")]


@pytest.mark.parametrize(("stage", "world", "sharing"), RESUMED)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    pool: GlooPool, tiny: Tiny, stage: int, world: int, sharing: str | None
) -> None:
    """Interrupted after step 3 and its evaluation: step 2 is the newest checkpoint, so step 3 is trained
    again.
    """
    layout = {f"parallel__{sharing}": 2} if sharing else {}
    whole = tiny.recipe(f"whole{stage}{world}", **settings(stage, tiny), **layout)
    halves = tiny.recipe(f"halves{stage}{world}", **settings(stage, tiny), **layout)
    pool.run(run_training, world, whole)
    pool.run(train_until, world, halves, 3)
    assert latest(halves.run_dir).step == 2 and len(lines(halves.run_dir / "log.jsonl")) == 3
    pool.run(run_training, world, halves)
    for folder in ("checkpoints/step_5", "best"):
        first, second = (
            load_file(run.run_dir / folder / "draft_state.safetensors") for run in (whole, halves)
        )
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert lines(halves.run_dir / "log.jsonl") == lines(whole.run_dir / "log.jsonl")
    assert lines(halves.run_dir / "eval.jsonl") == lines(whole.run_dir / "eval.jsonl")
    assert {p.name for p in (halves.run_dir / "checkpoints").glob("step_*")} == {"step_4", "step_5"}


@pytest.fixture(scope="module")
def finished(pool: GlooPool, tiny: Tiny) -> Tiny:
    pool.run(run_training, 1, tiny.recipe("done", **settings(1, tiny)))
    return tiny


def test_a_finished_run_says_so_and_does_nothing(pool: GlooPool, finished: Tiny) -> None:
    recipe = finished.recipe("done", **settings(1, finished) | {"training__learning_rate": 0.5})
    saved = [
        *(recipe.run_dir / "checkpoints").rglob("*"),
        *(recipe.run_dir / "best").rglob("*"),
        recipe.run_dir / "recipe.json",
    ]
    before = {path: path.stat().st_mtime_ns for path in saved}
    pool.run(run_training, 1, recipe)
    assert {path: path.stat().st_mtime_ns for path in saved} == before
    assert len(lines(recipe.run_dir / "log.jsonl")) == 5


def test_a_finished_run_says_so_before_it_builds_an_engine(pool: GlooPool, finished: Tiny) -> None:
    said = pool.run(messages_of_training, 1, finished.recipe("done", **settings(1, finished)))[0]
    assert said[-1].startswith("nothing left to do: ") and "step 5 of 5 (training.epochs = 100" in said[-1]
    assert "an engine was built" not in said


def test_only_a_new_run_says_that_its_draft_starts_untrained(pool: GlooPool, tiny: Tiny) -> None:
    begun = pool.run(messages_of_training, 1, tiny.recipe("short", training__max_steps=1))[0]
    resumed = pool.run(messages_of_training, 1, tiny.recipe("short", training__max_steps=2))[0]
    assert "the draft starts untrained" in begun and "an engine was built" in begun
    assert not any("the draft starts" in text for text in resumed)
    assert any("at step 1 of 2" in text for text in resumed)


def test_every_save_holds_a_draft_that_loads_without_deepspeed(finished: Tiny) -> None:
    run = finished.root / "runs" / "done"
    for folder in (run / "checkpoints" / "step_5", run / "best", run):
        draft = load_draft(folder)
        assert draft.arch.hidden_size == 24 and draft.vocab.d2t.numel() == 19
        assert all(tensor.dtype == torch.float32 for tensor in draft.state.values())


def test_an_incomplete_checkpoint_is_never_resumed_from(pool: GlooPool, finished: Tiny) -> None:
    source = finished.root / "runs" / "done"
    torn = finished.root / "runs" / "torn"
    shutil.copytree(source, torn)
    (torn / "checkpoints" / "step_5").rename(torn / "checkpoints" / ".step_5.partial")
    (torn / "checkpoints" / "latest").write_text("step_4")
    recipe = finished.recipe("torn", **settings(1, finished))
    pool.run(run_training, 1, recipe)
    assert lines(torn / "log.jsonl") == lines(source / "log.jsonl")
    assert not list((torn / "checkpoints").glob(".step_*"))


def test_after_a_full_disk_the_run_resumes_from_the_previous_checkpoint(pool: GlooPool, tiny: Tiny) -> None:
    whole, full = (tiny.recipe(name, **settings(1, tiny)) for name in ("roomy", "full"))
    pool.run(run_training, 1, whole)
    text = pool.run(train_onto_a_full_disk, 1, full, 4)[0]
    assert "cannot write the checkpoint" in text and "free space and run again" in text
    assert latest(full.run_dir).step == 2
    pool.run(run_training, 1, full)
    assert lines(full.run_dir / "log.jsonl") == lines(whole.run_dir / "log.jsonl")


def test_a_checkpoint_without_its_state_is_an_error(pool: GlooPool, finished: Tiny) -> None:
    broken = finished.root / "runs" / "broken"
    shutil.copytree(finished.root / "runs" / "done", broken)
    (broken / "checkpoints" / "step_5" / "state.json").unlink()
    text, _ = pool.run(error_of_training, 1, finished.recipe("broken", **settings(1, finished)))[0]
    assert "step_5 cannot be read" in text and "--fresh" in text


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"training__seed": 1}, "training.seed = 0 (now 1)"),
        ({"training__ttt_steps": 2}, "training.ttt_steps = 3 (now 2)"),
        ({"data__pack_tokens": 60}, "data.pack_tokens = 50 (now 60)"),
        ({"draft__rope_theta": 200.0}, "draft.rope_theta = 100.0 (now 200.0)"),
    ],
)
def test_settings_that_change_the_meaning_of_a_checkpoint_are_refused(
    finished: Tiny, change: dict[str, Any], expected: str
) -> None:
    state = latest(finished.root / "runs" / "done")
    recipe = finished.recipe("done", **{**settings(1, finished), **change})
    with pytest.raises(ValueError, match=r"--fresh") as error:
        find_resumable(recipe, state.manifest_hash, 1)
    assert expected in str(error.value)


def test_other_settings_may_change(finished: Tiny) -> None:
    state = latest(finished.root / "runs" / "done")
    recipe = finished.recipe(
        "done", **{**settings(1, finished), "training__max_steps": 20, "training__learning_rate": 2e-3}
    )
    assert find_resumable(recipe, state.manifest_hash, 1) == state


def test_other_stores_and_worlds_are_refused(finished: Tiny) -> None:
    recipe, state = finished.recipe("done", **settings(1, finished)), latest(finished.root / "runs" / "done")
    with pytest.raises(ValueError, match="has changed since"):
        find_resumable(recipe, "another", 1)
    moved = finished.recipe("done", **settings(1, finished), data__store="stores/new")
    with pytest.raises(ValueError, match="which holds other samples") as error:
        find_resumable(moved, "another", 1)
    new_data = f"--output_dir OTHER_FOLDER --draft.init_from {recipe.run_dir}"
    assert all(part in str(error.value) for part in (recipe.data.store, "stores/new", new_data))
    with pytest.raises(ValueError, match="trained by 1 processes, now there are 2"):
        find_resumable(recipe, state.manifest_hash, 2)
    spread = finished.recipe("done", **settings(1, finished), parallel__ring=2)
    with pytest.raises(ValueError, match=r"ulysses \* ring = 1, now it is 2"):
        find_resumable(spread, state.manifest_hash, 1)


def test_a_draft_starts_from_another_run(pool: GlooPool, finished: Tiny) -> None:
    source = finished.root / "runs" / "done"
    recipe = finished.recipe(
        "onward", draft__init_from=str(source), training__max_steps=1, training__learning_rate=1e-30
    )
    pool.run(run_training, 1, recipe)
    folders = (source / "best", recipe.run_dir / "checkpoints" / "step_1")
    first, second = (load_file(folder / "draft_state.safetensors") for folder in folders)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_draft_as_wide_as_its_target_does_not_store_the_shared_embedding(
    pool: GlooPool, tiny: Tiny
) -> None:
    recipe = tiny.recipe("head", training__max_steps=1, training__learning_rate=1e-30)
    pool.run(run_training, 1, recipe)
    state = load_file(recipe.run_dir / "checkpoints/step_1/draft_state.safetensors")
    assert "embed_tokens.weight" not in state


def test_a_store_without_token_labels_trains_the_same(pool: GlooPool, tiny: Tiny, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    write_store(bare, tiny.target, MASKS, seed=1, labels=False)
    runs = []
    for name, store in (("with", tiny.root / "train"), ("without", bare)):
        recipe = tiny.recipe(
            name, data__store=str(store), parallel__ring=2, training__gradient_accumulation=3
        )
        pool.run(run_training, 2, recipe)
        runs.append([line["loss"] for line in lines(recipe.run_dir / "log.jsonl")])
    assert runs[0] == pytest.approx(runs[1], rel=1e-6)
