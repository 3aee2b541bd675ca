#!/usr/bin/env python3
"""Rewrite the assistant answers of a conversation file with the target's own.

    tools/regenerate.py prompts.jsonl chats.jsonl --target models/SmolLM2-135M-Instruct
    tools/regenerate.py prompts.jsonl chats.jsonl --target meta-llama/Llama-3.1-8B-Instruct \\
        --endpoint http://localhost:30000/v1 --concurrency 64

The input is JSONL of {"id", "messages": [{"role", "content"}, ...]}; assistant messages in it are dropped, and each user
turn is answered on top of the target's own earlier answers. Greedy by default: a draft is verified against the target's most
likely token, so that is the text it should know best. Stopped at any moment, the same command goes on.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import eagle_ds  # noqa: F401  before any package: says so where they are missing


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, help="JSONL of prompts or conversations")
    parser.add_argument("output", type=Path, help="JSONL to write, or to go on with")
    parser.add_argument("--target", required=True, help="Hugging Face id or folder; with --endpoint the model name sent to the server")
    parser.add_argument("--endpoint", help="base URL of an OpenAI-compatible server, such as http://localhost:30000/v1")
    parser.add_argument("--concurrency", type=int, default=32, help="requests under way at once, with --endpoint (default: %(default)s)")
    parser.add_argument(
        "--api-key-variable", default="OPENAI_API_KEY", help="environment variable that holds the key (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="conversations generated together by transformers (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="of transformers' weights")
    parser.add_argument("--device", default="auto", help="cuda, cpu, cuda:1, ... (default: cuda where there is one)")
    parser.add_argument("--max-length", type=int, help="longest prompt and answer; a conversation ends before the turn that does not fit")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="of one answer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--min-distinct",
        type=float,
        default=0.0,
        help="leave out a turn whose answer has a lower share of distinct 8-word runs: small targets fall into loops (default: keep all)",
    )
    return parser.parse_args()


def main() -> int:
    args = parse()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


def run(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from eagle_ds.capture.regenerate import EndpointGenerator, Sampling, TransformersGenerator, finished_ids, regenerate
    from eagle_ds.data.conversations import ConversationFile

    total = sum(1 for _ in ConversationFile(args.input).records())
    done = len(finished_ids(args.output))
    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_p, args.seed)
    if args.endpoint:
        generator = EndpointGenerator(args.endpoint, args.target, sampling, os.environ.get(args.api_key_variable))
    else:
        generator = TransformersGenerator(args.target, sampling, args.dtype, args.device, args.max_length)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tqdm(total=total, initial=done, unit="chat", smoothing=0.05) as bar:
        generated = 0

        def progress(conversations: int, tokens: int) -> None:
            nonlocal generated
            generated += tokens
            bar.update(conversations)
            bar.set_postfix_str(f"{generated / max(bar.format_dict['elapsed'], 1e-9):.0f} tokens/s")

        batch_size, concurrency = (1, args.concurrency) if args.endpoint else (args.batch_size, 1)
        written = regenerate(args.input, args.output, generator, batch_size, concurrency, args.min_distinct, progress)
    print(f"{args.output}: {written} conversations written, {done} were there, {total - done - written} skipped")


if __name__ == "__main__":
    sys.exit(main())
