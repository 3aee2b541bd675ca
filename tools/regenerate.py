#!/usr/bin/env python3
"""Replace the assistant answers of a conversation file by the target's own.

A draft is trained to predict what its target writes, so train it on text that the target wrote.

examples
  # generate in this process, with transformers
  tools/regenerate.py prompts.jsonl chats.jsonl --target models/SmolLM2-135M-Instruct

  # ask a running server (SGLang, vLLM, ...)
  tools/regenerate.py prompts.jsonl chats.jsonl --target meta-llama/Llama-3.1-8B-Instruct \\
      --endpoint http://localhost:30000/v1 --concurrency 64

The input is a file of conversations in any shape and format that tools/prepare_hidden_states.py reads.
Assistant messages in it are dropped, except tool calls. Tools of a record are passed on. Records that cannot
be used are listed in OUTPUT.rejected; with --strict, the first one ends the command.
Each user turn is answered in the context of the target's own earlier answers. The default is greedy decoding,
because greedy serving accepts a draft's token only if it is the target's most likely one. You can stop the
command at any moment; run it again to continue.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import eagle_ds  # noqa: F401  before any other package: it names the packages that are missing


def parse() -> argparse.Namespace:
    """Parse the command line."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    add = parser.add_argument
    add("input", type=Path, help="file of prompts or conversations, or the id of a data set on the hub")
    add("output", type=Path, help="JSONL file to write, or to continue")
    add("--target", required=True,
        help="Hugging Face id or folder; with --endpoint the model name that is sent to the server")
    add("--endpoint", help="base URL of an OpenAI-compatible server, such as http://localhost:30000/v1")
    add("--concurrency", type=int, default=32,
        help="with --endpoint: requests that run at the same time (default: %(default)s)")
    add("--api-key-variable", default="OPENAI_API_KEY",
        help="environment variable that holds the server's API key (default: %(default)s)")
    add("--batch-size", type=int, default=8,
        help="with transformers: conversations generated together (default: %(default)s)")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="with transformers: dtype of the target; auto: the dtype of its files (default: %(default)s)")
    add("--device", default="auto", help="cuda, cpu, cuda:1, ... (default: cuda if there is a GPU)")
    add("--max-length", type=int,
        help="longest prompt and answer in tokens; a conversation ends before the first turn that does not "
        "fit (default: the target's context length)")
    add("--max-new-tokens", type=int, default=512, help="longest answer in tokens (default: %(default)s)")
    add("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    add("--top-p", type=float, default=1.0, help="nucleus sampling, if not greedy (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of sampling (default: %(default)s)")
    add("--template-kwargs", metavar="JSON",
        help="variables of the chat template, such as '{\"enable_thinking\": false}'; with --endpoint they "
        "are sent as chat_template_kwargs")
    add("--duplicates", choices=["reject", "suffix"], default="reject",
        help="what to do with a record whose id an earlier, other one has (default: %(default)s)")
    add("--strict", action="store_true", help="stop at the first record that cannot be used")
    add("--min-distinct", type=float, default=0.0,
        help="drop a turn if the share of distinct 8-word sequences in its answer is below this value; small "
        "targets often repeat themselves (default: keep all)")
    return parser.parse_args()


def main() -> int:
    """Run the command; return its exit code: 0, 1 for an error, 130 if interrupted."""
    args = parse()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; run the same command again to continue", file=sys.stderr)
        return 130
    return 0


def run(args: argparse.Namespace) -> None:
    """Regenerate the conversations that the output lacks, with a progress bar."""
    from tqdm import tqdm

    from eagle_ds.capture import regenerate as answers
    from eagle_ds.config.settings import json_object
    from eagle_ds.data.conversations import ConversationFile, Intake

    template_kwargs = json_object(args.template_kwargs, "--template-kwargs")
    intake = Intake(args.strict, args.duplicates)
    file = ConversationFile(args.input)
    total = file.count()
    done = len(answers.finished_ids(args.output))
    sampling = answers.Sampling(args.max_new_tokens, args.temperature, args.top_p, args.seed)
    if args.endpoint:
        api_key = os.environ.get(args.api_key_variable)
        generator = answers.EndpointGenerator(
            args.endpoint, args.target, sampling, api_key, template_kwargs=template_kwargs)
    else:
        generator = answers.TransformersGenerator(
            args.target, sampling, args.dtype, args.device, args.max_length, template_kwargs)
    # A server batches requests itself, so each is one conversation; transformers gets one batch at a time.
    batch_size, concurrency = (1, args.concurrency) if args.endpoint else (args.batch_size, 1)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tqdm(total=total, initial=done, unit="chat", smoothing=0.05) as bar:
        generated = 0

        def show(conversations: int, tokens: int) -> None:
            nonlocal generated
            generated += tokens
            bar.update(conversations)
            bar.set_postfix_str(f"{generated / max(bar.format_dict['elapsed'], 1e-9):.0f} tokens/s")

        written = answers.regenerate(
            file, args.output, generator, batch_size, concurrency, args.min_distinct, show, intake)
    skipped = total - done - written - len(intake.rejected) - intake.repeated
    told = f"{args.output}: {written} conversations written, {done} were there already, {skipped} skipped"
    print("; ".join(filter(None, (told, str(intake)))))


if __name__ == "__main__":
    sys.exit(main())
