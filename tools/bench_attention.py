#!/usr/bin/env python3
"""Time the prefix attention of one TTT step by itself, forward and backward, on one GPU.

    tools/bench_attention.py                                                  shapes of a Llama-3.1-8B draft
    tools/bench_attention.py --seq 131072 --trained-fraction 0.1 --turn 512   one shape
    tools/bench_attention.py --seq 131072 --heads 8 --kv-heads 2              one rank's share with Ulysses 4
    tools/bench_attention.py --seq 4096 --documents 32                        a pack of 32 documents

What it measures: the attention of the trained rows (queries) to all rows of their own document (keys), on
random bfloat16 numbers. Diagonal keys are not included; they cost one pass over the rows.

How: each kernel runs --repeats times, and the fastest time counts.

How to read the output: one JSON line per shape and backend. CudnnBackend is what training uses on Hopper GPUs
(cuDNN, with Triton for the rows that cuDNN cannot take); TritonBackend is Triton alone. forward_ms and
backward_ms are milliseconds. With d the width of a head, forward_tflops counts 4 d operations per query-key
pair and head, and backward_tflops counts 10 d.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eagle_ds.config.outputs import check_output_file

SHAPES = (
    (32768, 1.0, 512, 1), (131072, 1.0, 512, 1), (131072, 0.5, 2048, 1),
    (131072, 0.1, 512, 1), (4096, 1.0, 512, 32)
)
TTT_STEPS = 7


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seq", type=int, help="tokens of each document (default: several shapes)")
    parser.add_argument(
        "--trained-fraction", type=float, default=1.0, help="fraction of tokens trained, in turns"
    )
    parser.add_argument("--turn", type=int, default=512, help="length of a turn: consecutive trained tokens")
    parser.add_argument("--documents", type=int, default=1, help="documents packed into the sequence")
    parser.add_argument("--heads", type=int, default=32, help="query heads of a rank")
    parser.add_argument("--kv-heads", type=int, default=8, help="key and value heads of a rank")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5, help="runs of each kernel; the fastest counts")
    parser.add_argument("--json", type=Path, help="also append the lines to this file")
    return parser.parse_args()


def main() -> None:
    options = parse()
    try:
        if options.json:
            check_output_file(options.json, "--json")
        measure(options)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def measure(options: argparse.Namespace) -> None:
    import torch

    from eagle_ds.bench.attention import Heads, time_attention
    from eagle_ds.bench.synthetic_data import document_in_exact_turns
    from eagle_ds.config.settings import check_positive

    check_positive(options, "seq", "documents", "heads", "kv_heads", "head_dim", "repeats")
    if options.heads % options.kv_heads:
        found = f"--heads {options.heads} is not a multiple of --kv-heads {options.kv_heads}"
        raise ValueError(f"{found}; each KV head serves the same number of query heads")
    if not torch.cuda.is_available():
        raise ValueError("no GPU found; this tool times GPU kernels and needs one")
    heads = Heads(options.heads, options.kv_heads, options.head_dim)
    one = options.seq, options.trained_fraction, options.turn, options.documents
    shapes = SHAPES if options.seq is None else [one]
    for tokens, fraction, turn, count in shapes:
        shape = {"tokens": tokens, "fraction": fraction, "turn": turn}
        documents = [document_in_exact_turns(tokens, fraction, turn)] * count
        try:
            for line in time_attention(documents, heads, TTT_STEPS, options.repeats):
                record(shape | line, options.json)
        except torch.cuda.OutOfMemoryError as error:
            what = f"{count} x {tokens} tokens with {heads.query} heads do not fit this GPU"
            raise ValueError(f"{what}; use a smaller --seq, --documents or --heads") from error


def record(line: dict[str, Any], file: Path | None) -> None:
    text = json.dumps(line)
    print(text, flush=True)
    if file:
        with file.open("a", encoding="utf-8") as stream:
            stream.write(f"{text}\n")


if __name__ == "__main__":
    main()
