"""Odd records of every kind, for seven families of chat templates: text, loss mask and what is left out.

``chat_corpus/README.md`` describes the files. The expected texts were written by hand from the templates.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from eagle_ds.data.chat import ChatEncoder, load_tokenizer
from eagle_ds.data.shapes import BadRecord, conversation_of
from tests.tiny_targets import byte_tokenizer

CORPUS = Path(__file__).parent / "chat_corpus"
FAMILIES = sorted(path.stem for path in CORPUS.glob("*.jsonl"))


@cache
def read(family: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the family's markers and its cases."""
    lines = (CORPUS / f"{family}.jsonl").read_text(encoding="utf-8").splitlines()
    head, *cases = map(json.loads, lines)
    return head, cases


CASES = [(family, case) for family in FAMILIES for case in read(family)[1]]
NAMES = [f"{family}-{case['name']}" for family, case in CASES]
TRAINED = [(family, case) for family, case in CASES if "expected" in case]
TRAINED_NAMES = [f"{family}-{case['name']}" for family, case in TRAINED]


@cache
def tokenizer_of(family: str, folder: Path | None) -> Any:
    """Add the family's markers to the tokenizer in ``folder``, or to one over bytes; set its template."""
    head, _ = read(family)
    tokenizer = load_tokenizer(folder) if folder else byte_tokenizer("plain")
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in head["other"]])
    special = {"bos_token": head["bos"], "eos_token": head["eos"], "extra_special_tokens": head["special"]}
    tokenizer.add_special_tokens(special)
    template = (CORPUS / f"{family}.jinja").read_text(encoding="utf-8")
    both = {"default": head.get("default"), "tool_use": template}
    tokenizer.chat_template = both if both["default"] else template
    return tokenizer


def encoder_of(family: str, case: dict[str, Any], folder: Path | None = None) -> ChatEncoder:
    return ChatEncoder(tokenizer_of(family, folder), 1 << 20, template_kwargs=case.get("template_kwargs"))


def expected_of(family: str, case: dict[str, Any]) -> tuple[str, list[str]]:
    """Return the expected text, and the trained parts of it."""
    marked = re.sub("«(.*?)»", lambda found: read(family)[0]["texts"][found[1]], case["expected"])
    return re.sub("[⟦⟧]", "", marked), re.findall("⟦(.*?)⟧", marked, re.DOTALL)


def check(encoder: ChatEncoder, family: str, case: dict[str, Any]) -> None:
    text, trained = expected_of(family, case)
    encoded = encoder.encode({"id": "odd", **case["record"]})
    decode = encoder.tokenizer.decode
    assert decode(encoded.input_ids) == text
    assert [decode(encoded.input_ids[start:end]) for start, end in encoded.trained_spans] == trained


def test_the_corpus_has_sixty_records_of_seven_families() -> None:
    assert len(CASES) >= 60 and len(FAMILIES) == 7
    assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize(("family", "case"), TRAINED, ids=TRAINED_NAMES)
def test_text_mask_and_ignored_fields_are_as_written_by_hand(family: str, case: dict[str, Any]) -> None:
    encoder = encoder_of(family, case)
    check(encoder, family, case)
    assert sorted(encoder.stats.ignored) == sorted(case.get("ignored", []))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tokenizer_with_merges_gives_the_same_texts_and_masks(family: str, embedded_target: Path) -> None:
    for case in read(family)[1]:
        if "expected" in case:
            check(encoder_of(family, case, embedded_target), family, case)


@pytest.mark.parametrize(
    ("family", "case"), [pair for pair in CASES if "expected" not in pair[1]],
    ids=[name for name in NAMES if name not in TRAINED_NAMES])
def test_other_records_are_skipped_or_rejected_with_the_field(family: str, case: dict[str, Any]) -> None:
    encoder = encoder_of(family, case)
    if case.get("skipped"):
        assert encoder.encode(case["record"]) is None and encoder.stats.without_answer == 1
    else:
        with pytest.raises(BadRecord, match=re.escape(case["rejected"])):
            encoder.encode(case["record"])


@pytest.mark.parametrize(("family", "case"), TRAINED, ids=TRAINED_NAMES)
def test_marks_of_all_texts_and_of_one_turn_find_the_same_answers(
    family: str, case: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "text" in case["record"] and case["record"]["text"]:
        return
    encoder, conversation = encoder_of(family, case), conversation_of(case["record"])
    found = encoder.template.locate(conversation)
    monkeypatch.setattr(encoder.template, "_by_words", lambda *_: None)
    assert encoder.template.locate(conversation) == found


@pytest.mark.parametrize(("family", "case"), TRAINED, ids=TRAINED_NAMES)
def test_the_first_answer_follows_the_prompt_that_is_served(family: str, case: dict[str, Any]) -> None:
    conversation = conversation_of(case["record"])
    roles = [message["role"] for message in conversation.messages]
    first = roles.index("assistant") if "assistant" in roles else 0
    if first == 0:  # plain text, or an answer without a question
        return
    encoder = encoder_of(family, case)
    text, _ = expected_of(family, case)
    prompt = encoder.render(conversation.messages[:first], True, conversation.tools)
    assert text.startswith(prompt) != case.get("prompt_differs", False)
