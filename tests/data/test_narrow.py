"""Long conversations with characters beyond U+FFFF are rendered narrow, and nothing else changes."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from eagle_ds.data import narrow
from eagle_ds.data.chat import ChatEncoder
from eagle_ds.data.narrow import Narrowing
from eagle_ds.data.shapes import conversation_of
from tests.tiny_targets import byte_tokenizer

EMOJI, LETTER = "\U0001f600", "\U0001d49c"
TOOL = {"name": "look", "description": f"for {LETTER}", "parameters": {"type": "object", "\ue100": {}}}
RECORD = {
    "messages": [
        {"role": "user", "content": f"a {EMOJI} and \ue101, b {LETTER}{EMOJI}"},
        {"role": "assistant", "content": f"{EMOJI} yes {EMOJI}", "tool_calls": [
            {"function": {"name": "look", "arguments": {"for": EMOJI}}}]},
        {"role": "tool", "content": "\uf8ff found"},
        {"role": "assistant", "content": f"done{LETTER}"},
    ],
    "tools": [TOOL],
}


@pytest.fixture
def every_text_counts_as_long(monkeypatch):
    monkeypatch.setattr(narrow, "LONG", 0)


@pytest.mark.parametrize("family", ["chatml", "llama3"])
def test_a_narrow_conversation_gives_the_same_tokens_and_mask(family, monkeypatch):
    record = {"messages": [RECORD["messages"][0], RECORD["messages"][3]] * 2}
    encoder = ChatEncoder(byte_tokenizer(family), 10_000)
    expected = encoder.encode(record)
    monkeypatch.setattr(narrow, "LONG", 0)
    narrowed = []
    locate = encoder.template.locate
    encoder.template.locate = lambda conversation: narrowed.append(conversation) or locate(conversation)
    found = encoder.encode(record)
    assert all(max(message["content"]) <= "\uffff" for message in narrowed[0].messages)
    assert np.array_equal(found.input_ids, expected.input_ids)
    assert np.array_equal(found.loss_mask, expected.loss_mask)


def test_stand_ins_are_characters_that_the_conversation_lacks(every_text_counts_as_long):
    conversation = conversation_of(RECORD)
    narrowing = Narrowing.for_conversation(conversation, "")
    assert set(map(chr, narrowing.stand_ins)) == {EMOJI, LETTER}
    assert set(map(chr, narrowing.stand_ins.values())) == {"\ue102", "\ue103"}
    for before, after in zip(conversation.messages, narrowing.narrow(conversation).messages, strict=True):
        assert max(after["content"]) <= "\uffff" and len(after["content"]) == len(before["content"])
        assert sys.getsizeof(after["content"]) <= sys.getsizeof(before["content"])
        assert narrowing.restore(after["content"]) == before["content"]
        assert after.get("tool_calls") == before.get("tool_calls")


@pytest.mark.parametrize("template", ["{{ x | tojson(ensure_ascii=True) }}", "\ue200{{ messages }}"])
def test_a_template_that_could_tell_a_stand_in_gets_the_texts_as_they_are(
    every_text_counts_as_long, template
):
    assert Narrowing.for_conversation(conversation_of(RECORD), template) == Narrowing({})


def test_more_kinds_of_characters_than_stand_ins_leave_the_texts_as_they_are(every_text_counts_as_long):
    many = "".join(map(chr, range(0x20000, 0x22000)))
    conversation = conversation_of({"messages": [{"role": "user", "content": many}]})
    assert Narrowing.for_conversation(conversation, "") == Narrowing({})


def test_a_short_conversation_is_left_as_it_is():
    conversation = conversation_of(RECORD)
    assert Narrowing.for_conversation(conversation, "").narrow(conversation) is conversation
