"""The tools that users type after training: export, acceptance measurement, and report."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from eagle_ds.drafts.loading import load_draft
from tests.draft_cases import LAYERS, PLAIN, random_draft, recipe_for, write_run
from tests.tiny_targets import save_tiny_llama

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def load_tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch):
    """Run a tool in this process and return its exit code."""

    def run(name: str, *arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        return load_tool(name).main()

    return run


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("target"))


@pytest.fixture
def run_dir(tmp_path: Path, target: Path) -> Path:
    chats = [
        [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": "yes"}]
        for i in range(5)
    ]
    lines = [json.dumps({"id": f"c{i}", "messages": chat}) for i, chat in enumerate(chats)]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines) + "\n")
    recipe = recipe_for(PLAIN, tmp_path, str(target))
    recipe = recipe.model_copy(
        update={"data": recipe.data.model_copy(update={"eval_conversations": str(tmp_path / "chats.jsonl")})}
    )
    write_run(tmp_path, random_draft(), recipe)
    return tmp_path / "run"


def test_a_run_is_exported_measured_and_reported(
    run_dir: Path, call, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("export_draft", run_dir) == 0
    assert call("export_draft", run_dir, "--vllm") == 0
    assert {path.name for path in run_dir.iterdir()} >= {"draft", "draft-vllm"}
    assert "--speculative-draft-model-path" in (run_dir / "draft" / "README.md").read_text()
    assert "vllm serve" in (run_dir / "draft-vllm" / "README.md").read_text()
    settings = ("--num-prompts", 3, "--max-new-tokens", 6, "--num-draft-tokens", 3)
    assert (
        call("eval_acceptance", "--recipe", run_dir / "recipe.json", "--baseline", "untrained", *settings)
        == 0
    )
    printed = capsys.readouterr().out
    assert (
        "trained over untrained" in printed
        and "paired bootstrap interval" in printed
        and "3 of 3 answers equal to plain" in printed
    )
    found = json.loads((run_dir / "acceptance.json").read_text())
    assert [draft["name"] for draft in found["drafts"]] == ["untrained", "trained"]
    assert (found["num_prompts"], found["num_draft_tokens"], found["dtype"]) == (3, 3, "float32")
    trained = json.loads((run_dir / "recipe.json").read_text())["data"]["max_length"]
    assert found["trained_length"] == trained
    assert ("reach beyond the draft's trained length" in printed) == (found["beyond_trained_length"] > 0)
    assert (run_dir / "acceptance.png").read_bytes().startswith(b"\x89PNG")
    assert call("make_report", run_dir) == 0
    assert "untrained → trained" in (run_dir / "report.html").read_text()


@pytest.mark.parametrize(
    "name",
    ["bench_serving", "compare_runs", "eval_acceptance", "export_draft", "make_report", "serve_draft"],
)
def test_tools_that_do_not_train_do_not_import_deepspeed(name: str) -> None:
    """DeepSpeed is slow to import and prints warnings on a machine without a GPU."""
    root = Path(__file__).resolve().parents[2]
    code = f"import runpy, sys; runpy.run_path('tools/{name}.py'); sys.exit('deepspeed' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=600, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_exported_draft_decodes_as_its_checkpoint(
    run_dir: Path, tmp_path: Path, target: Path, call
) -> None:
    assert call("export_draft", run_dir, "--dtype", "float32", "--out", tmp_path / "served") == 0
    arguments = (
        "--target",
        target,
        "--draft",
        tmp_path / "served",
        "--baseline",
        run_dir,
        "--prompts",
        tmp_path / "chats.jsonl",
    )
    assert (
        call(
            "eval_acceptance",
            *arguments,
            "--num-prompts",
            2,
            "--max-new-tokens",
            8,
            "--out",
            tmp_path / "out",
        )
        == 0
    )
    found = json.loads((tmp_path / "out" / "acceptance.json").read_text())
    baseline, draft = found["drafts"]
    assert (baseline["name"], draft["name"]) == ("baseline", "draft")
    assert baseline["acceptance_by_position"] == draft["acceptance_by_position"]
    assert found["differences"][0]["value"] == 0.0


def test_baseline_untrained_of_a_run_with_init_from_is_that_draft(
    run_dir: Path, tmp_path: Path, call
) -> None:
    assert call("export_draft", run_dir, "--dtype", "float32", "--out", tmp_path / "served") == 0
    recipe = json.loads((run_dir / "recipe.json").read_text())
    recipe["draft"]["init_from"] = str(tmp_path / "served")
    (run_dir / "recipe.json").write_text(json.dumps(recipe))
    arguments = (
        "--recipe",
        run_dir / "recipe.json",
        "--baseline",
        "untrained",
        "--num-prompts",
        2,
        "--max-new-tokens",
        8,
    )
    assert call("eval_acceptance", *arguments) == 0
    found = json.loads((run_dir / "acceptance.json").read_text())
    assert found["drafts"][0]["acceptance_by_position"] == found["drafts"][1]["acceptance_by_position"]


def test_a_target_that_transformers_cannot_load_is_a_one_sentence_error(
    run_dir: Path, target: Path, tmp_path: Path, call, capsys
) -> None:
    shutil.copytree(target, tmp_path / "odd")
    config = json.loads((tmp_path / "odd" / "config.json").read_text())
    (tmp_path / "odd" / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of"}))
    assert call("eval_acceptance", "--draft", run_dir, "--target", tmp_path / "odd") == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ") and "cannot be loaded" in said
    assert not (run_dir / "acceptance.json").exists()


def test_a_full_disk_leaves_no_result_file(
    run_dir: Path, call, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    assert call("eval_acceptance", "--draft", run_dir, "--num-prompts", 1, "--max-new-tokens", 3) == 1
    assert "No space left on device" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (run_dir / "acceptance.json").exists()


def test_answers_that_differ_in_bfloat16_are_counted_with_their_gap(run_dir: Path, call) -> None:
    settings = ("--num-prompts", 2, "--max-new-tokens", 12, "--dtype", "bfloat16", "--num-draft-tokens", 2)
    assert call("eval_acceptance", "--recipe", run_dir / "recipe.json", *settings) == 0
    (draft,) = json.loads((run_dir / "acceptance.json").read_text())["drafts"]
    assert draft["identical_answers"] + len(draft["divergences"]) == 2
    assert all(gone["gap"] >= 0 for gone in draft["divergences"])


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("export_draft", ["{tmp}/nowhere"], "is not a folder"),
        ("export_draft", ["{tmp}"], "holds no draft"),
        ("export_draft", ["{run}", "--target", "{tmp}/no-target"], "target"),
        (
            "export_draft",
            ["{run}", "--out", "{run}/recipe.json/draft"],
            "recipe.json is a file, where a folder was expected",
        ),
        (
            "eval_acceptance",
            ["--draft", "{run}", "--out", "{run}/recipe.json"],
            "recipe.json is a file, where a folder was expected",
        ),
        ("export_draft", ["{run}", "--aux-layer-ids", "1", "2", "3"], "was trained on layers [1, 2, 5]"),
        ("eval_acceptance", [], "no draft given"),
        ("eval_acceptance", ["--recipe", "{tmp}/nothing.json"], "cannot read"),
        ("eval_acceptance", ["--draft", "{run}", "--prompts", "{tmp}/none.jsonl"], "does not exist"),
        ("eval_acceptance", ["--draft", "{run}", "--max-prompt-tokens", "3"], "has no usable prompt"),
        ("eval_acceptance", ["--draft", "{run}", "--target", "{tmp}"], "has no config.json"),
        (
            "eval_acceptance",
            ["--draft", "{run}", "--aux-layer-ids", "1", "2", "9"],
            "ascending layer outputs",
        ),
        ("make_report", ["{tmp}"], "is not a run folder"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_1(
    tool: str,
    arguments: list[str],
    message: str,
    run_dir: Path,
    tmp_path: Path,
    call,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = sorted(path.name for path in run_dir.iterdir())
    assert call(tool, *(argument.format(tmp=tmp_path, run=run_dir) for argument in arguments)) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("error: ") and message in said[-1]
    assert sorted(path.name for path in run_dir.iterdir()) == before


def test_an_exported_draft_can_be_exported_again_for_the_other_engine(
    run_dir: Path, tmp_path: Path, call
) -> None:
    assert call("export_draft", run_dir, "--dtype", "float32", "--out", tmp_path / "served") == 0
    again = ("export_draft", tmp_path / "served", "--vllm", "--dtype", "float32", "--out", tmp_path / "v")
    assert call(*again) == 1  # nothing says which target it is for
    (run_dir / "recipe.json").rename(tmp_path / "recipe.json")  # now the export lies in a run folder
    assert call(*again) == 0
    again, first = load_draft(tmp_path / "v"), load_draft(tmp_path / "served")
    assert again.layer_outputs == LAYERS
    assert all(torch.equal(again.state[name], tensor) for name, tensor in first.state.items())
