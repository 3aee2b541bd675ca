"""Random drafts of every variant, in memory and as a run folder, for tests of what happens after training."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from eagle_ds.config.recipe import Recipe
from eagle_ds.config.run_folder import RECIPE_FILE
from eagle_ds.config.sections import RopeScaling
from eagle_ds.data.vocab import VocabMap
from eagle_ds.drafts.export import ExportSettings, export_draft
from eagle_ds.drafts.loading import ARCH_FILE, STATE_FILE, VOCAB_FILE, DraftOnDisk
from eagle_ds.model.arch import DraftArch
from eagle_ds.model.draft import Eagle3Draft
from eagle_ds.target.info import TargetInfo

LAYERS = (1, 2, 5)
PLAIN = DraftArch(
    hidden_size=32,
    intermediate_size=40,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    draft_vocab_size=100,
    target_hidden_size=32,
    target_vocab_size=280,
    trained_length=4096,
    rope_theta=10000.0,
)
LLAMA3 = RopeScaling(
    rope_type="llama3", factor=8, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=256
)
YARN = RopeScaling(rope_type="yarn", factor=4, original_max_position_embeddings=1024)
VARIANTS = {
    "plain": {},
    "llama3 rope": {"rope_scaling": LLAMA3, "rope_theta": 500000.0},
    "yarn rope": {"rope_scaling": YARN},
    "yarn rope, attention factor given": {"rope_scaling": YARN.model_copy(update={"attention_factor": 1.3})},
    "yarn rope, mscale given": {
        "rope_scaling": YARN.model_copy(update={"mscale": 1.0, "mscale_all_dim": 0.5})
    },
    "linear rope": {"rope_scaling": RopeScaling(rope_type="linear", factor=4)},
    "own embedding": {"target_hidden_size": 48},
    "narrow heads": {"head_dim": 6, "num_attention_heads": 8, "num_key_value_heads": 1},
    "whole vocabulary": {"draft_vocab_size": 280},
    "sliding window": {"sliding_window": 5},
    "fc_norm": {"fc_norm": True},
    "norm_output": {"norm_output": True},
    "norm_before_fc": {"norm_before_fc": True},
    "another epsilon": {"rms_norm_eps": 1e-2},
    "four layers": {"num_aux": 4},
    "four layers, fc_norm": {"num_aux": 4, "fc_norm": True},
    "fc_norm and norm_output": {"fc_norm": True, "norm_output": True},
}
ONLY_VLLM = {  # variants that SGLang cannot serve
    "attention bias": {"attention_bias": True},
    "norm_before_residual": {"norm_before_residual": True},
    "norm_before_residual, norm_output": {"norm_before_residual": True, "norm_output": True},
    "qk_norm": {"qk_norm": True},
    "qk_norm, sliding window": {"qk_norm": True, "sliding_window": 5},
    "qk_norm, norm_before_residual": {"qk_norm": True, "norm_before_residual": True},
}


def variant(name: str) -> DraftArch:
    return dataclasses.replace(PLAIN, **(VARIANTS | ONLY_VLLM)[name])


def layers_of(arch: DraftArch) -> tuple[int, ...]:
    """Return target layers for a draft that reads three or four of them."""
    return (*LAYERS, 6)[: arch.num_aux]


def random_draft(
    arch: DraftArch = PLAIN, seed: int = 0, layers: tuple[int, ...] | None = ()
) -> DraftOnDisk:
    """Make a draft whose norms and biases are random too, so that every tensor changes the logits.

    ``layers``: by default those of ``layers_of``; None: the draft's files do not say.
    """
    layers = layers_of(arch) if layers == () else layers
    torch.manual_seed(seed)
    model = Eagle3Draft(arch)
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
    state = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    if arch.draft_vocab_size == arch.target_vocab_size:
        vocab = VocabMap.identity(arch.target_vocab_size)
    else:
        vocab = VocabMap.from_target_ids(
            torch.randperm(arch.target_vocab_size)[: arch.draft_vocab_size], arch.target_vocab_size
        )
    return DraftOnDisk(state, arch, vocab, Path("random"), layers)


def recipe_for(arch: DraftArch, root: Path, target: str = "org/target", **draft: object) -> Recipe:
    """Make a recipe of this architecture with the run folder ``root``/run."""
    sizes = (
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "rope_theta",
    )
    flags = ("rope_scaling", "sliding_window", "attention_bias", "fc_norm", "norm_output", "norm_before_fc")
    flags += ("norm_before_residual", "qk_norm")
    return Recipe.model_validate(
        {
            "name": "run",
            "target": {
                "model": target,
                "dtype": "float32",
                "hidden_size": arch.target_hidden_size,
                "num_layers": 8,
                "vocab_size": arch.target_vocab_size,
                "aux_layer_ids": layers_of(arch),
            },
            "draft": {name: getattr(arch, name) for name in (*sizes, *flags)}
            | {"vocab_size": arch.draft_vocab_size}
            | draft,
            "data": {"store": str(root / "store"), "max_length": arch.trained_length},
            "deepspeed": str(root / "ds.json"),
            "output_dir": str(root / "run"),
        }
    )


def write_run(root: Path, draft: DraftOnDisk, recipe: Recipe, name: str = "best") -> Path:
    """Write a run folder with one checkpoint, as the trainer does. Returns the checkpoint."""
    folder = root / "run" / name
    folder.mkdir(parents=True, exist_ok=True)
    save_file(draft.state, folder / STATE_FILE)
    tree = dataclasses.asdict(draft.arch) | {
        "rope_scaling": draft.arch.rope_scaling and draft.arch.rope_scaling.model_dump()
    }
    (folder / ARCH_FILE).write_text(json.dumps(tree))
    draft.vocab.save(folder / VOCAB_FILE)
    (root / "run" / RECIPE_FILE).write_text(recipe.model_dump_json())
    return folder


SETTINGS = ExportSettings("org/target", LAYERS)


def exported(folder: Path, draft: DraftOnDisk | None = None, **settings: Any) -> Path:
    draft = draft or random_draft()
    made = dataclasses.replace(SETTINGS, **{"layers": layers_of(draft.arch)} | settings)
    return export_draft(draft, folder / "draft", made)


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def edit_config(folder: Path, **changes: Any) -> None:
    config = {key: value for key, value in (config_of(folder) | changes).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def target_info(**changes: Any) -> TargetInfo:
    config = {
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 8,
        "vocab_size": 280,
        "num_attention_heads": 4,
    }
    config["eos_token_id"] = [1, 2]
    return dataclasses.replace(TargetInfo._from_config(config), **changes)
