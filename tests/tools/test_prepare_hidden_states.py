"""The capture tool: a recipe or flags in, stores and a vocabulary out, one sentence where that cannot be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from eagle_ds.store.store import Store
from tests.capture.test_run import contents
from tests.tiny_targets import save_tiny_llama
from tools.prepare_hidden_states import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("target"))


@pytest.fixture
def recipe(target, tmp_path) -> Path:
    """smollm2_cpu, for the tiny target and a few conversations."""
    for split, count in (("train", 5), ("eval", 3)):
        with open(tmp_path / f"{split}.jsonl", "w") as stream:
            for n in range(count):
                question = {"role": "user", "content": "q" * (5 * n + 1)}
                chat = [question, {"role": "assistant", "content": "answer " * (n + 1)}]
                stream.write(json.dumps({"id": f"{split}{n}", "messages": chat}) + "\n")
    settings = json.loads((ROOT / "recipes/smollm2_cpu.json").read_text())
    settings["target"] |= {"model": str(target), "hidden_size": 32, "num_layers": 8, "vocab_size": 280}
    settings["draft"] |= {
        "hidden_size": 32, "vocab_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8
    }
    settings["data"] |= {
        "conversations": str(tmp_path / "train.jsonl"), "eval_conversations": str(tmp_path / "eval.jsonl")
    }
    settings["data"] |= {"store": str(tmp_path / "train_store"), "eval_store": str(tmp_path / "eval_store")}
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(settings))
    return path


def test_a_recipe_fills_both_stores_and_chooses_the_vocabulary(recipe, tmp_path, capsys):
    assert main(["--recipe", str(recipe), "--limit", "4", "--limit-eval", "2"]) == 0
    assert len(Store(tmp_path / "train_store")) == 4 and len(Store(tmp_path / "eval_store")) == 2
    assert (tmp_path / "train_store" / "vocab_64.safetensors").is_file()
    assert main(["--recipe", str(recipe), "--split", "train"]) == 0
    assert len(Store(tmp_path / "train_store")) == 5
    assert "4 samples stored already, 1 to do" in capsys.readouterr().out


def test_a_dry_run_tells_bytes_and_hours_and_writes_nothing(recipe, tmp_path, capsys):
    assert main(["--recipe", str(recipe), "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "5 samples" in told and "to write 0.00 GB" in told and "hours at" in told
    assert not (tmp_path / "train_store").exists() and not (tmp_path / "eval_store").exists()


def test_two_processes_write_the_store_that_one_writes(recipe, tmp_path):
    flags = ["--recipe", str(recipe), "--split", "train", "--data.store"]
    assert main([*flags, str(tmp_path / "one")]) == 0
    assert main([*flags, str(tmp_path / "two"), "--device", "cpu,cpu"]) == 0
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one.keys() == two.keys()
    for name in one:
        assert (one[name]["hidden_state"].float() - two[name]["hidden_state"].float()).abs().max() < 0.1


def test_flags_do_without_a_recipe(target, recipe, tmp_path):
    paths = ["--conversations", str(tmp_path / "eval.jsonl"), "--store", str(tmp_path / "s")]
    flags = ["--target", str(target), *paths, "--max-length", "64", "--dtype", "float32"]
    kwargs = ["--template-kwargs", '{"enable_thinking": false}']
    assert main([*flags, "--aux-layer-ids", "0", "2", "5", *kwargs]) == 0
    assert Store(tmp_path / "s").info.aux_layer_ids == (0, 2, 5)
    assert Store(tmp_path / "s").info.template_kwargs == {"enable_thinking": False}
    assert main([*flags, "--template-kwargs", "[1]"]) == 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "give --recipe, or --target, --conversations, --store, --max-length as well"),
        (["--storr", "x"], "unknown arguments --storr x"),
        (
            ["--recipe", "RECIPE", "--target.hidden_size", "64", "--draft.hidden_size", "64"],
            "target.hidden_size=64 in the recipe",
        ),
        (["--recipe", "RECIPE", "--target.model", "models/none"], "is not a folder here"),
        (["--recipe", "RECIPE", "--data.conversations", "none.jsonl"], "none.jsonl does not exist"),
        (["--recipe", "RECIPE", "--data.eval_conversations", "gone.jsonl"], "gone.jsonl does not exist"),
        (["--recipe", "RECIPE", "--device", "all"], "--device all needs GPUs"),
        (["--recipe", "RECIPE", "--device", "gpu"], "--device gpu is unknown; use auto, cpu, cuda"),
        (
            ["--recipe", "RECIPE", "--device", "cpu,cuda:1"],
            "--device cuda:1 needs a GPU and none can be seen",
        ),
        (
            ["--recipe", "RECIPE", "--data.max_length", "10"],
            "skipped with no answer left after truncation; raise max_length",
        ),
        (["--recipe", "RECIPE", "--template-kwargs", "{}"], "give --target.template_kwargs"),
        (["--recipe", "RECIPE", "--strict", "--data.conversations", "BAD"], "line 1: not valid JSON"),
        (["--recipe", "RECIPE", "--data.conversations", "BAD"], "1 rejected (not JSON: 1)"),
        (["--recipe", "RECIPE", "--target.model", "NO_TOKENIZER"], "has no tokenizer (tokenizer.json"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_exit_code_1(
    recipe, target, tmp_path, capsys, monkeypatch, arguments, complaint
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    bare = shutil.copytree(target, tmp_path / "bare", ignore=shutil.ignore_patterns("token*"))
    (tmp_path / "bad.jsonl").write_text("{broken\n")
    places = {"RECIPE": str(recipe), "NO_TOKENIZER": str(bare), "BAD": str(tmp_path / "bad.jsonl")}
    assert main([places.get(argument, argument) for argument in arguments]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and complaint in error
    assert not (tmp_path / "train_store").exists()


def test_a_store_that_cannot_be_written_is_refused_before_the_conversations_are_read(
    recipe, tmp_path, capsys
):
    (tmp_path / "file").touch()
    assert main(["--recipe", str(recipe), "--data.store", str(tmp_path / "file" / "store")]) == 1
    said = capsys.readouterr()
    detail = f"{tmp_path}/file is a file, where a folder was expected"
    assert said.out == "" and f"error: store {tmp_path}/file/store: {detail}" in said.err
