"""House rules: folders depend one way, files and functions stay small, tests mirror the package."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "eagle_ds"
MODULES = sorted(PACKAGE.rglob("*.py"))
TOOLS = sorted((ROOT / "tools").glob("*.py"))

# The folders of eagle_ds in dependency order: a module imports from its own folder and earlier ones only.
# launch.py comes last. bench is for benchmarks, the demo's target and tests: no other folder may import it.
FOLDERS = (
    *("config", "sharding", "parallel", "kernels", "target", "store", "data", "convert", "estimate"),
    *("capture", "model", "drafts", "training", "evaluation", "reporting", "bench"),
)
ORDER = (*FOLDERS, "launch")
TOP_LEVEL = {
    *("recipes", "eagle_ds", "ds_configs", "tools", "tests", "docs"),
    *("requirements.txt", "requirements.lock", "requirements-sglang.txt", "pyproject.toml", "Makefile"),
    *("README.md", "LICENSE", "CITATION.cff", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md"),
}
MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 60


def layer_of(module: str) -> int:
    """Index in ORDER of a dotted module below eagle_ds; -1 for the package itself."""
    if not module:
        return -1
    folder = module.split(".")[0]
    assert folder in ORDER, f"add eagle_ds/{folder} to FOLDERS of tests/test_house.py, in dependency order"
    return ORDER.index(folder)


def imports_of(path: Path) -> Iterator[str]:
    """Modules below eagle_ds that a file imports anywhere, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            from_package = node.module == "eagle_ds"
            names = [f"{node.module}.{alias.name}" for alias in node.names] if from_package else [node.module]
        own = [name for name in names if name.split(".")[0] == "eagle_ds"]
        yield from (name.removeprefix("eagle_ds").lstrip(".") for name in own)


def identify(path: Path) -> str:
    """A test id: the path from the repository's root."""
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", MODULES, ids=identify)
def test_dependencies_run_one_way(path: Path) -> None:
    own = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")
    for module in imports_of(path):
        assert layer_of(module) <= layer_of(own), f"eagle_ds.{own} imports eagle_ds.{module}, a later folder"
        assert not (own == "launch" and module.startswith("bench")), "launch.py imports bench/"


def test_nothing_lies_loose_beside_the_folders() -> None:
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "launch.py"}
    assert {path.parent.name for path in PACKAGE.glob("*/*.py")} == set(FOLDERS)
    assert not list(PACKAGE.glob("*/*/*.py")), "one level of folders is enough"


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_folder_has_tests_of_its_name(folder: str) -> None:
    assert list((ROOT / "tests" / folder).glob("test_*.py")), f"tests/{folder}/ has no test"


@pytest.mark.parametrize("path", MODULES + TOOLS, ids=identify)
def test_files_and_functions_stay_small(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert source.count("\n") <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", MODULES, ids=identify)
def test_the_library_logs_and_never_prints(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        is_print = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        assert not is_print, f"line {node.lineno}"


@pytest.mark.parametrize("path", TOOLS, ids=identify)
def test_a_tool_runs_from_anywhere(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert source.startswith("#!/usr/bin/env python3\n"), "machines without an environment have no `python`"
    assert os.access(path, os.X_OK)
    assert "sys.path.insert" in source, "a tool must find eagle_ds in its own checkout, installed or not"


def test_the_top_level_holds_what_every_repository_has() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    found = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert {name for name in found if not name.startswith(".")} <= TOP_LEVEL


def test_ruff_is_clean() -> None:
    command = [sys.executable, "-m", "ruff", "check", "--quiet", "."]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
