"""Records of every file format come back alike; a damaged file or a missing package is one sentence."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from eagle_ds.data.conversations import ConversationFile
from eagle_ds.data.sources import array_elements

RECORDS = [
    {"id": str(n), "messages": [
        {"role": "user", "content": f'[{{"}},\\" {n}\n'}, {"role": "assistant", "content": "é"}]}
    for n in range(5)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
FORMATS = {
    "lines.jsonl": LINES,
    "bom.jsonl": b"\xef\xbb\xbf" + LINES,
    "lines.jsonl.gz": gzip.compress(LINES[:100]) + gzip.compress(LINES[100:]),
    "array.json": json.dumps(RECORDS).encode(),
    "indented.json": json.dumps(RECORDS, indent=2, ensure_ascii=False).encode(),
    "array.json.gz": gzip.compress(json.dumps(RECORDS, indent=1).encode()),
}


def write(tmp_path: Path, name: str, content: bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_records_in_any_order(tmp_path: Path, name: str) -> None:
    file = ConversationFile(write(tmp_path, name, FORMATS[name]))
    found = list(file.records())
    assert [record for _, record in found] == RECORDS
    assert [file.read(offset) for offset, _ in reversed(found)] == RECORDS[::-1]
    assert list(file.line_numbers.values()) == [1, 2, 3, 4, 5] and file.count() == 5
    assert file.unit == ("record" if "json" in name.split(".")[1:2] else "line")


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1 << 20])
def test_an_array_is_split_alike_whatever_the_size_of_a_block(size: int) -> None:
    content = json.dumps([*RECORDS, [1, [2]], "a,]", 7], indent=1).encode()
    blocks = (content[start : start + size] for start in range(0, len(content), size))
    assert [json.loads(line) for line in array_elements(blocks)] == json.loads(content)


def test_a_line_break_inside_a_string_stays_an_error() -> None:
    with pytest.raises(ValueError, match="control character"):
        [json.loads(line) for line in array_elements([b'[{"a": "x\ny"}]'])]


@pytest.mark.parametrize("name", ["lines.jsonl.gz", "array.json.gz"])
def test_a_truncated_file_is_one_sentence(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name, FORMATS[name][:-12])
    with pytest.raises(ValueError, match="is truncated or damaged"):
        ConversationFile(path)


def test_zstd_is_read_and_a_truncated_file_is_one_sentence(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    whole = zstandard.compress(LINES[:100]) + zstandard.compress(LINES[100:])
    file = ConversationFile(write(tmp_path, "lines.jsonl.zst", whole))
    assert [record for _, record in file.records()] == RECORDS
    with pytest.raises(ValueError, match="is truncated or damaged"):
        ConversationFile(write(tmp_path, "cut.jsonl.zst", whole[:-9]))


def test_parquet_gives_its_rows_without_the_nulls_that_fill_them(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "add"}}]}
    calls = [call, {"role": "tool", "content": "4"}]
    rows = [*RECORDS, {"id": "calls", "messages": calls}]
    table = arrow.Table.from_pylist([{**row, "image": b"x"} for row in rows])
    parquet.write_table(table, tmp_path / "rows.parquet")
    file = ConversationFile(tmp_path / "rows.parquet")
    assert [record for _, record in file.records()] == rows and file.unit == "record"


@pytest.mark.parametrize(
    ("content", "package"), [(b"\x28\xb5\x2f\xfd..", "zstandard"), (b"PAR1....", "pyarrow")])
def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.parquet", None)
    with pytest.raises(ValueError, match=f"needs the package {package}; pip install {package}"):
        ConversationFile(write(tmp_path, "chats", content))


class Rows(list):
    """Stands for a data set of the Hugging Face library."""

    column_names = ("id", "messages", "image")

    def select_columns(self, names: list[str]) -> Rows:
        return Rows({name: row[name] for name in names} for row in self)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Put a library ``datasets`` in place that knows one data set; yield what it was asked for."""
    asked: list[Any] = []

    def load_dataset(name: str, split: str) -> Rows:
        asked.append((name, split))
        if name != "owner/chats":
            raise FileNotFoundError(f"no {name}\nmore")
        return Rows({**record, "image": b"x"} for record in RECORDS)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return asked


def test_a_data_set_of_the_hub_is_read_by_its_id(hub: list[Any]) -> None:
    for name in ("owner/chats", "owner/chats:test[:10]"):
        assert [record for _, record in ConversationFile(Path(name)).records()] == RECORDS
    assert hub == [("owner/chats", "train"), ("owner/chats", "test[:10]")]


def test_a_data_set_that_cannot_be_loaded_is_one_sentence(hub: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"owner/none is neither a file nor a data set.*\(no owner/none\)"):
        ConversationFile(Path("owner/none"))


@pytest.mark.parametrize("name", ["none.jsonl", "owner/none.parquet", "/absolute/none", "a/b/c"])
def test_a_missing_file_is_not_looked_up_on_the_hub(
    hub: list[Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", ModuleType("datasets"))
    with pytest.raises(ValueError, match="does not exist; give a file"):
        ConversationFile(Path(name))
    assert hub == []
