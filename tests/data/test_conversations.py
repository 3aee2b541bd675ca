"""Each line of a conversation file becomes a sample, is skipped and counted, or is an error that names it."""

from __future__ import annotations

import json

import pytest

from eagle_ds.data.chat import ChatEncoder, EncodedSample
from eagle_ds.data.conversations import ConversationFile, require_samples
from tests.tiny_targets import byte_tokenizer

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
