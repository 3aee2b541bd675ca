"""The pins: what is installed is what requirements.txt says, and SGLang's own pins agree with it."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def pins(path: Path) -> dict[str, str]:
    """Package name -> exact version, of the lines that pin one."""
    found = re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;]+)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {name.lower(): version for name, version in found}


def test_every_requirement_is_an_exact_pin() -> None:
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        assert not line or line.startswith("#") or re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][\w.]*", line), line


@pytest.mark.parametrize(("name", "version"), sorted(pins(ROOT / "requirements.txt").items()))
def test_what_is_installed_is_what_is_pinned(name: str, version: str) -> None:
    assert metadata.version(name).split("+")[0] == version, "run `make venv`"


def test_sglang_wants_exactly_our_torch_and_transformers(tmp_path: Path) -> None:
    ours, sglang = pins(ROOT / "requirements.txt"), pins(ROOT / "requirements-sglang.txt")["sglang"]
    download = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet", "--retries", "1", "--timeout", "20"]
    command = [*download, "--dest", str(tmp_path), f"sglang=={sglang}"]
    try:
        fetched = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip(f"the wheel of sglang {sglang} did not arrive in 120 s")
    wheels = list(tmp_path.glob("*.whl"))
    if fetched.returncode or not wheels:
        pytest.skip(f"no package index has the wheel of sglang {sglang} for this Python: {fetched.stderr.strip().splitlines()[-1:]}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        wanted = metadata.PathDistribution(zipfile.Path(wheel, name.removesuffix("METADATA"))).requires or []
    for package in ("torch", "transformers"):
        assert f"{package}=={ours[package]}" in [requirement.replace(" ", "") for requirement in wanted]
