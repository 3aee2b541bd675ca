"""A tool started by a Python without the packages says so in one sentence, wherever it was started from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NO_SITE_PACKAGES = "-S"


@pytest.mark.parametrize(
    "command",
    [
        ["inspect_hdf5.py", "stores/any"],
        ["compare_runs.py", "runs/a", "runs/b"],
        ["convert_ckpt_to_hdf5.py", "source", "destination"],
        ["bench_io.py"],
        ["regenerate.py", "a.jsonl", "b.jsonl", "--target", "any"],
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
def test_a_tool_without_its_packages_says_how_to_get_them(command: list[str], tmp_path: Path) -> None:
    tool, *arguments = command
    start = [sys.executable, NO_SITE_PACKAGES, str(ROOT / "tools" / tool), *arguments]
    done = subprocess.run(start, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert "torch" in done.stderr and "make venv" in done.stderr
    assert not any(tmp_path.iterdir())


def test_an_importing_program_gets_an_import_error() -> None:
    program = "import eagle_ds"
    done = subprocess.run([sys.executable, NO_SITE_PACKAGES, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "ImportError" in done.stderr.splitlines()[-1]
