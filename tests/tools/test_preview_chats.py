"""The preview tool: a file and a target, or a recipe, in; text and a page out; one sentence for an error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_targets import save_tiny_llama

ROOT = Path(__file__).resolve().parents[2]
CHATS = [{"id": f"c{n}", "messages": [
    {"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"answer {n}"}]} for n in range(4)]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("target"))


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(chat) + "\n" for chat in CHATS))
    return path


def call(*arguments: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/preview_chats.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=600)


def test_a_file_and_a_target_give_text_without_colour_in_a_pipe_and_a_page(
    tmp_path: Path, chats: Path, target: Path
) -> None:
    given = ("--target", target, "--show", "2", "--html", "page.html", "--vocab-size", "64")
    done = call("chats.jsonl", *given, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout and "⟦answer 1" in done.stdout and "⟦answer 2" not in done.stdout
    assert "samples to train on" in done.stdout and "draft vocabulary of 64 (chosen)" in done.stdout
    assert "<mark>answer 0" in (tmp_path / "page.html").read_text()


def test_a_recipe_gives_what_the_command_line_does_not(tmp_path: Path, chats: Path, target: Path) -> None:
    settings = json.loads((ROOT / "recipes/smollm2_cpu.json").read_text())
    settings["target"]["model"] = str(target)
    settings["data"] |= {"conversations": str(chats), "max_length": 20}
    recipe = tmp_path / "mine.json"
    recipe.write_text(json.dumps(settings))
    done = call("--recipe", recipe, "--vocab-size", "8", "--max-length", "48")
    assert done.returncode == 0, done.stderr
    assert "4 samples to 48 tokens" in done.stdout and "draft vocabulary of 8 (chosen)" in done.stdout


def test_template_variables_reach_the_template(chats: Path, tmp_path: Path) -> None:
    target = save_tiny_llama(tmp_path / "target")
    config = json.loads((target / "tokenizer_config.json").read_text())
    place = target / "chat_template.jinja"
    template = place.read_text() if place.is_file() else config["chat_template"]
    config["chat_template"] = "{{ greeting | default('') }}" + template
    place.unlink(missing_ok=True)
    (target / "tokenizer_config.json").write_text(json.dumps(config))
    given = ("--template-kwargs", json.dumps({"greeting": "good morning"}))
    assert "good morning" in call(chats, "--target", target, "--vocab-size", "8", *given).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give FILE, or --recipe with a recipe that names it"),
        (["CHATS"], "give --target, or --recipe with a recipe that names it"),
        (["CHATS", "--target", "TARGET", "--template-kwargs", "[1]"], "--template-kwargs is no JSON object"),
        (["CHATS", "--target", "TARGET", "--html", "CHATS/x.html"], "is a file, where a folder was expected"),
        (["absent.jsonl", "--target", "TARGET"], "absent.jsonl"),
    ],
)
def test_a_wrong_command_is_one_sentence(
    arguments: list[str], message: str, chats: Path, target: Path
) -> None:
    done = call(*(word.replace("CHATS", str(chats)).replace("TARGET", str(target)) for word in arguments))
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr


def test_a_file_without_anything_to_train_on_is_an_error_with_the_reasons(
    tmp_path: Path, target: Path
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("{broken\n")
    done = call(path, "--target", target, "--vocab-size", "8")
    assert done.returncode == 1 and "nothing to train on" in done.stderr
    assert "line 1: rejected, not JSON: " in done.stdout


def test_text_that_the_terminal_cannot_show_is_escaped(chats: Path, target: Path) -> None:
    chats.write_text(json.dumps({"messages": [
        {"role": "user", "content": "é 字"}, {"role": "assistant", "content": "ok"}]}) + "\n")
    command = [sys.executable, str(ROOT / "tools/preview_chats.py"), str(chats), "--target", str(target)]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=600, cwd=ROOT)
    assert done.returncode == 0 and "\\xe9 \\u5b57" in done.stdout, done.stderr
