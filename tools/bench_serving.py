#!/usr/bin/env python3
"""Measure a running server with a prompt file: acceptance, tokens/s, and waiting times.

    tools/serve_draft.py runs/NAME --port 30000                  # in another terminal; with speculation
    tools/bench_serving.py --url http://localhost:30000 --prompts chats.eval.jsonl --concurrency 1,8,32

    # compare with a second server, which serves the target alone
    tools/bench_serving.py --url http://localhost:30000 --baseline-url http://localhost:30001 \\
        --prompts chats.eval.jsonl --check-greedy

    # one GPU: measure one server after the other
    tools/bench_serving.py --url http://localhost:30000 --prompts chats.eval.jsonl --out bench/plain
    tools/bench_serving.py --url http://localhost:30000 --prompts chats.eval.jsonl --out bench/draft \\
        --baseline bench/plain/serving.json --check-greedy --compare runs/NAME/acceptance.json

Any server with OpenAI's completions works. Acceptance needs SGLang (reported with each answer) or vLLM
(counted in its /metrics, for all requests together: nobody else may use the server meanwhile).

What is measured: every prompt is answered greedily, with --concurrency requests in flight. "first token" is
the time from sending a request to its first token. "between" is the wait for each later piece of the answer,
divided by the tokens in it. "acceptance" counts as in tools/eval_acceptance.py: tokens gained per pass of the
target, without the token that reading the prompt gives. Each concurrency is warmed up first. Then the server
empties its cache of prompts, if it can: SGLang can, vLLM only with VLLM_SERVER_DEV_MODE=1.

--check-greedy counts the prompts whose answer differs from the one without speculation, and asks the server
how close the two tokens were. In bfloat16 near ties may differ: a gap of log-probabilities up to 0.25, two
spacings of bfloat16 logits between 16 and 32. It fails if a difference is no near tie.
--compare FILE prints served / measured acceptance length on the same prompts. It fails beyond 3%.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if TYPE_CHECKING:
    from eagle_ds.evaluation.serving_bench import Load
    from eagle_ds.evaluation.serving_client import Server

RESULT = "serving.json"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--url", required=True, help="address of the server, for example http://localhost:30000")
    add("--prompts", type=Path, required=True, help="JSONL of conversations")
    add("--baseline-url", help="address of a server of the target without speculation")
    add("--baseline", type=Path, metavar="FILE", help="serving.json of an earlier run without speculation")
    add("--concurrency", default="1,8,32", help="requests in flight, a list (default: %(default)s)")
    add("--max-new-tokens", type=int, default=128, help="longest answer (default: %(default)s)")
    count = "number of prompts, from the top of the file (default: %(default)s)"
    add("--num-prompts", type=int, default=64, help=count)
    add("--max-prompt-tokens", type=int, help="skip longer prompts (default: refuse those that do not fit)")
    turn = "which answer of a conversation to decode (default: %(default)s)"
    add("--turn", choices=["first", "last"], default="last", help=turn)
    add("--target", help="Hugging Face id or folder for the tokenizer (default: what the server serves)")
    add("--check-greedy", action="store_true", help="compare the answers with those without speculation")
    add("--compare", type=Path, metavar="FILE", help="acceptance.json of the same prompts")
    add("--compare-draft", metavar="NAME", help="draft in that file (default: its last)")
    key = "environment variable that holds the server's key (default: %(default)s)"
    add("--api-key-variable", default="OPENAI_API_KEY", help=key)
    out = "folder for serving.json and serving.png (default: %(default)s)"
    add("--out", type=Path, default=Path("serving"), help=out)
    return parser.parse_args()


def main() -> int:
    args = parse()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        return run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def run(args: argparse.Namespace) -> int:
    from eagle_ds.config.outputs import check_output_folder
    from eagle_ds.config.settings import check_positive, read_json
    from eagle_ds.evaluation.serving_agreement import check_comparable
    from eagle_ds.evaluation.serving_client import connect
    from eagle_ds.launch import enter_repository

    enter_repository(args, models=("target",))
    check_output_folder(args.out, "--out")
    concurrencies = concurrencies_of(args.concurrency)
    check_positive(args, "max_new_tokens", "num_prompts", "max_prompt_tokens")
    if args.check_greedy and not (args.baseline or args.baseline_url):
        missing = "--check-greedy needs answers without speculation"
        raise ValueError(f"{missing}; give --baseline-url or --baseline")
    if args.baseline and args.baseline_url:
        raise ValueError("--baseline and --baseline-url are two baselines; give one of them")
    measured = read_json(args.compare) if args.compare else None
    key = os.environ.get(args.api_key_variable)
    server = connect(args.url, key)
    plain = connect(args.baseline_url, key) if args.baseline_url else None
    if plain and plain.info.num_draft_tokens:
        raise ValueError(f"--baseline-url {args.baseline_url} uses speculation; serve the target alone there")
    load, context = describe_load(args, server)
    for one in filter(None, (server, plain)):
        load.check(one, context, concurrencies)
    result = describe(args, server, load)
    if args.baseline:
        take_baseline(result, read_json(args.baseline), args.baseline, concurrencies)
    if measured is not None:
        check_comparable(measured, result, args.compare_draft)
    args.out.mkdir(parents=True, exist_ok=True)
    if plain:
        result["baseline"] = asdict(plain.info)
        measure(plain, load, concurrencies, result, "baseline_levels", args.out)
    measure(server, load, concurrencies, result, "levels", args.out)
    write(result, args.out)
    good = True
    if args.check_greedy:
        good &= check_greedy(server, load, result)
    if measured is not None:
        good &= compare(measured, result, args)
    write_json(result, args.out)
    return 0 if good else 1


def concurrencies_of(text: str) -> list[int]:
    """Return the numbers of a list such as 1,8,32 in ascending order."""
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = []
    if not found or found[0] < 1:
        raise ValueError(f"--concurrency {text} is no list of numbers from 1 up; write for example 1,8,32")
    return found


def describe_load(args: argparse.Namespace, server: Server) -> tuple[Load, int]:
    """Return the prompts as token ids of the target's tokenizer, and the target's own context length."""
    from eagle_ds.evaluation.acceptance import TargetFiles, load_prompts
    from eagle_ds.evaluation.serving_bench import Load

    try:
        files = TargetFiles.open(args.target or server.info.model, weights=False)
    except ValueError as error:
        if args.target:
            raise
        raise ValueError(f"the tokenizer of the served model is not here: {error}; give --target") from error
    check_tokenizer(files.folder, args.target, server)
    limit = args.max_prompt_tokens or sys.maxsize
    found = load_prompts(args.prompts, files.encoder, args.num_prompts, limit, args.turn)
    if found.too_long or found.unusable:
        print(f"skipped {found.too_long} longer prompts and {found.unusable} with nothing to answer")
    load = Load(found.prompts, args.max_new_tokens, sorted(files.stop_ids))
    return load, files.info.max_position_embeddings


def check_tokenizer(folder: Path, target: str | None, server: Server) -> None:
    """Raise ValueError if the tokenizer of --target is not the served model's; say so if it is not here."""
    from eagle_ds.target.identity import tokenizer_hash

    served = Path(server.info.model)
    if target in (None, server.info.model):
        return
    if not served.is_dir():
        print(f"note: {served}, which the server names, is not here; --target's tokenizer is not checked")
    elif tokenizer_hash(served) != tokenizer_hash(folder):
        wrong = f"--target {target} has another tokenizer or chat template than {served}, which is served"
        raise ValueError(f"{wrong}; leave --target out, or give the served target")


def describe(args: argparse.Namespace, server: Server, load: Load) -> dict[str, Any]:
    """Return serving.json without figures."""
    return {
        "schema": 1,
        "server": asdict(server.info),
        "baseline": None,
        "prompts_file": str(args.prompts),
        "num_prompts": len(load.prompts),
        "max_new_tokens": args.max_new_tokens,
        "measured_at": time.strftime("%Y-%m-%d %H:%M:%S"),
        "prompts": [{"id": one.id, "prompt_tokens": len(one.ids)} for one in load.prompts],
        "levels": [],
        "baseline_levels": [],
    }


def take_baseline(
    result: dict[str, Any], earlier: dict[str, Any], path: Path, concurrencies: list[int]
) -> None:
    """Put the levels of an earlier run into ``result``. Raises ValueError if its requests were others."""
    if "levels" not in earlier or "server" not in earlier:
        raise ValueError(f"--baseline {path} is no {RESULT} of this tool; give the file of an earlier run")
    known = {level["concurrency"] for level in earlier["levels"]}
    if missing := sorted(set(concurrencies) - known):
        wrong = f"--baseline {path} was not measured at concurrency {', '.join(map(str, missing))}"
        raise ValueError(f"{wrong}; measure both with the same --concurrency")
    for name in ("prompts", "max_new_tokens"):
        if earlier.get(name) != result[name]:
            raise ValueError(f"--baseline {path} has other {name}; measure both with the same options")
    if earlier["server"]["num_draft_tokens"]:
        raise ValueError(f"--baseline {path} was measured with speculation; serve the target alone for it")
    result["baseline"] = earlier["server"]
    result["baseline_levels"] = earlier["levels"]


def measure(
    server: Server, load: Load, concurrencies: list[int], result: dict[str, Any], name: str, out: Path
) -> None:
    """Measure every concurrency; write what is known after each of them."""
    from tqdm import tqdm

    from eagle_ds.evaluation.serving_bench import run_level

    total = len(load.prompts) * load.max_new_tokens
    for concurrency in concurrencies:
        with tqdm(total=total, unit="token", desc=f"{server.info.url}, {concurrency} at once") as bar:
            level = run_level(server, load, concurrency, bar.update)
        result[name].append(level.summary())
        write_json(result, out)
    if not all(level["cache_emptied"] for level in result[name]):
        advice = "; start it with VLLM_SERVER_DEV_MODE=1" if server.info.engine == "vllm" else ""
        text = f"cannot empty its cache of prompts, so first tokens may come too early{advice}"
        print(f"warning: {server.info.url} {text}", file=sys.stderr)
    if not all(level["tokens_counted"] for level in result[name]):
        text = "does not report the tokens of each piece of an answer; they are taken as equal"
        print(f"warning: {server.info.url} {text}", file=sys.stderr)


def check_greedy(server: Server, load: Load, result: dict[str, Any]) -> bool:
    """Count answers that differ from those without speculation; return whether all are near ties."""
    from eagle_ds.evaluation.serving_agreement import NEAR_TIE, greedy_differences, logit_spacing

    plain = {level["concurrency"]: level for level in result["baseline_levels"]}
    result["greedy"], good = [], True
    for level in result["levels"]:
        found = greedy_differences(server, load.prompts, level, plain[level["concurrency"]])
        ties = sum(one.near_tie for one in found)
        good &= ties == len(found)
        result["greedy"] += [asdict(one) | {"near_tie": one.near_tie} for one in found]
        count = f"{len(found)} of {len(load.prompts)} answers differ from those without speculation"
        print(f"{level['concurrency']} at once: {count}, {ties} at a near tie (gap up to {NEAR_TIE})")
        if spacing := logit_spacing(found):
            print(f"  all gaps are multiples of {spacing}, so logits are spaced by {spacing} or less")
        for one in found:
            if not one.near_tie:
                gap = "unknown" if one.gap is None else f"{one.gap:.4f}"
                tokens = f"token {one.position} is {one.token}, not {one.plain_token}"
                print(f"  {one.prompt}: {tokens}; gap {gap}")
    return good


def compare(measured: dict[str, Any], result: dict[str, Any], args: argparse.Namespace) -> bool:
    """Print how the served acceptance length agrees with the measured one; return whether it does."""
    from eagle_ds.evaluation.serving_agreement import TOLERANCE, compare_with

    found = compare_with(measured, result, args.compare_draft)
    result["agreement"] = asdict(found) | {"ratio": found.ratio, "agrees": found.agrees}
    verdict = "agrees" if found.agrees else "DIFFERS"
    lengths = f"served {found.served:.3f}, {args.compare.name} ({found.draft}) {found.measured:.3f}"
    print(
        f"acceptance length on {found.prompts} prompts: {lengths}, ratio {found.ratio:.3f}: {verdict} "
        f"within {100 * TOLERANCE:.0f}%"
    )
    return found.agrees


def write_json(result: dict[str, Any], out: Path) -> None:
    """Write serving.json, whole or not at all."""
    temp = out / f".{RESULT}"
    temp.write_text(json.dumps(result) + "\n", encoding="utf-8")
    temp.replace(out / RESULT)


def write(result: dict[str, Any], out: Path) -> None:
    """Write serving.json and serving.png, and print the table."""
    from eagle_ds.reporting.serving import serving_figure, serving_table

    write_json(result, out)
    (out / "serving.png").write_bytes(serving_figure(result))
    server = result["server"]
    drafted = server["num_draft_tokens"]
    speculation = "speculation unknown" if drafted is None else f"{drafted} draft tokens per pass"
    print(f"\n{server['engine']} {server['version']} at {server['url']}, {speculation}")
    print(serving_table(result))
    print(f"wrote {out / RESULT} and {out / 'serving.png'}")


if __name__ == "__main__":
    sys.exit(main())
