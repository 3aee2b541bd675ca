"""The two smaller capture tools end with one sentence and a non-zero exit code if they cannot work."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest

from tests.tiny_targets import save_tiny_llama
from tools import fetch_embedded_target, regenerate


def run(tool, monkeypatch, *arguments) -> int:
    monkeypatch.setattr("sys.argv", [tool.__file__, *map(str, arguments)])
    return tool.main()


def test_too_little_space_is_reported_before_the_download(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000_000))
    assert run(fetch_embedded_target, monkeypatch, "--out", tmp_path / "smol") == 1
    assert "10 MB free, fetching needs 500" in capsys.readouterr().err
    assert not (tmp_path / "smol").exists()


def test_regenerating_answers_a_prompt_file(tmp_path, monkeypatch, capsys):
    target = save_tiny_llama(tmp_path / "target")
    prompts = [{"id": str(n), "messages": [{"role": "user", "content": "q" * (n + 1)}]} for n in range(3)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    files = [tmp_path / "in.jsonl", tmp_path / "out.jsonl"]
    arguments = [*files, "--target", target, "--device", "cpu", "--max-new-tokens", 5]
    assert run(regenerate, monkeypatch, *arguments) == 0
    assert "3 were there already" not in capsys.readouterr().out
    assert run(regenerate, monkeypatch, *arguments) == 0
    assert "0 conversations written, 3 were there already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "target", "complaint"), [
        ("none.jsonl", "x/y", "does not exist"), ("in.jsonl", "models/none", "is not a folder")
    ]
)
def test_regenerating_from_nothing_is_one_sentence(tmp_path, monkeypatch, capsys, source, target, complaint):
    (tmp_path / "in.jsonl").write_text('{"text": "x"}\n')
    assert run(regenerate, monkeypatch, tmp_path / source, tmp_path / "out.jsonl", "--target", target) == 1
    assert complaint in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out.jsonl").exists()
