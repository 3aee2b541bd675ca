"""tools/plot_plan.py draws the sharding of any layout, and reports wrong input in one sentence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def plot(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/plot_plan.py", "recipes/llama3_128k.json", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)


def test_a_sharding_is_drawn(tmp_path: Path) -> None:
    png = tmp_path / "plan.png"
    drawn = plot(str(png), "--fraction", "0.1", "--parallel.ulysses", "2", "--parallel.ring", "2")
    assert drawn.returncode == 0, drawn.stderr
    assert png.read_bytes().startswith(b"\x89PNG")


def test_a_typo_is_an_error_and_no_picture(tmp_path: Path) -> None:
    refused = plot(str(tmp_path / "plan.png"), "--parallel.rings", "2")
    assert refused.returncode == 1
    assert refused.stderr == "error: parallel.rings is not a setting; did you mean parallel.ring?\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("option", "value"), [("--fraction", "0"), ("--fraction", "2"), ("--turn", "0")])
def test_an_impossible_fraction_or_turn_is_an_error_and_no_picture(
    option: str, value: str, tmp_path: Path
) -> None:
    refused = plot(str(tmp_path / "plan.png"), "--fraction", "0.1", option, value)
    assert refused.returncode == 1
    assert (
        refused.stderr.startswith("error: ")
        and refused.stderr.count("\n") == 1
        and f" of {value} " in refused.stderr
    )
    assert not list(tmp_path.iterdir())


def test_an_unwritable_picture_is_refused_first(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused = plot(str(tmp_path / "file" / "plan.png"), "--fraction", "0.1")
    assert (
        refused.returncode == 1
        and f"{tmp_path / 'file'} is a file, where a folder was expected" in refused.stderr
    )
    made = plot(str(tmp_path / "new" / "plan.svg"), "--fraction", "0.1")
    assert made.returncode == 0 and (tmp_path / "new" / "plan.svg").is_file()
