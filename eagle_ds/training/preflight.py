"""Checks before any process group exists: layout, DeepSpeed JSON, stores, the draft to start from.

Reads small JSON files only and imports no torch, so a mistake is reported within a second and before GPUs are
taken. Every error says what to change.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eagle_ds.config.deepspeed import deepspeed_config, read_ds_json
from eagle_ds.config.recipe import Recipe, capture_command, data_parallel_size
from eagle_ds.config.run_folder import find_draft
from eagle_ds.store.manifest import STORE_JSON, StoreInfo, read_store_info


def check_layout(recipe: Recipe, world_size: int) -> None:
    """Raise ValueError unless layout, ``world_size`` and DeepSpeed JSON agree."""
    data_parallel_size(recipe, world_size)
    deepspeed_config(recipe, read_ds_json(recipe.deepspeed), world_size)


def check_files(recipe: Recipe, recipe_json: Path, overrides: Sequence[str] = ()) -> None:
    """Raise ValueError if a store is missing or of other settings, or if the initial draft is missing."""
    command = capture_command(recipe_json, overrides)
    stores = [recipe.data.store]
    if recipe.data.eval_store is not None and recipe.training.eval_interval:
        stores.append(recipe.data.eval_store)
    for root in map(Path, stores):
        if not (root / STORE_JSON).is_file():
            raise ValueError(f"the store {root} does not exist; capture it first: {command}")
        remedy = f"set --data.store to another folder and capture again: {command}"
        check_store(recipe, root, read_store_info(root), remedy)
    if recipe.draft.init_from is not None:
        check_start(Path(recipe.draft.init_from))


def check_start(folder: Path) -> None:
    """Raise ValueError unless ``folder`` is an exported or published draft, a checkpoint, or a run."""
    if find_draft(folder) is None:
        raise ValueError(
            f"draft.init_from = {folder} holds no draft (no config.json, no checkpoint); give the folder of "
            "an exported or published EAGLE-3 draft, a run folder, or null"
        )


def check_store(recipe: Recipe, root: str | Path, info: StoreInfo, remedy: str, identity: str = "") -> None:
    """Raise ValueError unless the store ``root`` holds hidden states of the recipe's target and layers.

    Args:
        remedy: ends the error message where a size or the layers differ.
        identity: hash of the target's weights. It is compared where it is given and the store knows its
            own; stores converted from other formats may not.
    """
    target = recipe.target
    for name, found, expected in (
        ("hidden_size", info.hidden_size, target.hidden_size),
        ("vocab_size", info.vocab_size, target.vocab_size),
        ("aux_layer_ids", list(info.aux_layer_ids), list(target.aux_ids)),
        ("template_kwargs", info.template_kwargs, target.template_kwargs),
    ):
        if found != expected:
            text = f"was captured with {name} {found}, the recipe says {expected}"
            raise ValueError(f"the store {root} {text}; {remedy}")
    if identity and info.target_hash and info.target_hash != identity:
        raise ValueError(
            f"the store {root} was captured from other weights ({info.target}, hash {info.target_hash}) than "
            f"those of {target.model} (hash {identity}), so the labels would come from the wrong head; "
            "capture again, or set target.model to the target that the store was captured from"
        )
