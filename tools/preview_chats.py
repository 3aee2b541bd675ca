#!/usr/bin/env python3
"""Look at conversations as training will see them, before you spend GPU-hours on their hidden states.

examples
  # three conversations of a file, as the chat template of a target renders them, and the figures of all
  tools/preview_chats.py chats.jsonl --target Qwen/Qwen3-8B --max-length 32768

  # the file, target, length and vocabulary of a recipe; twenty conversations in full, for a browser
  tools/preview_chats.py --recipe recipes/llama3_128k.json --show 20 --html preview.html

  # without thinking, as a server that passes the same option renders it
  tools/preview_chats.py chats.jsonl --target Qwen/Qwen3-8B --template-kwargs '{"enable_thinking": false}'

what to look for
  marked tokens      what the target generates, and nothing else: answers with their end-of-turn token, no
                     question, no role header. They are green in a terminal, and between brackets in a file.
  trained            the share of trained tokens. A small share is fine: prompts are cheap. 0% is not.
  ignored fields     what the records hold and the chat template leaves out ("read" names them).
  truncated          trained tokens behind max_length are lost. Raise --max-length, or split these records.
  skipped, rejected  each record with its reason.
  draft vocabulary   the share of trained tokens that a draft vocabulary of this size holds. A token outside
                     it can never be proposed. 98% and more is usual; little is gained beyond 99.9%.

The tool reads the tokenizer and config.json of the target, not its weights, and needs no GPU. It writes
nothing but the file of --html. Records and file formats: as tools/prepare_hidden_states.py reads them.

exit codes: 0; 1 for an error, or if there is nothing to train on
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import eagle_ds  # noqa: F401  before any other package: it names the packages that are missing

if TYPE_CHECKING:
    from eagle_ds.reporting.preview import PreviewJob


def parse() -> argparse.Namespace:
    """Parse the command line."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    add = parser.add_argument
    add("file", nargs="?",
        help="file of conversations, or the id of a data set on the Hugging Face hub (default: the recipe's "
        "data.conversations)")
    add("--target", help="Hugging Face id or local folder of the target (default: the recipe's)")
    add("--recipe", type=Path, help="recipes/NAME.json; options on the command line win over its values")
    add("--show", type=int, default=3, metavar="N",
        help="show the first N conversations; long texts are shortened (default: %(default)s)")
    add("--html", type=Path, metavar="OUT.html", help="write a page too, with these conversations in full")
    add("--vocab-size", type=int, metavar="N",
        help="size of the draft vocabulary (default: the recipe's, else 32000 or the target's if smaller)")
    add("--max-length", type=int, metavar="L",
        help="longest sample in tokens (default: the recipe's, else no limit)")
    add("--overlong", choices=["truncate", "skip"],
        help="what a capture does with a longer conversation (default: the recipe's, else truncate)")
    add("--duplicates", choices=["reject", "suffix"],
        help="what a capture does with a record whose id an earlier, other one has (default: the recipe's, "
        "else reject)")
    add("--template-kwargs", type=json.loads, metavar="JSON",
        help="more variables of the chat template, as a JSON object (default: the recipe's, else none)")
    return parser.parse_args()


def main() -> int:
    """Run the command; return its exit code."""
    args = parse()
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s %(message)s")
    try:
        return run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def run(args: argparse.Namespace) -> int:
    """Preview the file and print it."""
    from eagle_ds.config.outputs import check_output_file
    from eagle_ds.launch import enter_repository
    from eagle_ds.reporting.preview import preview
    from eagle_ds.reporting.preview_text import preview_text, write_preview

    enter_repository(args, ("target", "file"))
    if args.html:
        check_output_file(args.html, "--html")
    found = preview(make_job(args))
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack characters of the conversations
    print(preview_text(found, colour=colour), end="")
    if args.html:
        write_preview(found, args.html)
        print(f"wrote {args.html}")
    if not found.used:
        print("error: there is nothing to train on", file=sys.stderr)
    return 0 if found.used else 1


def make_job(args: argparse.Namespace) -> PreviewJob:
    """Return what to preview: the recipe's values, where the command line gives no other."""
    from eagle_ds.config.recipe import load_own_recipe
    from eagle_ds.reporting.preview import PreviewJob

    given: dict[str, Any] = {
        "conversations": Path(args.file) if args.file else None, "target": args.target,
        "max_length": args.max_length, "vocab_size": args.vocab_size,
        "template_kwargs": args.template_kwargs, "overlong": args.overlong, "duplicates": args.duplicates,
    }
    values = {name: value for name, value in given.items() if value is not None}
    if args.recipe:
        values = PreviewJob.values_of(load_own_recipe(args.recipe)) | values
    if not isinstance(values.get("template_kwargs", {}), dict):
        raise ValueError("--template-kwargs is no JSON object; write it as '{\"enable_thinking\": false}'")
    for name, option in (("conversations", "FILE"), ("target", "--target")):
        if name not in values:
            raise ValueError(f"give {option}, or --recipe with a recipe that names it")
    return PreviewJob(show=args.show, **values)


if __name__ == "__main__":
    sys.exit(main())
