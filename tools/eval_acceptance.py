#!/usr/bin/env python3
"""Measure the acceptance length of a draft by real speculative decoding on its target.

    tools/eval_acceptance.py --recipe recipes/smollm2_cpu.json --baseline untrained --processes 2
    tools/eval_acceptance.py --target meta-llama/Llama-3.1-8B-Instruct --draft drafts/new \\
        --baseline drafts/published --prompts chats.eval.jsonl --num-prompts 64 --dtype bfloat16

How: every prompt is answered greedily by the target alone, with the baseline, and with the draft. The draft
proposes a chain of tokens, and the target verifies them in one pass. Both have KV caches.

How to read the result: acceptance length is the number of tokens per pass of the target, including its own
token; 1.0 means no gain. Its interval is bootstrapped over prompts. Two drafts are compared prompt by prompt.

In float32 every answer equals the target's own, token by token. In bfloat16, one pass over six tokens rounds
differently from six passes, so the answers may differ at a near tie. Such answers are counted, with the gap
between the two logits.

Writes acceptance.json and acceptance.png into the run folder (or --out), and rejected_conversations.jsonl if
some conversations before the last prompt cannot be used. Acceptance length carries over to a
serving engine; tools/bench_serving.py --compare acceptance.json measures how well. Speed does not: it is that
of transformers, without fused kernels. Every way of decoding is warmed up before it is timed, so that the
order of the drafts does not matter. On a GPU this has not been measured yet; compare speeds there by separate
calls. --batch N decodes N prompts together, which is faster and gives the same answers.
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
    from eagle_ds.data.conversations import Intake
    from eagle_ds.drafts.loading import DraftOnDisk
    from eagle_ds.evaluation.acceptance import Measurement
    from eagle_ds.evaluation.decoding_pool import DecodingJob


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--recipe", type=Path, help="recipe JSON: target, draft (best of its run), prompts and layers")
    add("--target", help="Hugging Face id or folder (default: the recipe's)")
    add(
        "--draft", type=Path,
        help="exported or published draft, checkpoint, or run folder (default: the recipe's run)"
    )
    add(
        "--baseline", default="none",
        help="'untrained' (the draft before training), a draft's folder, or 'none'"
    )
    add(
        "--prompts", type=Path,
        help="file of held-out conversations, or the id of a data set on the hub (default: the recipe's "
        "eval_conversations)"
    )
    add(
        "--num-prompts", type=int, default=16,
        help="number of prompts, from the top of the file (default: %(default)s)"
    )
    add(
        "--template-kwargs", metavar="JSON", help="variables of the chat template, such as "
        "'{\"enable_thinking\": false}' (default: the recipe's target.template_kwargs)"
    )
    add("--strict", action="store_true", help="stop at the first conversation that cannot be used")
    add("--max-prompt-tokens", type=int, help="skip longer prompts (default: the target's context)")
    add(
        "--turn", choices=["first", "last"], default="last",
        help="which answer to decode (default: %(default)s)"
    )
    add("--max-new-tokens", type=int, default=64, help="longest answer (default: %(default)s)")
    add(
        "--num-draft-tokens", type=int, help="draft tokens per pass (default: the recipe's ttt_steps, else 5)"
    )
    add(
        "--aux-layer-ids", type=int, nargs="+", metavar="ID",
        help="target layers to read (default: the draft's or recipe's)"
    )
    dtypes = ["float32", "bfloat16", "float16"]
    add("--dtype", choices=dtypes, help="dtype of both models (default: float32 on CPU, else the recipe's)")
    device = "cpu, cuda, cuda:1, or split (target layers over all GPUs); default: a GPU if there is one"
    add("--device", default="auto", help=device)
    processes = "on a CPU: number of processes; each has a copy of the target (default: 1)"
    add("--processes", type=int, default=1, help=processes)
    batch = "prompts decoded together; the answers are the same (default: %(default)s)"
    add("--batch", type=int, default=1, help=batch)
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
    from eagle_ds.config.recipe import load_own_recipe
    from eagle_ds.data.conversations import Intake
    from eagle_ds.drafts.loading import load_draft, recipe_of, run_of
    from eagle_ds.launch import enter_repository

    enter_repository(args)
    if args.out:
        check_output_folder(args.out, "--out")
    recipe = load_own_recipe(args.recipe) if args.recipe else None
    if args.draft is None and recipe is None:
        raise ValueError("no draft given; give --draft FOLDER, or --recipe to use its run's best checkpoint")
    draft = load_draft(args.draft or recipe.run_dir)
    baseline = load_draft(args.baseline) if args.baseline not in ("none", "untrained") else None
    recipe = recipe or recipe_of(draft.folder)
    out = args.out or run_of(draft.folder) or (recipe.run_dir if recipe else None)
    if out is None:
        raise ValueError(f"{draft.folder} is not in a run folder; give --out FOLDER for the results")
    job = describe_job(args, recipe, draft, baseline)
    intake = Intake(args.strict)
    measured, info = measure_drafts(args, recipe, job, intake)
    info |= {"draft": str(draft.folder), "baseline": args.baseline}
    write(measured, info, out, intake)


def describe_job(
    args: argparse.Namespace, recipe: Recipe | None, draft: DraftOnDisk, baseline: DraftOnDisk | None
) -> DecodingJob:
    """Return target, drafts and settings of this run. Reads only the target's small files."""
    import torch

    from eagle_ds.config.settings import json_object
    from eagle_ds.evaluation.acceptance import TargetFiles
    from eagle_ds.evaluation.decoding import DecodeSettings
    from eagle_ds.evaluation.decoding_pool import DecodingJob
    from eagle_ds.target.info import check_aux_ids

    model = args.target or (recipe.target.model if recipe else None)
    layers = args.aux_layer_ids or draft.layer_outputs or (recipe.target.aux_ids if recipe else None)
    if model is None:
        raise ValueError("no target given; give --target, or --recipe")
    if layers is None:
        raise ValueError(
            f"{draft.folder} does not name the target layers that it reads; give --aux-layer-ids"
        )
    on_cpu = args.device == "cpu" or (args.device == "auto" and not torch.cuda.is_available())
    if args.batch < 1 or args.processes < 1:
        raise ValueError(f"--batch {args.batch} and --processes {args.processes} must be 1 or more")
    if args.processes > 1 and not on_cpu:
        found = f"--processes {args.processes} shares the cores of a CPU"
        raise ValueError(f"{found}; leave it out on a GPU, or add --device cpu")
    dtype = args.dtype or ("float32" if on_cpu else recipe.target.dtype if recipe else "bfloat16")
    template_kwargs = recipe.target.template_kwargs if recipe and not args.template_kwargs else {}
    template_kwargs = template_kwargs or json_object(args.template_kwargs, "--template-kwargs")
    revision = recipe.target.revision if recipe and not args.target else None
    files = TargetFiles.open(model, revision, template_kwargs)
    check_aux_ids(layers, files.info.num_layers)
    untrained = args.baseline == "untrained"
    baseline = starting_point(draft, recipe) if untrained else baseline
    names = ("untrained", "trained") if untrained else ("baseline", "draft")
    drafts = ({names[0]: baseline} if baseline else {}) | {names[1]: draft}
    steps = args.num_draft_tokens or (recipe.training.ttt_steps if recipe else 5)
    settings = DecodeSettings(args.max_new_tokens, steps, files.stop_ids)
    return DecodingJob(files, tuple(layers), dtype, args.device, drafts, settings, args.batch)


def measure_drafts(
    args: argparse.Namespace, recipe: Recipe | None, job: DecodingJob, intake: Intake
) -> tuple[Measurement, dict[str, Any]]:
    """Decode all prompts under a progress bar; return the answers, and how they were measured.

    Conversations that cannot be used are noted in ``intake``.
    """
    import torch
    from tqdm import tqdm

    from eagle_ds.evaluation.acceptance import load_prompts
    from eagle_ds.evaluation.decoding_pool import measure_job

    path = args.prompts or (recipe.data.eval_conversations if recipe else None)
    if path is None:
        raise ValueError("no prompts given; give --prompts, or a recipe with data.eval_conversations")
    limit = job.target.info.max_position_embeddings - args.max_new_tokens
    longest = min(args.max_prompt_tokens or limit, limit)
    found = load_prompts(path, job.target.encoder, args.num_prompts, longest, args.turn, intake)
    total = len(found.prompts) * args.max_new_tokens * (1 + len(job.drafts))
    with tqdm(total=total, unit="token", smoothing=0.05, desc="decoding") as bar:
        measured = measure_job(job, found.prompts, args.processes, bar.update)
    trained = list(job.drafts.values())[-1].arch.trained_length
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    info = {
        "target": args.target or recipe.target.model,
        "dtype": job.dtype,
        "device": device,
        "processes": args.processes,
        "batch": args.batch,
        "prompts_file": str(path),
        "passed_over": {
            "too_long": found.too_long, "unusable": found.unusable, "rejected": dict(intake.reasons)},
        "template_kwargs": job.target.encoder.template.kwargs,
        "trained_length": trained,
        "beyond_trained_length": sum(len(p.ids) + args.max_new_tokens > trained for p in found.prompts),
        "measured_at": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    return measured, info


def starting_point(draft: DraftOnDisk, recipe: Recipe | None) -> DraftOnDisk:
    """Return the draft before training: the recipe's ``draft.init_from``, else random weights."""
    from eagle_ds.drafts.loading import initial_draft, untrained_draft

    if recipe and recipe.draft.init_from:
        return initial_draft(recipe)
    return untrained_draft(draft.arch, draft.vocab, recipe.training.seed if recipe else 0)


def write(measured: Measurement, info: dict[str, Any], out: Path, intake: Intake) -> None:
    """Write acceptance.json, acceptance.png and the list of rejected conversations; print the figures."""
    from eagle_ds.config.run_folder import ACCEPTANCE
    from eagle_ds.data.conversations import REJECTED_CONVERSATIONS
    from eagle_ds.reporting.figures import acceptance_figure

    result = {"schema": 1, **info, **measured.summary()}
    out.mkdir(parents=True, exist_ok=True)
    intake.write(out / REJECTED_CONVERSATIONS)
    temp = out / f".{ACCEPTANCE}"
    temp.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    temp.replace(out / ACCEPTANCE)
    (out / "acceptance.png").write_bytes(acceptance_figure(result))
    show(result)
    print(f"wrote {out / ACCEPTANCE} and {out / 'acceptance.png'}")


def show(result: dict[str, Any]) -> None:
    """Print the figures."""
    where = f"{result['dtype']} on {result['device']}"
    if result["processes"] > 1:
        where += f", {result['processes']} processes"
    if result["batch"] > 1:
        where += f", {result['batch']} prompts at a time"
    print(f"\n{result['num_prompts']} prompts, {result['num_draft_tokens']} draft tokens per pass, {where}")
    if beyond := result["beyond_trained_length"]:
        trained = result["trained_length"]
        print(f"  {beyond} of them reach beyond the draft's trained length, {trained} tokens")
    print(f"  plain decoding        {result['plain']['tokens_per_s']:.1f} tokens/s")
    for draft in result["drafts"]:
        interval = draft["interval"]
        by_position = " ".join(f"{100 * a:.0f}" for a in draft["acceptance_by_position"])
        length = f"{draft['acceptance_length']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"
        speed = f"{draft['tokens_per_s']:.1f} tokens/s ({draft['speedup']:.2f}x)"
        same = f"{draft['identical_answers']} of {result['num_prompts']} answers equal to plain decoding"
        print(
            f"  {draft['name']:<20}  acceptance length {length}  by position {by_position} %  {speed}  {same}"
        )
        for gone in draft["divergences"]:
            gap, margin = gone["gap"], gone["plain_margin"]
            gaps = f"logit gap {gap:.4f} (plain decoding's margin {margin:.4f}"
            gaps += f", spacing of logits there {gone['spacing']:.3g})"
            print(f"    {gone['prompt']}: token {gone['position']} differs, {gaps}")
    for gain in result["differences"]:
        print(
            f"  {gain['draft']} over {gain['baseline']}: {gain['value']:+.3f}, "
            f"{100 * gain['level']:.0f}% paired bootstrap interval [{gain['low']:+.3f}, {gain['high']:+.3f}]"
        )


if __name__ == "__main__":
    sys.exit(main())
