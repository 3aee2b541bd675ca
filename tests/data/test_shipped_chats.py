"""The conversations in recipes/data are small, split by topic, and their prompts can be composed again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "data"
LONG_CHARACTERS = 12_000  # about 4000 tokens of these texts


def records(split: str) -> list[dict]:
    return [
        json.loads(line)
        for line in (FOLDER / f"smollm2_chats.{split}.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def user_turns(record: dict) -> list[str]:
    return [message["content"] for message in record["messages"] if message["role"] == "user"]


def test_a_few_hundred_conversations_several_long_in_three_megabytes():
    train, held_out = records("train"), records("eval")
    assert len(train) >= 200 and len(held_out) >= 50
    for split, least in ((train, 8), (held_out, 3)):
        sizes = [sum(len(message["content"]) for message in record["messages"]) for record in split]
        assert sum(size > LONG_CHARACTERS for size in sizes) >= least
    assert sum(path.stat().st_size for path in FOLDER.glob("smollm2_chats.*.jsonl")) <= 3_000_000


def test_every_conversation_ends_with_an_answer_and_no_prompt_is_in_both_splits():
    train, held_out = records("train"), records("eval")
    ids = [record["id"] for record in train + held_out]
    assert len(set(ids)) == len(ids)
    for record in train + held_out:
        answers = [message for message in record["messages"] if message["role"] == "assistant"]
        assert record["messages"][-1]["role"] == "assistant" and len(answers) == len(record["finish"])
    assert not {user_turns(record)[0] for record in train} & {user_turns(record)[0] for record in held_out}


@pytest.mark.parametrize(
    ("maker", "made"), [("make_prompts.py", ["eval", "train"]), ("make_more.py", ["rest"])]
)
def test_prompts_are_composed_alike_every_time(tmp_path, maker, made):
    for run in ("a", "b"):
        subprocess.run(
            [sys.executable, str(FOLDER / maker), "compose", str(tmp_path / run)],
            check=True,
            capture_output=True,
        )
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == [f"{name}.prompts.jsonl" for name in made]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)


def test_the_shipped_prompts_are_those_that_are_composed(tmp_path):
    for maker in ("make_prompts.py", "make_more.py"):
        subprocess.run(
            [sys.executable, str(FOLDER / maker), "compose", str(tmp_path)], check=True, capture_output=True
        )
    composed = {}
    for path in tmp_path.iterdir():
        composed |= {
            record["id"]: set(user_turns(record)) for record in map(json.loads, path.read_text().splitlines())
        }
    for record in records("train") + records("eval"):
        assert set(user_turns(record)) <= composed[record["id"]], record["id"]
