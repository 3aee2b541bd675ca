#!/usr/bin/env python3
"""Export a trained draft to a folder that SGLang and vLLM can serve.

    tools/export_draft.py runs/smollm2_cpu                      # its best checkpoint -> .../draft
    tools/export_draft.py runs/llama3_128k/checkpoints/step_2000 --out drafts/llama3-128k
    tools/export_draft.py runs/ours --vllm                      # only for vLLM -> runs/ours/draft-vllm

Writes model.safetensors, config.json, and a README.md with the commands that serve the draft. SGLang and vLLM
load the same folder. --vllm is for drafts that only vLLM can serve, such as those with attention biases; an
export without it names the reason. Needs neither DeepSpeed nor a GPU. The export is verified before the
folder gets its final name: an independent reader computes the draft's logits from the files and compares them
with the training model's. An earlier export at this path is replaced. No tokenizer is written, because
engines use the target's.

To train such a folder further, set "draft": {"init_from": "FOLDER"} in a recipe; published EAGLE-3 drafts
work as well.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "draft",
        type=Path,
        help="run folder (its best, else newest checkpoint), a checkpoint, or an exported draft",
    )
    parser.add_argument(
        "--out", type=Path, help="folder to write (default: draft or draft-vllm in the run folder)"
    )
    parser.add_argument(
        "--vllm",
        action="store_true",
        help="export a draft that SGLang cannot serve; SGLang refuses the folder, vLLM loads it",
    )
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        choices=["bfloat16", "float16", "float32"],
        help="type of the weights (default: %(default)s)",
    )
    parser.add_argument("--target", help="Hugging Face id or folder of the target (default: the run's)")
    parser.add_argument(
        "--aux-layer-ids",
        type=int,
        nargs="+",
        metavar="ID",
        help="target layers that the draft reads, from 0 (default: the run's)",
    )
    parser.add_argument(
        "--num-steps",
        type=int,
        default=3,
        help="draft tokens per pass in the README's commands (default: %(default)s)",
    )
    return parser.parse_args()


def main() -> int:
    args = parse()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        print(run(args))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run(args: argparse.Namespace) -> Path:
    from eagle_ds.config.outputs import check_output_folder
    from eagle_ds.config.run_folder import EXPORTED, EXPORTED_VLLM
    from eagle_ds.drafts.export import ExportSettings, export_draft
    from eagle_ds.drafts.loading import load_draft, recipe_of, run_of
    from eagle_ds.launch import enter_repository
    from eagle_ds.target.files import resolve_target
    from eagle_ds.target.identity import tokenizer_hash
    from eagle_ds.target.info import TargetInfo

    enter_repository(args)
    if args.out:
        check_output_folder(args.out, "--out")
    draft = load_draft(args.draft)
    recipe = recipe_of(draft.folder)
    target = args.target or (recipe.target.model if recipe else None)
    layers = args.aux_layer_ids or draft.layer_outputs
    if target is None or layers is None:
        raise ValueError(
            f"{draft.folder} is in no run folder with a recipe.json; give --target and --aux-layer-ids"
        )
    run_dir = run_of(draft.folder)
    if args.out is None and run_dir is None:
        raise ValueError(f"{draft.folder} is in no run folder; give --out")
    info = tokenizer = None
    try:
        folder = resolve_target(target, recipe.target.revision if recipe else None, weights=False)
        info, tokenizer = TargetInfo.from_folder(folder), tokenizer_hash(folder)
    except ValueError as error:
        if args.target:
            raise
        logging.getLogger(__name__).warning(
            "%s; the export lacks its token ids and its context length, and its sizes are not checked", error
        )
    out = args.out or run_dir / (EXPORTED_VLLM if args.vllm else EXPORTED)
    settings = ExportSettings(target, layers, info, args.dtype, args.vllm, args.num_steps, tokenizer)
    return export_draft(draft, out, settings)


if __name__ == "__main__":
    sys.exit(main())
