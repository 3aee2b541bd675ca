"""A preview shows what training will see: trained tokens marked, losses counted, hostile text harmless."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eagle_ds.data.chat import EncodedSample
from eagle_ds.reporting.preview import Preview, PreviewJob, pieces_of, preview
from eagle_ds.reporting.preview_text import EDGE_CHARACTERS, preview_text, visible, write_preview
from tests.tiny_targets import byte_tokenizer, save_tiny_llama


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("target"))


def chat(name: str, *turns: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": turn} for n, turn in enumerate(turns)]
    return {"id": name, "messages": messages}


def look(tmp_path: Path, target: Path, *records: Any, **settings: Any) -> Preview:
    path = tmp_path / "chats.jsonl"
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return preview(PreviewJob(path, str(target), vocab_size=16, **settings))


def row(found: Preview, name: str) -> str:
    """The value in the line of the summary that begins with ``name``."""
    lines = preview_text(found, colour=False).splitlines()
    (line,) = [line for line in lines if line.startswith(f"{name}  ")]
    return line.removeprefix(name).strip()


def test_trained_tokens_are_marked_in_what_the_template_renders(tmp_path: Path, target: Path) -> None:
    found = look(tmp_path, target, chat("a", "Why?", "Because.", "Sure?", "Yes."))
    plain, coloured = (preview_text(found, colour=colour) for colour in (False, True))
    shown = re.findall("⟦(.*?)⟧", plain.split("---", 1)[1], flags=re.S)
    assert len(shown) == 2 and shown[0].startswith("Because.") and shown[1].startswith("Yes.")
    assert "\x1b[32mBecause." in coloured and "⟦" not in coloured
    messages = chat("a", "Why?", "Because.", "Sure?", "Yes.")["messages"]
    rendered = byte_tokenizer("chatml").apply_chat_template(messages, tokenize=False)
    assert rendered.strip() in plain.replace("⟦", "").replace("⟧", "")


def test_pieces_put_together_are_the_whole_text_with_their_counts() -> None:
    tokenizer = byte_tokenizer("chatml", sentencepiece=True)
    ids = np.asarray(tokenizer("one two  three é four", add_special_tokens=False)["input_ids"], np.int32)
    mask = np.zeros(len(ids), np.uint8)
    mask[3:7] = mask[9:11] = 1
    pieces = pieces_of(EncodedSample("x", ids, mask), 10, tokenizer)
    whole = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert "".join(piece.text for piece in pieces) == whole
    assert [(piece.num_tokens, piece.trained, piece.kept) for piece in pieces] == [
        (3, False, True), (4, True, True), (2, False, True), (1, True, True), (1, True, False),
        (len(ids) - 11, False, False)]


def test_what_max_length_costs_is_counted_and_named(tmp_path: Path, target: Path) -> None:
    records = [chat("short", "q", "a"), chat("long", "q", "answer" * 20), chat("deep", "question " * 40, "a")]
    whole = look(tmp_path, target, *records)
    assert whole.used == 3 and not whole.overlong
    limit = whole.lengths[0] + 30
    found = look(tmp_path, target, *records, max_length=limit)
    cut, deep = found.overlong
    assert (cut.name, cut.skipped, deep.name, deep.skipped) == ("long (line 2)", False, "deep (line 3)", True)
    assert found.used == 2 and found.used_tokens == whole.lengths[0] + limit
    assert found.trained_tokens + cut.trained_lost + deep.trained_lost == whole.trained_tokens
    assert row(found, "truncated") == f"1 samples to {limit} tokens; {cut.trained_lost} trained tokens lost"
    assert row(found, "skipped").startswith("1 samples, no answer within max_length")
    text = preview_text(found, colour=False)
    assert f"long (line 2): truncated: {cut.num_tokens} tokens" in text
    lost = f"{whole.lengths[1] - limit} tokens, {cut.trained_lost} of them trained"
    assert f"[max_length cuts off {lost}]" in text
    skipped = look(tmp_path, target, *records, max_length=limit, overlong="skip")
    assert skipped.used == 1 and all(one.skipped for one in skipped.overlong)


def test_bad_records_are_rejected_with_their_reasons_and_do_not_stop_the_preview(
    tmp_path: Path, target: Path
) -> None:
    found = look(tmp_path, target, "{broken", chat("a", "q", "a"), {"id": "b", "nothing": 1})
    assert found.used == 1 and [rejected.line for rejected in found.intake.rejected] == [1, 3]
    assert row(found, "rejected").startswith("2 (")
    text = preview_text(found, colour=False)
    assert "line 1: rejected, not JSON: " in text and "line 3 (" in text


def test_skipped_records_are_listed_by_line_and_ignored_fields_with_an_example(
    tmp_path: Path, target: Path
) -> None:
    asks = {"id": "asks", "messages": [{"role": "user", "content": "q"}]}
    named = chat("named", "q", "a")
    named["messages"][0]["mood"] = "good"
    found = look(tmp_path, target, chat("a", "q", "a"), asks, chat("a", "q", "a"), "{", named)
    text = preview_text(found, colour=False)
    assert (found.records, found.skipped_lines) == (5, [2, 3])
    assert "line 2: skipped: " in text and "line 3: skipped: " in text and "line 4: rejected" in text
    assert "1 with mood of messages, which the chat template ignores (for example named)" in text
    assert "records a minute" in row(found, "time")


def test_coverage_is_the_share_of_trained_tokens_in_the_draft_vocabulary(
    tmp_path: Path, target: Path
) -> None:
    found = look(tmp_path, target, chat("a", "q", "abcdefghijklmnopqrstuvwxyz" + "a" * 100))
    assert list(found.coverage) == [4, 8, 16, 32]
    shares = list(found.coverage.values())
    assert shares == sorted(shares) and shares[-1] == 1.0
    # 101 times "a", 25 other letters once, one end of turn: 16 of the 27 tokens hold 101 + 15 of 127.
    assert (found.distinct_tokens, found.trained_tokens) == (27, 127)
    assert found.coverage[16] == pytest.approx(116 / 127)
    assert row(found, "draft vocabulary of 16 (chosen)") == "covers 91.34% of the trained tokens"


def test_long_texts_are_shortened_for_a_terminal_and_whole_in_the_page(tmp_path: Path, target: Path) -> None:
    question = "begin " + "x" * 3 * EDGE_CHARACTERS + " end?"
    found = look(tmp_path, target, chat("a", question, "a"))
    text = preview_text(found, colour=False)
    assert "begin" in text and "end?" in text and re.search(r"\[\.\.\. [\d,]+ characters \.\.\.\]", text)
    write_preview(found, tmp_path / "new" / "page.html")
    assert "x" * 3 * EDGE_CHARACTERS in (tmp_path / "new" / "page.html").read_text()


def test_hostile_text_neither_controls_the_terminal_nor_enters_the_page(tmp_path: Path, target: Path) -> None:
    hostile = "<script>alert(1)</script>\x1b[2J\u202e&amp;"
    found = look(tmp_path, target, chat(hostile, hostile, hostile), {"id": hostile, "x": hostile})
    text = preview_text(found, colour=False)
    assert "\x1b" not in text and "\u202e" not in text and "<U+001B>[2J<U+202E>" in text
    write_preview(found, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<mark>&lt;script" in page
    assert visible("tab\tline\n👩‍🚀") == "tab\tline\n👩‍🚀"


def test_a_page_strikes_through_what_max_length_cuts_off(tmp_path: Path, target: Path) -> None:
    found = look(tmp_path, target, chat("a", "q", "word " * 40), max_length=60)
    write_preview(found, tmp_path / "page.html")
    assert re.search(r"<del><mark>[^<]*word", (tmp_path / "page.html").read_text())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 0}, "max_length 0 is out of range; give 1 or more"),
        ({"show": -1}, "show -1 is out of range; give 0 or more"),
    ],
)
def test_an_impossible_setting_is_refused(
    tmp_path: Path, target: Path, settings: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        look(tmp_path, target, chat("a", "q", "a"), **settings)


def test_an_impossible_draft_vocabulary_is_refused(tmp_path: Path, target: Path) -> None:
    with pytest.raises(ValueError, match="vocabulary of 10000000 tokens is out of range; give 1 to 280"):
        preview(PreviewJob(tmp_path / "any.jsonl", str(target), vocab_size=10_000_000))
