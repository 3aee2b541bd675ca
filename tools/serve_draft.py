#!/usr/bin/env python3
"""Serve a trained draft together with its target, by SGLang or vLLM.

    tools/serve_draft.py runs/smollm2_cpu                          # SGLang at http://127.0.0.1:30000
    tools/serve_draft.py runs/smollm2_cpu --print                  # only print both engines' commands
    tools/serve_draft.py runs/smollm2_cpu --engine vllm --port 8000
    tools/serve_draft.py drafts/llama3 --target meta-llama/Llama-3.1-8B-Instruct -- --tp 4
    tools/serve_draft.py runs/smollm2_cpu --plain                  # the target alone, for comparison

What it does: it finds the exported draft (tools/export_draft.py writes it), checks what would fail later or
would be served wrongly, prints the engine's command, runs it, and waits until the server answers. Ctrl-C or
SIGTERM stops the server. If the server dies, its last lines are shown and the exit code is 1.

Checked first: draft and target have the same sizes, vocabulary, tokenizer and captured layers; the engine is
installed in a version that was tested; the port is free.

The engine may have its own environment: --python FILE names its interpreter. Everything after -- is passed to
the engine as it is. tools/bench_serving.py measures the running server.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if TYPE_CHECKING:
    from eagle_ds.evaluation.engine import ServedPair

PORTS = {"sglang": 30000, "vllm": 8000}  # the engines' own defaults


def parse() -> argparse.Namespace:
    given = sys.argv[1:]
    end = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("draft", type=Path, help="run folder, or the folder of an exported draft")
    add("--engine", choices=["sglang", "vllm"], default="sglang", help="default: %(default)s")
    add("--print", action="store_true", dest="only_print", help="print both engines' commands and exit")
    add("--plain", action="store_true", help="serve the target without the draft")
    add("--target", help="Hugging Face id or folder of the target (default: the run's)")
    add("--num-steps", type=int, default=3, help="draft tokens per pass (default: %(default)s)")
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add("--port", type=int, help="port to listen on (default: 30000 for SGLang, 8000 for vLLM)")
    python = "interpreter of the environment that has the engine (default: this one)"
    add("--python", default=sys.executable, help=python)
    add("--any-version", action="store_true", help="start an engine of a version that was not tested")
    add("--wait", type=float, default=1800, help="seconds to wait for the server (default: %(default)s)")
    log = "file for the server's output (default: serve_PORT.log in the draft's run, else here)"
    add("--log", type=Path, help=log)
    args, unknown = parser.parse_known_args(given[:end])
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}; write flags of the engine after --")
    args.others = given[end + 1 :]
    args.port = PORTS[args.engine] if args.port is None else args.port
    return args


def main() -> int:
    from eagle_ds.evaluation.server_process import ServerDied

    args = parse()
    try:
        return run(args)
    except (ValueError, OSError, ServerDied) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def run(args: argparse.Namespace) -> int:
    from eagle_ds.config.outputs import check_output_file
    from eagle_ds.config.settings import check_positive
    from eagle_ds.drafts.loading import run_of
    from eagle_ds.evaluation.engine import ServedPair, check_engine, check_port, program
    from eagle_ds.launch import enter_repository

    here = Path.cwd()
    enter_repository(args, models=("target", "python"))
    check_positive(args, "num_steps")
    pair = ServedPair.open(args.draft, args.engine, args.target, args.num_steps)
    if not args.plain:
        warn(pair)
    if args.only_print:
        print_commands(pair, args)
        return 0
    check_port(args.host, args.port)
    version = check_engine(args.engine, args.python, args.any_version)
    command = pair.arguments(args.engine, args.host, args.port, not args.plain, args.others)
    runnable = program(command, args.python)
    log = args.log or (run_of(pair.draft.folder) or here) / f"serve_{args.port}.log"
    check_output_file(log, "--log")
    print(f"{args.engine} {version}, log in {log}\n{text_of(command)}", flush=True)
    return serve(runnable, args, log)


def warn(pair: ServedPair) -> None:
    """Print what is no error, but surprises."""
    if newer := pair.outdated():
        text = f"{newer} is newer than the export {pair.draft.folder}; export again to serve it"
        print(f"warning: {text}", file=sys.stderr)
    trained = pair.draft.arch.trained_length
    context = pair.commands.context_length or pair.info.longest_context
    if context > trained and not pair.draft.arch.sliding_window:
        text = f"the draft was trained on up to {trained} tokens and is served up to {context}"
        print(f"note: {text}; expect a lower acceptance length beyond {trained}", file=sys.stderr)


def text_of(command: list[str]) -> str:
    """Return a command as a shell reads it, one flag a line."""
    lines: list[list[str]] = [[]]
    for argument in command:
        if argument.startswith("--"):
            lines.append([])
        lines[-1].append(shlex.quote(argument))
    return " \\\n  ".join(" ".join(line) for line in lines)


def print_commands(pair: ServedPair, args: argparse.Namespace) -> None:
    """Print the commands of both engines. Flags after -- belong to --engine only."""
    for engine, default in PORTS.items():
        chosen = engine == args.engine
        port, others = (args.port, args.others) if chosen else (default, ())
        obstacle = pair.obstacle(engine)
        command = pair.arguments(engine, args.host, port, not args.plain, others)
        print(f"{engine}: {obstacle}\n" if obstacle else f"{engine}:\n{text_of(command)}\n")


def serve(command: list[str], args: argparse.Namespace, log: Path) -> int:
    """Run the server until it is stopped; return the exit code. Raises ServerDied if it ends by itself."""
    from eagle_ds.evaluation.server_process import ServerProcess, health_url

    with ServerProcess.running(command, log) as server:
        health = health_url(args.host, args.port)
        seconds = server.wait_until_ready(health, args.wait, lambda line: print(line, flush=True))
        if seconds is not None:
            address = health.removesuffix("/health")
            print(f"ready after {seconds:.0f} s at {address}; stop with Ctrl-C", flush=True)
        code = server.wait()
    print("stopped")
    return code


if __name__ == "__main__":
    sys.exit(main())
