"""Every recipe is valid data and a valid program, both in bash and in Python."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from eagle_ds import launch
from eagle_ds.config.deepspeed import deepspeed_config, read_ds_json
from eagle_ds.config.recipe import Recipe, load_recipe
from eagle_ds.config.settings import dotted_fields
from eagle_ds.store.manifest import StoreInfo, write_store_info
from eagle_ds.training.agreement import RankFailure
from eagle_ds.training.preflight import check_start
from tests.gloo_pool import GlooPool
from tests.training.tiny_run import make_tiny

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [*sorted((ROOT / "recipes").glob("*.sh")), *sorted((ROOT / "tests/recipes").glob("*.sh"))]
DS_JSONS = sorted((ROOT / "ds_configs").glob("*.json"))


def identify(path: Path) -> str:
    return path.stem


def run(*command: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command with this test's Python first in PATH and without the launcher's variables."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    }
    environment.update(PATH=f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}", **variables)
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=identify)
def test_a_recipe_is_valid_bash_and_valid_python(script: Path) -> None:
    source = script.read_text(encoding="utf-8")
    ast.parse(source)
    assert run("bash", "-n", str(script)).returncode == 0
    assert source.startswith("#!/usr/bin/env bash\n# " + script.stem)
    assert source.endswith("\n# end of recipe\n")
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("script", SCRIPTS, ids=identify)
def test_a_recipe_and_its_deepspeed_json_agree(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    recipe = load_recipe(script.with_suffix(".json"))
    assert recipe.name == script.stem
    assert (
        deepspeed_config(recipe, read_ds_json(recipe.deepspeed), recipe.parallel.size)["train_batch_size"]
        == 1
    )


@pytest.mark.parametrize("path", DS_JSONS, ids=identify)
def test_a_deepspeed_json_is_valid_as_it_stands_and_with_a_recipe(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    monkeypatch.chdir(ROOT)
    own = read_ds_json(path)
    assert DeepSpeedConfig(json.loads(path.read_text())).train_micro_batch_size_per_gpu == 1
    recipe = load_recipe("recipes/llama3_128k.json", ["--deepspeed", str(path), "--parallel.ulysses", "1"])
    config = DeepSpeedConfig(deepspeed_config(recipe, own, 1))
    assert (config.gradient_clipping, config.optimizer_name, config.gradient_accumulation_steps) == (
        0.5,
        "adamw",
        1,
    )
    assert config.zero_optimization_stage == own.get("zero_optimization", {}).get("stage", 0)
    assert config.bfloat16_config.enabled == own.get("bf16", {}).get("enabled", False)


def test_the_pinned_target_sizes_are_the_models_own() -> None:
    recipe = load_recipe(ROOT / "recipes/llama3_128k.json")
    assert recipe.target.aux_ids == (1, 15, 28)
    assert (
        recipe.data.max_length,
        recipe.parallel.size,
        recipe.training.ttt_steps,
        recipe.draft.vocab_size,
    ) == (131072, 8, 7, 32000)
    assert recipe.draft.rope_scaling is not None
    assert recipe.draft.rope_scaling.rope_type == "llama3"


def test_help_under_bash_gives_reasons_and_lists_every_setting() -> None:
    shown = run("bash", "recipes/llama3_128k.sh", "--help")
    assert shown.returncode == 0
    assert "Why these values" in shown.stdout
    for name, _ in dotted_fields(Recipe):
        assert f"--{name} " in shown.stdout
    assert re.search(r"--draft\.rope_theta +500000\.0 ", shown.stdout)
    assert re.search(r"--draft\.fc_norm +false ", shown.stdout) and re.search(
        r"--training\.max_steps +null ", shown.stdout
    )


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """Copy a recipe under the name mine; return its script."""
    for ending in (".sh", ".json"):
        shutil.copy(ROOT / f"recipes/llama3_128k{ending}", tmp_path / f"mine{ending}")
    script = tmp_path / "mine.sh"
    there = "str(Path(__file__).resolve().parent.parent)"  # where the original finds eagle_ds
    script.write_text(script.read_text().replace(there, repr(str(ROOT))))
    return script


def test_a_copied_recipe_has_a_run_folder_of_its_own(copied: Path) -> None:
    shown = run(sys.executable, str(copied), "--plan")
    assert shown.returncode == 0, shown.stderr
    assert "runs/mine/log.jsonl" in shown.stdout and "runs/llama3_128k" not in shown.stdout


def test_help_of_a_copied_recipe_marks_the_originals_header_as_not_its_own(copied: Path) -> None:
    shown = run(sys.executable, str(copied), "--help").stdout
    note, _, header = shown.partition("\n\n")
    assert note.startswith("mine: mine.sh has no header of its own yet.") and "llama3_128k" in note
    about = header.partition("\n\nTrain: ")[0]
    assert "llama3_128k" in about and all(line.startswith("|") for line in about.splitlines())
    copied.write_text(copied.read_text().replace("# llama3_128k: trains", "# mine: trains"))
    assert run(sys.executable, str(copied), "--help").stdout.startswith("mine: trains an EAGLE-3 draft")


def test_plan_under_bash_from_another_folder_starts_nothing(tmp_path: Path) -> None:
    changed = ("--data.max_length", "999", "--data.store", "stores/never_captured")
    shown = run("bash", str(ROOT / "recipes/smollm2_cpu.sh"), "--plan", *changed, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "world_size 2 = dp 1 * ulysses 1 * ring 2" in shown.stdout
    assert '"max_length": 999' in shown.stdout
    assert "999 tokens, 997 trained rows" in shown.stdout
    assert "runs/smollm2_cpu/log.jsonl" in shown.stdout
    assert list(tmp_path.iterdir()) == []


def test_plan_imports_neither_torch_nor_deepspeed() -> None:
    code = (
        "import sys; sys.path.insert(0, '.'); sys.argv = ['x', '--plan']\n"
        "from eagle_ds.launch import main; main('recipes/llama3_128k.sh')\n"
        "sys.exit('torch' in sys.modules or 'deepspeed' in sys.modules)"
    )
    assert run(sys.executable, "-c", code).returncode == 0


def test_the_deepspeed_launcher_runs_a_recipe_and_one_rank_plans() -> None:
    shown = run("deepspeed", "--num_gpus", "8", "recipes/llama3_128k.sh", "--plan", DS_ACCELERATOR="cpu")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("world_size 8 = dp 1 * ulysses 8 * ring 1") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--training.max_step", "3"],
            "training.max_step is not a setting; did you mean training.max_steps?",
        ),
        (
            ["--parallel.ulysses", "2"],
            "ulysses=2 does not divide 9 query heads; use 1, 3 or 9, or raise ring",
        ),
        (["--num_gpus", "3", "--plan"], "3 ranks are no multiple of ulysses 1 * ring 2 = 2"),
        (["--num_gpus", "0", "--plan"], "--num_gpus 0 is out of range; give 1 or more, or leave it out"),
        (["--deepspeed", "ds_configs/absent.json", "--plan"], "cannot read ds_configs/absent.json"),
        (["--deepspeed", "zero3.json", "--plan"], "use ds_configs/llama3_70b_zero2.json, ds_configs/"),
        (
            ["--data.store", "absent"],
            "python tools/prepare_hidden_states.py --recipe recipes/smollm2_cpu.json",
        ),
        (["--gpu", "tpu", "--plan"], "--gpu tpu is not a device that --plan knows; use h200"),
        (["--gpu", "48", "--plan"], "--gpu 48 is not a device that --plan knows; use h200, h100, a100"),
        (["--gpu", "0GiB", "--plan"], "--gpu 0GiB has no memory; give that of your GPU, such as 48GiB"),
        (["--training.schedule", "cosin"], 'training.schedule = "cosin": '),
    ],
)
def test_bad_input_is_one_sentence_and_an_exit_code(arguments: list[str], message: str) -> None:
    refused = run("bash", "recipes/smollm2_cpu.sh", *arguments)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ")
    assert refused.stderr.count("\n") == 1
    assert message in refused.stderr


def test_a_machine_without_the_venv_is_told_how_to_make_it(tmp_path: Path) -> None:
    (tmp_path / "python3").write_text(
        f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n'
    )  # -S: no installed packages
    (tmp_path / "python3").chmod(0o755)
    copy = tmp_path / "recipes/smollm2_cpu.sh"
    copy.parent.mkdir()
    copy.write_text((ROOT / "recipes/smollm2_cpu.sh").read_text())
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    refused = subprocess.run(
        ["bash", str(copy)], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert (refused.returncode, refused.stderr) == (
        2,
        "error: python3 has no deepspeed; run make venv first\n",
    )


def test_a_missing_store_stops_all_ranks_with_one_message() -> None:
    said = []
    for rank in ("0", "1"):
        command = (
            sys.executable,
            "-u",
            "recipes/smollm2_cpu.sh",
            f"--local_rank={rank}",
            "--data.store",
            "absent",
        )
        refused = run(*command, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_SIZE="2")
        said.append((refused.returncode, refused.stderr.partition(";")[0]))
    assert said == [(2, "error: the store absent does not exist"), (0, "")]


@pytest.fixture
def twin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Return overrides that give the twin a store, in an environment without ranks."""
    (tmp_path / "store").mkdir()
    write_store_info(
        tmp_path / "store", StoreInfo("t", "", "", hidden_size=24, aux_layer_ids=(1, 3, 4), vocab_size=37)
    )
    monkeypatch.chdir(ROOT)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("PATH", os.environ["PATH"])
    yield ["--data.store", str(tmp_path / "store"), "--output_dir", str(tmp_path / "run")]


def test_bash_starts_the_launcher_with_as_many_processes_as_fit(
    twin: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []

    def instead(path: str, command: list[str]) -> None:
        started.append(command)
        raise SystemExit

    monkeypatch.setattr(os, "execv", instead)
    monkeypatch.setattr(sys, "argv", ["twin", *twin, "--fresh"])
    with pytest.raises(SystemExit):
        launch.main("tests/recipes/llama3_128k_twin.sh", accelerator="cpu")
    (command,) = started
    assert command[1:5] == ["-m", "deepspeed.launcher.runner", "--num_gpus", "8"]
    assert command[-len(twin) - 1 :] == [str(ROOT / "tests/recipes/llama3_128k_twin.sh"), *twin]


def test_a_rank_trains_and_does_not_start_a_launcher(
    twin: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[str, int]] = []
    monkeypatch.setattr(
        launch, "train_rank", lambda recipe, local_rank: trained.append((recipe.name, local_rank))
    )
    reported: list[Path] = []
    monkeypatch.setattr("eagle_ds.reporting.report.write_report", reported.append)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "0"), ("LOCAL_SIZE", "8")):
        monkeypatch.setenv(name, value)
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(sys, "argv", ["twin", "--local_rank=0", *twin, "--fresh"])
    launch.main("tests/recipes/llama3_128k_twin.sh", accelerator="cpu")
    assert trained == [("llama3_128k_twin", 0)] and reported == [tmp_path / "run"]
    assert [path.name.split("-")[0] for path in tmp_path.glob("run*")] == ["run.before"], (
        "--fresh keeps the earlier run"
    )
    assert os.environ["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(("local_rank", "said"), [("0", (1, "error: the disk is full\n")), ("3", (0, ""))])
def test_what_stops_all_ranks_is_said_once(
    local_rank: str,
    said: tuple[int, str],
    twin: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> None:
        raise RankFailure("the disk is full")

    monkeypatch.setattr(launch, "train_rank", fail)
    for name, value in (
        ("RANK", local_rank),
        ("WORLD_SIZE", "8"),
        ("LOCAL_RANK", local_rank),
        ("LOCAL_SIZE", "8"),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["twin", f"--local_rank={local_rank}", *twin])
    with pytest.raises(SystemExit) as left:
        launch.main("tests/recipes/llama3_128k_twin.sh", accelerator="cpu")
    assert (left.value.code, capsys.readouterr().err) == said


def test_a_store_of_other_layers_is_refused_before_anything_starts(twin: list[str]) -> None:
    refused = run("bash", "tests/recipes/llama3_128k_twin.sh", *twin, "--target.aux_layer_ids", "[1, 2, 3]")
    assert refused.returncode == 2
    assert "was captured with aux_layer_ids [1, 3, 4], the recipe says [1, 2, 3]" in refused.stderr


def test_a_draft_to_start_from_is_looked_for_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no draft .* published EAGLE-3 draft"):
        check_start(tmp_path)
    (tmp_path / "run/checkpoints/step_3").mkdir(parents=True)
    (tmp_path / "run/checkpoints/step_3/arch.json").touch()
    (tmp_path / "published").mkdir()
    (tmp_path / "published/config.json").touch()
    for folder in ("run", "run/checkpoints/step_3", "published"):
        check_start(tmp_path / folder)


def test_tools_read_a_recipes_paths_from_the_repository_and_their_own_from_where_they_are_called(
    tmp_path: Path,
) -> None:
    (tmp_path / "here").mkdir()
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from argparse import Namespace; from pathlib import Path\n"
        "from eagle_ds.launch import enter_repository\n"
        "given = Namespace(out=Path('x'), target='here', baseline='org/name', limit=3, draft=None)\n"
        "enter_repository(given)\n"
        "print(Path.cwd(), given.out, given.target, given.baseline, given.limit, given.draft)"
    )
    shown = run(sys.executable, "-c", code, cwd=tmp_path)
    assert shown.stdout.split() == [
        str(ROOT),
        str(tmp_path / "x"),
        str(tmp_path / "here"),
        "org/name",
        "3",
        "None",
    ], shown.stderr


def run_as_rank(rank: int, world: int, arguments: list[str]) -> None:
    """Run the twin as the launcher does. The pool has set RANK and the other variables."""
    sys.argv = ["twin", f"--local_rank={rank}", *arguments]
    launch.main(str(ROOT / "tests/recipes/llama3_128k_twin.sh"), accelerator="cpu")


def test_the_scaled_down_twin_trains_on_eight_gloo_processes(tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path, dtype="bfloat16")
    arguments = [
        "--target.model",
        str(tiny.target),
        "--data.store",
        str(tmp_path / "train"),
        "--output_dir",
        str(tmp_path / "run"),
    ]
    with GlooPool(8) as pool:
        pool.run(run_as_rank, 8, [*arguments, "--training.max_steps", "2"])
        pool.run(run_as_rank, 8, [*arguments, "--training.max_steps", "3"])
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3], "the second run resumes the first"
    assert all(0 < line["loss"] < 100 for line in lines)
    assert json.loads((tmp_path / "run/recipe.json").read_text())["training"]["max_steps"] == 3
