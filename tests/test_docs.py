"""The pages say what exists: links, paths, names, settings, messages; the format's example reads a store."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
import torch

from eagle_ds.config.recipe import Recipe
from eagle_ds.config.settings import dotted_fields
from eagle_ds.store.store import Sample, StoreInfo, StoreWriter

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = [*sorted((ROOT / "eagle_ds").rglob("*.py")), *sorted((ROOT / "tools").glob("*.py"))]
OTHER_SOURCES = [ROOT / "Makefile", *sorted((ROOT / "recipes").glob("*.sh"))]

MAX_COLUMNS, MAX_README_LINES = 120, 120
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`]+)`")
FOLDERS = ("eagle_ds", "tools", "tests", "recipes", "ds_configs", "docs")
PATH = re.compile(rf"\b(?:{'|'.join(FOLDERS)})/[\w./-]*\w")
# Names in the pages that stand for the reader's own files, or for files that come into being later.
PLACEHOLDERS = re.compile(r"NAME|mymodel|eagle_ds/kernels/NAME|recipes/data/\w+\.prompts")
SETTING = re.compile(r"\b(?:target|draft|data|parallel|training)\.[a-z_]+\b")

# Messages in troubleshooting.md that other programs print.
FOREIGN = {
    "Setting accelerator to CPU",
    "Connection reset by peer",
    "exits with return code = -9",
    "exits with return code = -6",
    "Target model's context_length (...) is greater than the derived context_length (...)",
}


def identify(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    """The page without fenced code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@cache
def defined_names(path: Path) -> frozenset[str]:
    """Functions and classes that a module defines, methods as Class.method and by their own name."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
    return frozenset(names)


@pytest.mark.parametrize("page", PAGES, ids=identify)
def test_links_resolve(page: Path) -> None:
    for _, target in LINK.findall(prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{target} does not exist"
        if anchor:
            assert anchor in anchors(linked), f"{target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=identify)
def test_a_name_linked_to_a_module_is_defined_there(page: Path) -> None:
    for text, target in LINK.findall(prose(page)):
        name = re.fullmatch(r"`([A-Za-z_][\w.]*)`", text)
        if name and target.endswith(".py") and "/" not in name[1] and not name[1].endswith(".py"):
            module = (page.parent / target).resolve()
            assert name[1] in defined_names(module), f"{target} does not define {name[1]}"


@pytest.mark.parametrize("page", PAGES, ids=identify)
def test_paths_and_settings_named_in_code_exist(page: Path) -> None:
    settings = {name for name, _ in dotted_fields(Recipe)}
    for span in CODE.findall(prose(page)):
        for path in PATH.findall(span):
            assert PLACEHOLDERS.search(path) or (ROOT / path).exists(), f"{path} does not exist"
        for name in SETTING.findall(span):
            is_setting = name in settings or any(known.startswith(f"{name}.") for known in settings)
            is_file = name.rsplit(".", 1)[-1] in {"py", "md", "json", "jsonl"}
            assert is_setting or is_file, f"{name} is not a setting"


@pytest.mark.parametrize("page", PAGES, ids=identify)
def test_lines_are_short_enough_to_read(page: Path) -> None:
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        exempt = line.startswith("|") or LINK.search(line)
        assert exempt or len(line) <= MAX_COLUMNS, f"line {number} has {len(line)} columns"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= MAX_README_LINES


def test_every_page_is_in_the_index() -> None:
    index = ROOT / "docs" / "README.md"
    targets = [target.partition("#")[0] for _, target in LINK.findall(index.read_text(encoding="utf-8"))]
    linked = {(index.parent / target).resolve() for target in targets}
    for page in (ROOT / "docs").glob("*.md"):
        assert page == index or page in linked, f"docs/README.md does not link {page.name}"


@cache
def texts_in_the_code() -> str:
    """Every string of the package and the tools, f-strings with ... for their values, and the shell files."""
    found = [path.read_text(encoding="utf-8") for path in OTHER_SOURCES]
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "..." for part in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def messages() -> list[str]:
    """Messages in the first column of the tables of troubleshooting.md: code spans with a blank."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    cells = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| ")]
    spans = [span for cell in cells for span in CODE.findall(cell)]
    return [span for span in spans if " " in span and span not in FOREIGN and not span.startswith("rank 3")]


@pytest.mark.parametrize("message", messages())
def test_messages_in_troubleshooting_are_in_the_code(message: str) -> None:
    for part in message.split("..."):
        part = part.strip(" ,;:")
        assert part in texts_in_the_code(), f"no message contains {part!r}"


def test_the_reader_in_the_format_page_reads_a_store(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "file_format.md").read_text(encoding="utf-8")
    program = re.search(r"^```python\n(.*?)^```", page, flags=re.S | re.M)
    assert program is not None
    size, hidden = 130, 16
    sample = Sample(
        "chat-ä",
        torch.arange(size, dtype=torch.int32),
        torch.ones(size, dtype=torch.uint8),
        torch.randn(size, 3 * hidden).bfloat16(),
        torch.randn(size, hidden).bfloat16(),
    )
    with StoreWriter(tmp_path, StoreInfo("target", "hash", "tokens", hidden, (1, 2, 3), 1000)) as writer:
        writer.add(sample)
    names: dict[str, object] = {}
    exec(program[1], names)
    ((name, ids, mask, aux, last),) = names["read_store"](tmp_path)  # type: ignore[operator]
    assert name == sample.id
    assert torch.equal(torch.from_numpy(ids), sample.input_ids)
    assert torch.equal(torch.from_numpy(mask), sample.loss_mask)
    assert torch.equal(torch.from_numpy(aux), sample.aux_hidden_state.float())
    assert torch.equal(torch.from_numpy(last), sample.hidden_state.float())
