"""The Triton kernels' arithmetic, checked where there is no GPU: Triton's interpreter runs them on CPU tensors."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLOAT16_BOUND, FLOAT32_BOUND = 1e-3, 2e-6  # relative L2 error against float64


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed (PyTorch for CPU comes without it)")
def test_triton_kernels_compute_what_the_plain_ones_do() -> None:
    command = [sys.executable, "-m", "tests.kernels.interpreted"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    errors = {f"{case}: {name}": error for case, found in json.loads(done.stdout.splitlines()[-1]).items() for name, error in found.items()}
    assert len(errors) > 100
    wrong = {name: error for name, error in errors.items() if not error < (FLOAT32_BOUND if name.startswith("loss") else FLOAT16_BOUND)}
    assert not wrong
