#!/usr/bin/env python3
"""Add the answers to the remaining short prompts to smollm2_chats. README.md gives the whole procedure.

    recipes/data/make_more.py compose OUT_DIR              # write rest.prompts.jsonl
    recipes/data/make_more.py append ANSWERED.jsonl ...    # append the answers to the train and eval files
    recipes/data/make_more.py count TARGET_FOLDER          # print the lengths that the README lists
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

from make_prompts import short_prompts

HERE = Path(__file__).resolve().parent
LIMIT_BYTES = 3_000_000  # of both files together, so that the repository stays small
ANSWERED_SHORT = 440  # shortest training prompts; the first version of smollm2_chats answered these


def compose(folder: Path) -> None:
    """Write the short training prompts that the first version left out: all but the shortest ones."""
    folder.mkdir(parents=True, exist_ok=True)
    records = [as_messages(record) for record in short_prompts("train", random.Random("smollm2_chats train"))]
    rest = sorted((json.dumps(record) for record in records), key=len)[ANSWERED_SHORT:]
    path = folder / "rest.prompts.jsonl"
    path.write_text("".join(f"{line}\n" for line in rest), encoding="utf-8")
    print(f"{path}: {len(rest)} prompts")


def as_messages(record: dict) -> dict:
    return {"id": record["id"], "messages": [{"role": "user", "content": turn} for turn in record["turns"]]}


def append(answered: list[Path]) -> None:
    """Append new conversations. Existing lines keep their place, because the demo uses the first ones."""
    lines = [line for path in answered for line in path.read_text(encoding="utf-8").splitlines()]
    records = [json.loads(line) for line in lines]
    random.Random("smollm2_chats append").shuffle(records)
    for split in ("train", "eval"):
        path = HERE / f"smollm2_chats.{split}.jsonl"
        text = path.read_text(encoding="utf-8")
        present = {json.loads(line)["id"] for line in text.splitlines()}
        own = [record for record in records if record["id"].startswith(f"{split}-")]
        new = [record for record in own if record["id"] not in present]
        added = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in new)
        path.write_text(text + added, encoding="utf-8")
        size = f"{path.stat().st_size / 1e6:.2f} MB"
        print(f"{path}: {len(present)} conversations and {len(new)} new ones, {size}")
    if (size := sum(path.stat().st_size for path in HERE.glob("smollm2_chats.*.jsonl"))) > LIMIT_BYTES:
        problem = f"both files have {size / 1e6:.2f} MB together, the limit is {LIMIT_BYTES / 1e6:.0f}"
        sys.exit(f"error: {problem}; restore them with git and append fewer conversations")


def count(target: Path) -> None:
    """Print token counts with the target's own chat template, as a capture counts them."""
    sys.path.insert(0, str(HERE.parents[1]))
    from eagle_ds.data.chat import ChatEncoder, load_tokenizer
    from eagle_ds.data.conversations import ConversationFile

    for split in ("train", "eval"):
        file = ConversationFile(HERE / f"smollm2_chats.{split}.jsonl")
        encoder = ChatEncoder(load_tokenizer(target), 1 << 20)
        encoded = [sample for _, sample in file.encode(encoder)]
        lengths = sorted(len(sample.input_ids) for sample in encoded)
        trained = sum(int(sample.loss_mask.sum()) for sample in encoded)
        roles = [[message["role"] for message in record["messages"]] for _, record in file.records()]
        several = sum(conversation.count("assistant") > 1 for conversation in roles)
        limits = (1024, 2048, 4096, 6144, 8192)
        longer = ", ".join(f"{sum(n > limit for n in lengths)} over {limit}" for limit in limits)
        print(
            f"{split}: {len(lengths)} conversations, {several} of several turns, {sum(lengths)} tokens, "
            f"{trained} trained, median {lengths[len(lengths) // 2]}, longest {lengths[-1]}; {longer}"
        )


def main() -> None:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    commands = parser.add_subparsers(dest="command", required=True)
    composing = commands.add_parser("compose", help="write the remaining prompts")
    composing.add_argument("folder", type=Path, help="where to write rest.prompts.jsonl")
    appending = commands.add_parser("append", help="append conversations to the files in this folder")
    appending.add_argument("answered", type=Path, nargs="+", help="JSONL that tools/regenerate.py wrote")
    counting = commands.add_parser("count", help="count the tokens of both files")
    counting.add_argument("target", type=Path, help="folder of SmolLM2-135M-Instruct, for its tokenizer")
    args = parser.parse_args()
    if args.command == "compose":
        compose(args.folder)
    elif args.command == "append":
        append(args.answered)
    else:
        count(args.target)


if __name__ == "__main__":
    main()
