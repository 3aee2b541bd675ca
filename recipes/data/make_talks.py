#!/usr/bin/env python3
"""Compose long conversations of many turns, and add what the target answered to smollm2_chats. See README.md beside this file.

    recipes/data/make_talks.py compose OUT_DIR              # talks.prompts.jsonl, rest.prompts.jsonl
    recipes/data/make_talks.py append ANSWERED.jsonl ...    # adds them to the files beside this one, by split
    recipes/data/make_talks.py count TARGET_FOLDER          # lengths of what is there, for the README

A talk asks for a book chapter by chapter, or asks one question after another about a long document, so that the tokens which
the target wrote lie all along a long context. The rest are those short prompts of make_prompts.py that were not answered yet.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

from make_prompts import CONCEPTS, DOCUMENTS, TASKS, WRITING, document_prompt, listed, short_prompts, split_of

HERE = Path(__file__).resolve().parent
LIMIT_BYTES = 3_000_000
ANSWERED_SHORT = 440  # of the training prompts, shortest first, that smollm2_chats began with
MIN_TURNS = 3

BOOKS = {
    "concept": (
        CONCEPTS,
        "We are writing a small textbook about {}, one chapter at a time. Begin with chapter 1, an introduction of several paragraphs.",
        listed(
            """
            its history and the people who shaped it | the most important terms, each with its meaning | how it works, from beginning to end
            three examples from everyday life, told in detail | what beginners get wrong, and how to get it right
            a dialogue between a teacher and a student about it | how it is studied or measured | why it matters to society
            open questions and what the future may bring | exercises for the reader, with solutions
            a short story in which it plays a part | a summary of all that was said so far | a letter to the reader that ends the book
            """
        ),
    ),
    "task": (
        TASKS,
        "We are writing a handbook for people who want to {}. Begin with chapter 1: who this book is for, in several paragraphs.",
        listed(
            """
            what you need before you begin | the first day, step by step | the first week, day by day
            ten common mistakes and how to avoid them | the story of a beginner who almost gave up | advice from an expert, as an interview
            how to do it with little money | how to do it with children | what to do when nothing works | how to get better after a year
            questions that readers ask, with answers | a checklist of everything so far | a closing word of encouragement
            """
        ),
    ),
    "story": (
        WRITING,
        "Let us turn this into a long piece, part by part: {}. Write part 1, several paragraphs long, with vivid details.",
        listed(
            """
            a new person appears | a journey begins | something is lost | a conversation at night | an old memory returns
            a storm changes the plan | a secret is told | a quarrel between friends | help comes from an unexpected side
            the hardest decision | the morning after | a letter arrives | the ending, which looks back at the beginning
            """
        ),
    ),
}
NEXT = ("Now write the next chapter: {}.", "Go on with the next part: {}. Several paragraphs, please.", "Continue. The next section: {}.")

MORE = listed(
    """
    Which detail surprised you most, and why? | Retell the most important event as a short story. | Make a list of ten facts from it.
    Write a dialogue between two people who have read it. | What is missing from it that you would like to know?
    Explain it to a child in several paragraphs. | Write a speech based on it. | Compare the beginning of it with its end.
    Write an entry for a diary about one of the people in it. | What should be done next? Give reasons.
    Write a review of it for a newspaper. | Summarize our conversation so far.
    """
)


def book(rng: random.Random, split: str, n: int) -> list[str]:
    """Thirteen turns, a chapter each."""
    topics, opening, chapters = list(BOOKS.values())[n % len(BOOKS)]
    places = list(range(len(chapters) - 1))
    kept = [*sorted(rng.sample(places, len(places) - 1)), len(chapters) - 1]
    return [opening.format(rng.choice(split_of(topics, split))), *(rng.choice(NEXT).format(chapters[i]) for i in kept)]


def reading(rng: random.Random, n: int) -> list[str]:
    """A document of 2 to 5 thousand tokens, then eight questions."""
    kind = list(DOCUMENTS)[n % len(DOCUMENTS)]
    return document_prompt(rng, kind, rng.randint(6_000, 15_000)) + rng.sample(MORE, 7)


def compose(folder: Path, train: int, held_out: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    talks = []
    for split, count in (("train", train), ("eval", held_out)):
        rng = random.Random(f"smollm2_chats talks {split}")
        for n in range(count):
            turns = book(rng, split, n // 2) if n % 2 == 0 else reading(rng, n // 2)
            talks.append({"id": f"{split}-talk-{n:03d}", "turns": turns})
    write_prompts(folder / "talks.prompts.jsonl", talks)
    write_prompts(folder / "rest.prompts.jsonl", unanswered())


def unanswered() -> list[dict]:
    """The short training prompts that the first run left, which answered the shortest ones."""
    records = short_prompts("train", random.Random("smollm2_chats train"))
    return sorted(records, key=lambda record: len(json.dumps(as_messages(record))))[ANSWERED_SHORT:]


def as_messages(record: dict) -> dict:
    return {"id": record["id"], "messages": [{"role": "user", "content": turn} for turn in record["turns"]]}


def write_prompts(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(as_messages(record)) + "\n" for record in records), encoding="utf-8")
    print(f"{path}: {len(records)} prompts")


def append(answered: list[Path]) -> None:
    """Add conversations at the ends, so that the first ones, which the demo takes, stay what they are."""
    records = [json.loads(line) for path in answered for line in path.read_text(encoding="utf-8").splitlines()]
    records = [record for record in records if "-talk-" not in record["id"] or len(record["finish"]) >= MIN_TURNS]
    random.Random("smollm2_chats append").shuffle(records)
    for split in ("train", "eval"):
        path = HERE / f"smollm2_chats.{split}.jsonl"
        text = path.read_text(encoding="utf-8")
        present = {json.loads(line)["id"] for line in text.splitlines()}
        new = [record for record in records if record["id"].startswith(f"{split}-") and record["id"] not in present]
        path.write_text(text + "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in new), encoding="utf-8")
        print(f"{path}: {len(present)} conversations and {len(new)} new ones, {path.stat().st_size / 1e6:.2f} MB")
    if (size := sum(path.stat().st_size for path in HERE.glob("smollm2_chats.*.jsonl"))) > LIMIT_BYTES:
        sys.exit(f"error: {size / 1e6:.2f} MB together, more than {LIMIT_BYTES / 1e6:.0f}; restore the files with git and append fewer")


def count(target: Path) -> None:
    """Tokens with the target's own chat template, as a capture counts them."""
    sys.path.insert(0, str(HERE.parents[1]))
    from eagle_ds.data.chat import ChatEncoder, load_tokenizer
    from eagle_ds.data.conversations import ConversationFile

    for split in ("train", "eval"):
        file, encoder = ConversationFile(HERE / f"smollm2_chats.{split}.jsonl"), ChatEncoder(load_tokenizer(target), 1 << 20)
        encoded = [sample for _, sample in file.encode(encoder)]
        lengths = sorted(len(sample.input_ids) for sample in encoded)
        turns = [sum(message["role"] == "assistant" for message in record["messages"]) for _, record in file.records()]
        longer = ", ".join(f"{sum(length > limit for length in lengths)} over {limit}" for limit in (1024, 2048, 4096, 6144, 8192))
        print(
            f"{split}: {len(lengths)} conversations, {sum(n > 1 for n in turns)} of several turns, {sum(lengths)} tokens, "
            f"{sum(int(sample.loss_mask.sum()) for sample in encoded)} trained, median {lengths[len(lengths) // 2]}, "
            f"longest {lengths[-1]}; {longer}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    composing = commands.add_parser("compose", help="write the prompts")
    composing.add_argument("folder", type=Path)
    composing.add_argument("--train", type=int, default=40, help="talks of the training split (default: %(default)s)")
    composing.add_argument("--eval", type=int, default=16, help="talks of the held-out split (default: %(default)s)")
    appending = commands.add_parser("append", help="add answered conversations to the files beside this one")
    appending.add_argument("answered", type=Path, nargs="+")
    counting = commands.add_parser("count", help="count tokens")
    counting.add_argument("target", type=Path)
    args = parser.parse_args()
    if args.command == "compose":
        compose(args.folder, args.train, args.eval)
    elif args.command == "append":
        append(args.answered)
    else:
        count(args.target)


if __name__ == "__main__":
    main()
