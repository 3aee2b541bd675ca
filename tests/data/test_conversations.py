"""Each line of a conversation file becomes a sample, is skipped and counted, or is an error that names it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from eagle_ds.data.chat import ChatEncoder, EncodedSample
from eagle_ds.data.conversations import ConversationFile, Intake, require_samples
from tests.tiny_targets import byte_tokenizer

ROOT = Path(__file__).resolve().parents[2]
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}


def write(tmp_path, *lines):
    path = tmp_path / "chats.jsonl"
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n",
        encoding="utf-8",
    )
    return path


def encoder() -> ChatEncoder:
    return ChatEncoder(byte_tokenizer("chatml"), 4096)


def encode_all(path, encoder: ChatEncoder) -> list[EncodedSample]:
    """Encode every line, and require at least one sample."""
    samples = [encoded for _, encoded in ConversationFile(path).encode(encoder)]
    require_samples(path, encoder.stats)
    return samples


def test_samples_are_in_file_order(tmp_path):
    path = write(tmp_path, {"id": "b", **CHAT}, "", {"id": "a", **CHAT}, {"text": "plain"})
    assert [sample.id for sample in encode_all(path, encoder())][:2] == ["b", "a"]


def test_a_record_can_be_read_by_its_offset(tmp_path):
    file = ConversationFile(write(tmp_path, {"id": "ä", **CHAT}, "  ", {"id": "b", **CHAT}))
    for offset, record in file.records():
        assert file.read(offset) == record


def test_repeated_lines_are_counted_and_skipped(tmp_path):
    chat_encoder = encoder()
    assert len(encode_all(write(tmp_path, CHAT, CHAT), chat_encoder)) == 1
    assert chat_encoder.stats.duplicates == 1


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ([CHAT, "{broken"], "line 2: not valid JSON"),
        ([CHAT, "[1]"], "line 2: expected a JSON object, found list"),
        ([CHAT, "", {"messages": []}], "line 3: expected"),
        ([{"id": "x", **CHAT}, {"id": "x", "text": "other"}], "line 2: id x was used above"),
        ([{"messages": CHAT["messages"][:1]}], "nothing to train on"),
    ],
)
def test_errors_name_the_line(tmp_path, lines, complaint):
    with pytest.raises(ValueError, match=complaint):
        encode_all(write(tmp_path, *lines), encoder())


def test_a_missing_file_is_a_one_line_error(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        ConversationFile(tmp_path / "none.jsonl")


MEASURE = """
import sys
import numpy as np
from eagle_ds.data.chat import ChatEncoder
from eagle_ds.data.conversations import ConversationFile
from tests.tiny_targets import byte_tokenizer

def peak() -> int:
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

def split_only(text, spans):
    longest.append(max(map(len, encoder._parts(text, 0, len(text)))))
    return np.zeros(1, np.int32), np.ones(1, np.uint8)

longest = []
encoder = ChatEncoder(byte_tokenizer("chatml"), 1 << 30)
encoder.encode({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
encoder._tokenize_spans = split_only
before = peak()
assert len(list(ConversationFile(sys.argv[1]).encode(encoder))) == 1
print(peak() - before, *longest)
"""


@pytest.mark.parametrize(
    ("name", "text", "end"),
    [
        ("chats.jsonl", "the fox ran over 13 hills, and it slept. ", ""),
        ("chats.json", "狐狸跑过了山，然后睡了。", ""),
        ("chats.jsonl", "the fox ran over 13 hills,\nand it slept. ", "\U0001f600"),  # 4 bytes a character
    ],
)
def test_a_long_line_takes_at_most_ten_times_its_size_in_memory(tmp_path, name, text, end):
    """Measured without tokens; texts are tokenized in parts, and no part is long."""
    content = text * (30_000_000 // len(text.encode())) + end
    chat = [{"role": "user", "content": content}, CHAT["messages"][1]]
    record = json.dumps({"messages": chat}, ensure_ascii=False)
    (tmp_path / name).write_text(f"[{record}]" if name == "chats.json" else record, encoding="utf-8")
    command = [sys.executable, "-c", MEASURE, str(tmp_path / name)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    grown, longest = map(int, ran.stdout.split())
    assert grown <= 10 * (tmp_path / name).stat().st_size
    assert longest < 70_000


BAD = [
    CHAT, "{broken", "[1]", {"messages": []}, {"id": "x", **CHAT}, {"id": "x", "text": "other"},
    {"id": "x", **CHAT}, '{"text": "\\ud800"}', {"id": "last", "text": "good"},
]


def take_in(path, intake: Intake) -> list[EncodedSample]:
    return [encoded for _, encoded in ConversationFile(path).encode(encoder(), intake)]


def test_bad_records_do_not_stop_the_rest_and_are_listed_with_line_and_reason(tmp_path):
    intake = Intake(strict=False)
    assert [sample.id for sample in take_in(write(tmp_path, *BAD), intake)][1:] == ["x", "last"]
    found = [(one.line, one.id, one.reason) for one in intake.rejected]
    assert [line for line, _, _ in found] == [2, 3, 4, 6, 8]
    assert found[3] == (6, "x", "id used above") and intake.repeated == 1
    assert "5 rejected (" in str(intake) and "not JSON: 2" in str(intake)
    intake.write(tmp_path / "rejected.jsonl")
    listed = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert [one["line"] for one in listed] == [2, 3, 4, 6, 8]
    assert set(listed[0]) == {"line", "id", "reason", "detail"}
    assert listed[2]["detail"].startswith("expected a list")
    Intake().write(tmp_path / "rejected.jsonl")
    assert not (tmp_path / "rejected.jsonl").exists()


def test_another_conversation_with_a_used_id_gets_a_suffix_if_set(tmp_path):
    lines = [{"id": "x", "text": text} for text in ("a", "b", "a", "c", "b")] + [{"id": "x-2", "text": "d"}]
    intake, file = Intake(strict=False, duplicates="suffix"), ConversationFile(write(tmp_path, *lines))
    found = [(name, record["text"]) for _, name, record in file.unique_records(intake)]
    assert found == [("x", "a"), ("x-2", "b"), ("x-3", "c"), ("x-2-2", "d")]
    assert (intake.repeated, intake.renamed, intake.rejected) == (2, 3, [])
    again = take_in(file.path, Intake(duplicates="suffix"))
    assert [sample.id for sample in again] == ["x", "x-2", "x-3", "x-2-2"]


def test_a_file_of_rejected_records_says_why(tmp_path):
    path, intake, chat_encoder = write(tmp_path, {"messages": []}), Intake(strict=False), encoder()
    list(ConversationFile(path).encode(chat_encoder, intake))
    reason = r"1 rejected \(no messages: 1\); the first rejected one is 1: expected"
    with pytest.raises(ValueError, match=reason):
        require_samples(path, chat_encoder.stats, intake)


def test_a_tokenizer_without_a_template_stops_everything(tmp_path):
    bare = encoder()
    bare.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        list(ConversationFile(write(tmp_path, CHAT, CHAT)).encode(bare, Intake(strict=False)))
