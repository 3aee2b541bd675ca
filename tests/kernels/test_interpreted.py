"""Each Triton kernel, run on a CPU by Triton's interpreter, agrees with its plain version.

All checks run once, in one process (interpreter_checks.py). Each quantity of each check is a test case here.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed (PyTorch for CPU comes without it)",
)

ROOT = Path(__file__).resolve().parents[2]
FLOAT16_BOUND, FLOAT32_BOUND = 1e-3, 2e-6  # relative L2 error against float64

ATTENTION = ("prefix", "prefix lse", "out", "lse", "dq", "dkv", "dk1", "dv1", "dk2", "dv2")
PARTITIONED = ("causal", "scattered", "packed", "window", "window with turns", "ring block")
ROWS = (*PARTITIONED, "keys that no row sees", "one row")
ROW_LOSSES = ("cross-entropy", "alpha", "best")
LOSS = ("lse", "entropy", *(f"{name}, no gradient" for name in ROW_LOSSES), *ROW_LOSSES, "gradient")
CHECKS = {
    **{f"attention, {rows}": ATTENTION for rows in (*ROWS, "heads first in memory")},
    **{f"attention in groups, {rows}": ATTENTION for rows in PARTITIONED},
    **{f"keys split, {rows}": ("out", "lse", "dq", "dkv") for rows in ("scattered", "packed")},
    "smaller tiles": ("order",),
    "sums": ("out", "lse", "total"),
    "norms": ("rows, y", "rows, dw", "dx", "table, y", "table, dw"),
    "rows": ("taken", "total"),
    "rotation": ("there", "back"),
    **{f"loss, {kind}": LOSS for kind in ("kl", "alpha", "lambda")},
}
CASES = [(check, quantity) for check, quantities in CHECKS.items() for quantity in quantities]
IDS = [f"{check}: {quantity}" for check, quantity in CASES]


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, float] | str]:
    """Run all checks: relative errors by check and quantity, or the traceback of a check that failed."""
    command = [sys.executable, "-m", "tests.kernels.interpreter_checks"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_check_that_ran_is_a_case(measured: dict[str, dict[str, float] | str]) -> None:
    assert set(measured) == set(CHECKS) and len(CASES) > 100
    for check, errors in measured.items():
        assert not isinstance(errors, str) and set(errors) == set(CHECKS[check]), (check, errors)


@pytest.mark.parametrize(("check", "quantity"), CASES, ids=IDS)
def test_triton_kernel_agrees_with_plain(
    measured: dict[str, dict[str, float] | str], check: str, quantity: str
) -> None:
    errors = measured[check]
    assert not isinstance(errors, str), errors
    assert errors[quantity] < (FLOAT32_BOUND if check.startswith("loss") else FLOAT16_BOUND)
