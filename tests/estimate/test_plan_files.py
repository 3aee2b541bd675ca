"""The plan says what is missing, what an existing run allows, and whose RoPE is trained."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from eagle_ds.config.recipe import Recipe, load_recipe
from eagle_ds.config.run_folder import checkpoint_path
from eagle_ds.config.run_state import RunState
from eagle_ds.estimate.plan_files import files_text
from eagle_ds.store.manifest import StoreInfo, manifest_hash, read_manifest, write_store_info

ROOT = Path(__file__).resolve().parents[2]
CAPTURE = "tools/prepare_hidden_states.py ..."
INFO = StoreInfo("t", "", "", hidden_size=24, aux_layer_ids=(1, 3, 4), vocab_size=37)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def recipe(*overrides: str) -> Recipe:
    base = ("--parallel.ulysses=2", "--data.store=store", "--draft.rope_scaling=null")
    return load_recipe(ROOT / "recipes/llama3_128k.json", [*base, *overrides])


def capture(root: str) -> str:
    """Make an empty store; return its hash."""
    Path(root).mkdir()
    write_store_info(Path(root), INFO)
    return manifest_hash(Path(root), read_manifest(Path(root))[1])


def save_run(manifest: str, world_size: int, *overrides: str) -> None:
    """Write the state of a run that was trained to step 7."""
    one = recipe(*overrides)
    folder = checkpoint_path(one.run_dir, 7)
    folder.mkdir(parents=True)
    state = RunState(7, world_size, manifest, one.model_dump(mode="json"))
    (folder / "state.json").write_text(json.dumps(asdict(state)))
    (folder.parent / "latest").write_text(folder.name)


def line(text: str, word: str) -> str:
    """The only line that contains ``word``."""
    (found,) = [one for one in text.splitlines() if word in one]
    return found


def test_missing_conversations_are_marked_with_what_they_are_needed_for() -> None:
    text = files_text(recipe("--training.acceptance_interval", "5"), 2, CAPTURE)
    train, held_out = (line(text, f"long_chats.{split}.jsonl ") for split in ("train", "eval"))
    assert train.endswith("MISSING; needed to capture store")
    assert "MISSING; needed to capture stores/llama3_128k_eval and to measure acceptance" in held_out
    capture("store")
    text = files_text(recipe("--data.conversations", "there.jsonl"), 2, CAPTURE)
    assert line(text, "there.jsonl").endswith("MISSING; not needed: the store is captured")
    Path("there.jsonl").touch()
    text = files_text(recipe("--data.conversations", "there.jsonl"), 2, CAPTURE)
    assert "exists" in line(text, "there.jsonl")


def test_a_data_set_of_the_hub_is_not_marked_as_missing() -> None:
    Path("folder/x").mkdir(parents=True)
    for given, state in (("owner/chats:train", "data set on the Hugging Face hub"), ("folder/x", "MISSING")):
        assert state in line(files_text(recipe("--data.conversations", given), 2, CAPTURE), given)


def test_a_target_folder_that_does_not_exist_is_marked_and_an_id_of_the_hub_is_not() -> None:
    for given, missing in (("models/none", True), ("./none", True), ("owner/model", False), (".", False)):
        text = files_text(recipe("--target.model", given), 2, CAPTURE)
        assert ("MISSING: no folder of a target" in text) == missing, given


def test_a_missing_draft_to_start_from_is_marked() -> None:
    text = files_text(recipe("--draft.init_from", "absent"), 2, CAPTURE)
    assert line(text, "absent").endswith("MISSING: no exported draft, checkpoint or run there")


def test_an_existing_run_is_named_with_the_step_that_it_resumes_at() -> None:
    assert "RUN" not in files_text(recipe(), 2, CAPTURE)
    save_run(capture("store"), 2)
    text = files_text(recipe("--training.learning_rate", "1e-5"), 2, CAPTURE)
    assert "EXISTING RUN: resumes runs/llama3_128k at step 7; training.learning_rate" in text


@pytest.mark.parametrize(
    ("world_size", "overrides", "reason"),
    [
        (4, [], "was trained by 2 processes, now there are 4"),
        (2, ["--parallel.ulysses", "1"], "ulysses * ring = 2, now it is 1"),
        (2, ["--training.seed", "5"], "training.seed = 0 (now 5)"),
        (2, ["--data.store", "other"], "on the store store; data.store is now other, which holds"),
    ],
)
def test_an_existing_run_that_cannot_be_resumed_is_marked_with_the_reason(
    world_size: int, overrides: list[str], reason: str
) -> None:
    save_run(capture("store"), 2)
    capture("other")
    Path("other/manifest.jsonl").write_text("")
    write_store_info(Path("other"), StoreInfo("u", "", "", hidden_size=24, aux_layer_ids=(1,), vocab_size=37))
    text = files_text(recipe(*overrides), world_size, CAPTURE)
    assert reason in line(text, "CANNOT RESUME: ")


@pytest.mark.parametrize(
    ("file", "tree"),
    [
        ("config.json", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
        ("arch.json", {"rope_theta": 1e6, "rope_scaling": None}),
    ],
)
def test_the_plan_says_whose_rope_is_trained(file: str, tree: dict[str, object]) -> None:
    Path("draft").mkdir()
    Path("draft", file).write_text(json.dumps(tree))
    start = ("--draft.init_from", "draft")
    own = line(files_text(recipe(*start), 2, CAPTURE), "ROPE: ")
    assert own.startswith("ROPE: that of the draft in init_from (theta 1e+06, no scaling); the recipe's (")
    overridden = line(files_text(recipe(*start, "--draft.override_rope", "true"), 2, CAPTURE), "ROPE: ")
    assert overridden.startswith("ROPE: the recipe's (theta 500000, no scaling), because draft.override_rope")
    same = line(files_text(recipe(*start, "--draft.rope_theta", "1e6"), 2, CAPTURE), "ROPE: ")
    assert same == "ROPE: theta 1e+06, no scaling, in the recipe and in the draft of init_from"
    assert "ROPE" not in files_text(recipe(), 2, CAPTURE), "without init_from there is one RoPE only"
