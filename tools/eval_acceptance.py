#!/usr/bin/env python3
"""Measure the acceptance length of a draft by real speculative decoding on its target.

    tools/eval_acceptance.py --recipe recipes/smollm2_cpu.json --baseline untrained --num-prompts 12 --processes 2
    tools/eval_acceptance.py --target meta-llama/Llama-3.1-8B-Instruct --draft drafts/new --baseline drafts/published \\
        --prompts chats.eval.jsonl --num-prompts 64 --max-new-tokens 256 --num-draft-tokens 5 --dtype bfloat16

Every prompt is answered greedily three ways: by the target alone, with the baseline, with the draft. The draft proposes a
chain of tokens, the target checks them in one pass, both keep KV caches. Acceptance length is tokens per pass of the target,
its own token included: 1.0 is no gain; its bootstrap interval is over prompts, and two drafts are compared prompt by prompt.

In float32 every answer is the target's own, token for token. In bfloat16 a pass over six tokens rounds differently from six
passes, so near ties may fall the other way: such answers are counted, with the gap between the two logits.

Writes acceptance.json and acceptance.png into the run folder (or --out). Speed here is transformers' own, with no kernels
fused and one prompt at a time: acceptance length carries over to a serving engine, tokens/s do not.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if TYPE_CHECKING:
    from eagle_ds.config.recipe import Recipe
    from eagle_ds.drafts.folder import DraftOnDisk
    from eagle_ds.evaluation.acceptance import Measurement
    from eagle_ds.evaluation.decoding_pool import DecodingJob


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--recipe", type=Path, help="recipe JSON: gives target, draft (its run's best checkpoint), prompts and layers")
    add("--target", help="Hugging Face id or folder (default: the recipe's)")
    add("--draft", type=Path, help="exported or published draft, checkpoint, or run folder (default: the recipe's run)")
    add("--baseline", default="none", help="'untrained' (where its training started), another draft's folder, or 'none' (default)")
    add("--prompts", type=Path, help="JSONL of held-out conversations (default: the recipe's eval_conversations)")
    add("--num-prompts", type=int, default=16, help="how many of them, from the top of the file (default: %(default)s)")
    add("--max-prompt-tokens", type=int, help="pass over longer prompts (default: what the target has room for)")
    add("--turn", choices=["first", "last"], default="last", help="which answer of a conversation to decode (default: %(default)s)")
    add("--max-new-tokens", type=int, default=64, help="longest answer (default: %(default)s)")
    add("--num-draft-tokens", type=int, help="tokens the draft proposes per pass (default: the recipe's ttt_steps, else 5)")
    add("--aux-layer-ids", type=int, nargs="+", metavar="ID", help="target layers it reads (default: as the draft or recipe says)")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="of both models (default: float32 on CPU, else the recipe's)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, or split: the target over all GPUs (default: a GPU if there is one)")
    add("--processes", type=int, default=1, help="on a CPU: processes with a copy of the target each, which share the cores (default: 1)")
    add("--out", type=Path, help="folder for acceptance.json and .png (default: the run folder)")
    return parser.parse_args()


def main() -> int:
    args = parse()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run(args: argparse.Namespace) -> None:
    from eagle_ds.config.outputs import check_output_folder
    from eagle_ds.config.recipe import load_recipe
    from eagle_ds.drafts.folder import load_draft, recipe_of, run_of
    from eagle_ds.launch import enter_repository

    enter_repository(args)
    if args.out:
        check_output_folder(args.out, "--out")
    recipe = load_recipe(args.recipe) if args.recipe else None
    if args.draft is None and recipe is None:
        raise ValueError("no draft is named; give --draft FOLDER, or --recipe to take its run's best checkpoint")
    draft = load_draft(args.draft or recipe.run_dir)
    baseline = load_draft(args.baseline) if args.baseline not in ("none", "untrained") else None
    recipe = recipe or recipe_of(draft.folder)
    out = args.out or run_of(draft.folder) or (recipe.run_dir if recipe else None)
    if out is None:
        raise ValueError(f"{draft.folder} lies in no run folder; give --out for acceptance.json and acceptance.png")
    job = describe_job(args, recipe, draft, baseline)
    measured, info = measure_drafts(args, recipe, job)
    info |= {"draft": str(draft.folder), "baseline": args.baseline}
    write(measured, info, out)


def describe_job(args: argparse.Namespace, recipe: Recipe | None, draft: DraftOnDisk, baseline: DraftOnDisk | None) -> DecodingJob:
    """Target, drafts and settings asked for; only the target's small files are read."""
    import torch

    from eagle_ds.evaluation.acceptance import TargetFiles
    from eagle_ds.evaluation.decoding import DecodeSettings
    from eagle_ds.evaluation.decoding_pool import DecodingJob
    from eagle_ds.target.info import check_aux_ids

    model = args.target or (recipe.target.model if recipe else None)
    layers = args.aux_layer_ids or draft.layer_outputs or (recipe.target.aux_ids if recipe else None)
    if model is None:
        raise ValueError("no target is named; give --target, or --recipe")
    if layers is None:
        raise ValueError(f"{draft.folder} does not say which target layers it reads; give --aux-layer-ids")
    on_cpu = args.device == "cpu" or (args.device == "auto" and not torch.cuda.is_available())
    if args.processes > 1 and not on_cpu:
        raise ValueError(f"--processes {args.processes} shares out the cores of a CPU; leave it out on a GPU, or add --device cpu")
    dtype = args.dtype or ("float32" if on_cpu else recipe.target.dtype if recipe else "bfloat16")
    files = TargetFiles.open(model, recipe.target.revision if recipe and not args.target else None)
    check_aux_ids(layers, files.info.num_layers)
    untrained = args.baseline == "untrained"
    baseline = starting_point(draft, recipe) if untrained else baseline
    drafts = ({"untrained" if untrained else "baseline": baseline} if baseline else {}) | {"trained" if untrained else "draft": draft}
    steps = args.num_draft_tokens or (recipe.training.ttt_steps if recipe else 5)
    return DecodingJob(files, tuple(layers), dtype, args.device, drafts, DecodeSettings(args.max_new_tokens, steps, files.stop_ids))


def measure_drafts(args: argparse.Namespace, recipe: Recipe | None, job: DecodingJob) -> tuple[Measurement, dict[str, Any]]:
    """(answers, what they were measured on), under a progress bar."""
    import torch
    from tqdm import tqdm

    from eagle_ds.evaluation.acceptance import load_prompts
    from eagle_ds.evaluation.decoding_pool import measure_job

    path = args.prompts or (recipe.data.eval_conversations if recipe else None)
    if path is None:
        raise ValueError("no prompts are named; give --prompts, or a recipe with data.eval_conversations")
    room = job.target.info.max_position_embeddings - args.max_new_tokens
    found = load_prompts(path, job.target.encoder, args.num_prompts, min(args.max_prompt_tokens or room, room), args.turn)
    total = len(found.prompts) * args.max_new_tokens * (1 + len(job.drafts))
    with tqdm(total=total, unit="token", smoothing=0.05, desc="decoding") as bar:
        measured = measure_job(job, found.prompts, args.processes, bar.update)
    info = {
        "target": args.target or recipe.target.model,
        "dtype": job.dtype,
        "device": ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device,
        "processes": args.processes,
        "prompts_file": str(path),
        "passed_over": {"too_long": found.too_long, "unusable": found.unusable},
        "measured_at": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    return measured, info


def starting_point(draft: DraftOnDisk, recipe: Recipe | None) -> DraftOnDisk:
    """What ``draft`` was before training: the folder that its recipe names, else random weights of its sizes."""
    from eagle_ds.drafts.folder import initial_draft, untrained_draft

    if recipe and recipe.draft.init_from:
        return initial_draft(recipe)
    return untrained_draft(draft.arch, draft.vocab, recipe.training.seed if recipe else 0)


def write(measured: Measurement, info: dict[str, Any], out: Path) -> None:
    """acceptance.json, acceptance.png, and a table on the terminal."""
    from eagle_ds.config.run_folder import ACCEPTANCE
    from eagle_ds.reporting.figures import acceptance_figure

    result = {"schema": 1, **info, **measured.summary()}
    out.mkdir(parents=True, exist_ok=True)
    temp = out / f".{ACCEPTANCE}"
    temp.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    temp.replace(out / ACCEPTANCE)
    (out / "acceptance.png").write_bytes(acceptance_figure(result))
    show(result)
    print(f"wrote {out / ACCEPTANCE} and {out / 'acceptance.png'}")


def show(result: dict[str, Any]) -> None:
    """The figures in a few lines."""
    where = f"{result['dtype']} on {result['device']}" + (f", {result['processes']} processes" if result["processes"] > 1 else "")
    print(f"\n{result['num_prompts']} prompts, {result['num_draft_tokens']} draft tokens per pass, {where}")
    print(f"  plain decoding        {result['plain']['tokens_per_s']:.1f} tokens/s")
    for draft in result["drafts"]:
        interval = draft["interval"]
        by_position = " ".join(f"{100 * a:.0f}" for a in draft["acceptance_by_position"])
        print(
            f"  {draft['name']:<20}  acceptance length {draft['acceptance_length']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]  "
            f"by position {by_position} %  {draft['tokens_per_s']:.1f} tokens/s ({draft['speedup']:.2f}x)  "
            f"{draft['identical_answers']} of {result['num_prompts']} answers as plain decoding's"
        )
        for gone in draft["divergences"]:
            gap, margin = gone["gap"], gone["plain_margin"]
            print(f"    {gone['prompt']}: token {gone['position']} differs, logit gap {gap:.4f} (plain decoding's margin {margin:.4f})")
    for gain in result["differences"]:
        print(
            f"  {gain['draft']} over {gain['baseline']}: {gain['value']:+.3f}, "
            f"{100 * gain['level']:.0f}% paired bootstrap interval [{gain['low']:+.3f}, {gain['high']:+.3f}]"
        )


if __name__ == "__main__":
    sys.exit(main())
