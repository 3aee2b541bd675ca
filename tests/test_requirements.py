"""The lock lies inside the ranges, the environment equals the lock, and SGLang's own pins agree with it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent


def lines_of(name: str) -> list[str]:
    """The lines of a requirements file without comments and blanks."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def canonical(name: str) -> str:
    """A package name as registries compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(name: str) -> dict[str, str]:
    """Package name -> exact version, of the lines that pin one."""
    return {canonical(line.split("==")[0]): line.split("==")[1] for line in lines_of(name) if "==" in line}


def ranges() -> list[Requirement]:
    """What users install: requirements.txt, and the packages of `pip install -e .[test]`."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    return [Requirement(line) for line in (*lines_of("requirements.txt"), *extras["test"])]


def test_the_lock_pins_every_package_exactly() -> None:
    for line in lines_of("requirements.lock"):
        assert re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][\w.]*", line), line


@pytest.mark.parametrize("requirement", ranges(), ids=lambda requirement: requirement.name)
def test_the_lock_lies_inside_the_tested_ranges(requirement: Requirement) -> None:
    bounds = {specifier.operator for specifier in requirement.specifier}
    assert bounds == {">=", "<"}, f"{requirement} needs a lower and an upper bound"
    assert pins("requirements.lock")[canonical(requirement.name)] in requirement.specifier


@pytest.mark.parametrize(("name", "version"), sorted(pins("requirements.lock").items()))
def test_what_is_installed_is_what_is_pinned(name: str, version: str) -> None:
    assert metadata.version(name).split("+")[0] == version, "run `make venv`"


def test_sglang_wants_exactly_our_torch_and_transformers(tmp_path: Path) -> None:
    ours = pins("requirements.lock")
    sglang = pins("requirements-sglang.txt")["sglang"]
    download = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    limits = ["--retries", "1", "--timeout", "20"]
    command = [*download, *limits, "--dest", str(tmp_path), f"sglang=={sglang}"]
    try:
        fetched = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip(f"the wheel of sglang {sglang} did not arrive in 120 s")
    wheels = list(tmp_path.glob("*.whl"))
    if fetched.returncode or not wheels:
        reason = fetched.stderr.strip().splitlines()[-1:]
        pytest.skip(f"no package index has the wheel of sglang {sglang} for this Python: {reason}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        wanted = metadata.PathDistribution(zipfile.Path(wheel, name.removesuffix("METADATA"))).requires or []
    for package in ("torch", "transformers"):
        assert f"{package}=={ours[package]}" in [requirement.replace(" ", "") for requirement in wanted]
