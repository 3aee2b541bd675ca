#!/usr/bin/env python3
"""Add to smollm2_chats what the target answers to the short prompts that were left at first. See README.md beside this file.

    recipes/data/make_more.py compose OUT_DIR              # rest.prompts.jsonl
    recipes/data/make_more.py append ANSWERED.jsonl ...    # adds the answered ones to the files beside this one, by split
    recipes/data/make_more.py count TARGET_FOLDER          # lengths of what is there, for the README
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

from make_prompts import short_prompts

HERE = Path(__file__).resolve().parent
LIMIT_BYTES = 3_000_000
ANSWERED_SHORT = 440  # of the training prompts, shortest first, that smollm2_chats began with


def compose(folder: Path) -> None:
    """The short training prompts that the first run left, which answered the shortest ones."""
    folder.mkdir(parents=True, exist_ok=True)
    records = [as_messages(record) for record in short_prompts("train", random.Random("smollm2_chats train"))]
    rest = sorted((json.dumps(record) for record in records), key=len)[ANSWERED_SHORT:]
    path = folder / "rest.prompts.jsonl"
    path.write_text("".join(f"{line}\n" for line in rest), encoding="utf-8")
    print(f"{path}: {len(rest)} prompts")


def as_messages(record: dict) -> dict:
    return {"id": record["id"], "messages": [{"role": "user", "content": turn} for turn in record["turns"]]}


def append(answered: list[Path]) -> None:
    """Add conversations at the ends, so that the first ones, which the demo takes, stay what they are."""
    records = [json.loads(line) for path in answered for line in path.read_text(encoding="utf-8").splitlines()]
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
    appending = commands.add_parser("append", help="add answered conversations to the files beside this one")
    appending.add_argument("answered", type=Path, nargs="+")
    counting = commands.add_parser("count", help="count tokens")
    counting.add_argument("target", type=Path)
    args = parser.parse_args()
    if args.command == "compose":
        compose(args.folder)
    elif args.command == "append":
        append(args.answered)
    else:
        count(args.target)


if __name__ == "__main__":
    main()
