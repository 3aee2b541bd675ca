"""Everything that can be known to be wrong before a process group forms: layout, DeepSpeed JSON, stores, draft to start from.

Reads small JSON files only; each complaint is one sentence that says how to mend it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eagle_ds.config.deepspeed import deepspeed_config, read_ds_json
from eagle_ds.config.recipe import Recipe, capture_command, data_parallel_size
from eagle_ds.store.manifest import STORE_JSON, read_store_info


def check_layout(recipe: Recipe, world_size: int) -> None:
    """Raise ValueError unless ``world_size`` ranks carry the layout and the DeepSpeed JSON agrees with the recipe."""
    data_parallel_size(recipe, world_size)
    deepspeed_config(recipe, read_ds_json(recipe.deepspeed), world_size)


def check_files(recipe: Recipe, recipe_json: Path, overrides: Sequence[str] = ()) -> None:
    """Raise ValueError for a store that is missing or was captured from something else, or a missing draft."""
    command = capture_command(recipe_json, overrides)
    check_store(recipe, Path(recipe.data.store), command)
    if recipe.data.eval_store is not None and recipe.training.eval_interval:
        check_store(recipe, Path(recipe.data.eval_store), command)
    if recipe.draft.init_from is not None:
        check_start(Path(recipe.draft.init_from))


def check_start(folder: Path) -> None:
    """Raise ValueError unless ``folder`` looks like a draft: exported or published, a checkpoint, or a run that has one."""
    places = (folder, folder / "best", *folder.glob("checkpoints/step_*"))
    if not (folder / "config.json").is_file() and not any((place / "arch.json").is_file() for place in places):
        raise ValueError(
            f"draft.init_from = {folder} holds no draft (no config.json, no checkpoint); give the folder of an exported or published "
            "EAGLE-3 draft, a run folder, or null"
        )


def check_store(recipe: Recipe, root: Path, command: str) -> None:
    """Raise ValueError unless ``root`` is a store with the recipe's sizes and layers. That it holds states of the same weights
    is checked by hash when training opens the target."""
    if not (root / STORE_JSON).is_file():
        raise ValueError(f"the store {root} does not exist; capture it first: {command}")
    info = read_store_info(root)
    wanted = {
        "hidden_size": (info.hidden_size, recipe.target.hidden_size),
        "vocab_size": (info.vocab_size, recipe.target.vocab_size),
        "aux_layer_ids": (list(info.aux_layer_ids), list(recipe.target.aux_ids)),
    }
    for name, (there, here) in wanted.items():
        if there != here:
            raise ValueError(
                f"the store {root} was captured with {name} {there}, the recipe says {here}; "
                f"set --data.store to another folder and capture again: {command}"
            )
