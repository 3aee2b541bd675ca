"""A tool that is started without its packages says how to install them, in one line, from any folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NO_SITE_PACKAGES = "-S"
TIMEOUT_S = 60  # for hangs only: a hundred times what an idle machine takes


@pytest.mark.parametrize(
    "command",
    [
        ["inspect_hdf5.py", "stores/any"],
        ["compare_runs.py", "runs/a", "runs/b"],
        ["convert_ckpt_to_hdf5.py", "source", "destination"],
        ["bench_io.py"],
        ["regenerate.py", "a.jsonl", "b.jsonl", "--target", "any"],
        ["preview_chats.py", "a.jsonl", "--target", "any"],
        ["prepare_hidden_states.py", "--recipe", "recipes/smollm2_cpu.json"],
        ["export_draft.py", "runs/any"],
        ["eval_acceptance.py", "--draft", "runs/any"],
        ["make_report.py", "runs/any"],
        ["plot_plan.py", "recipes/smollm2_cpu.json", "plan.png"],
        ["fetch_embedded_target.py"],
        ["bench_step.py"],
        ["bench_attention.py"],
        ["bench_layouts.py", "--out", "layouts"],
    ],
    ids=lambda command: command[0],
)
def test_a_tool_without_its_packages_says_how_to_install_them(command: list[str], tmp_path: Path) -> None:
    tool, *arguments = command
    start = [sys.executable, NO_SITE_PACKAGES, str(ROOT / "tools" / tool), *arguments]
    done = subprocess.run(start, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert "torch" in done.stderr and "make venv" in done.stderr
    assert not any(tmp_path.iterdir())


def test_a_tool_uses_the_virtual_environment_without_its_activation(tmp_path: Path) -> None:
    """In a checkout with .venv, the system's Python, which has no packages, starts the tool."""
    for folder in ("tools", "eagle_ds"):
        (tmp_path / folder).mkdir()
    shutil.copy(ROOT / "eagle_ds/__init__.py", tmp_path / "eagle_ds")
    tool = tmp_path / "tools/any.py"
    tool.write_text(
        "import sys; from pathlib import Path; sys.path.insert(0, str(Path(__file__).parents[1]))\n"
        "import eagle_ds, torch; print(sys.argv[1:])"
    )
    venv = tmp_path / ".venv/bin/python"
    venv.parent.mkdir(parents=True)
    venv.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    venv.chmod(0o755)
    start = [sys.executable, NO_SITE_PACKAGES, str(tool), "--name", "two words"]
    done = subprocess.run(start, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    assert done.stdout == "['--name', 'two words']\n", done.stderr


def test_an_import_without_packages_raises_import_error() -> None:
    program = "import eagle_ds"
    command = [sys.executable, NO_SITE_PACKAGES, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    assert done.returncode == 1 and "ImportError" in done.stderr.splitlines()[-1]
