"""The position of a run, saved in each checkpoint, and whether a recipe may continue from it.

Imports no torch, so that ``--plan`` and the launcher can look at a run before processes start.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eagle_ds.config.recipe import Recipe
from eagle_ds.config.run_folder import latest_checkpoint

RUN_STATE = "state.json"

# Settings that may differ when a run resumes: they change neither the data order nor the meaning of the saved
# tensors. The contents of target and store may not change either; their hashes are compared, not their paths.
MAY_CHANGE = {
    *("name", "output_dir", "deepspeed", "target.model", "target.revision", "draft.init_from"),
    *("data.conversations", "data.eval_conversations", "data.store", "data.eval_store"),
    *("data.prefetch", "data.read_processes"),
    *("parallel.ulysses", "parallel.ring", "parallel.ring_mode", "parallel.trained_rows_only"),
    *("training.learning_rate", "training.min_learning_rate", "training.warmup_ratio", "training.schedule"),
    *("training.epochs", "training.max_steps", "training.recompute", "training.offload_activations"),
    *("training.check_memory", "training.non_finite", "training.log_interval", "training.eval_interval"),
    *("training.save_interval", "training.keep_checkpoints", "training.best_by"),
    *("training.acceptance_interval", "training.acceptance_prompts"),
}


@dataclass(frozen=True)
class Best:
    """The best evaluation so far."""

    step: int
    length: float  # acceptance length: simulated or measured by decoding, as training.best_by says


@dataclass(frozen=True)
class RunState:
    """The position of a run after ``step`` optimizer steps.

    The order of the data follows from the seed and the step number alone, so no position in the data is
    saved.
    """

    step: int
    world_size: int
    manifest_hash: str
    recipe: dict[str, Any]
    skipped_steps: int = 0
    best: Best | None = None

    @classmethod
    def read(cls, folder: Path) -> RunState:
        """Read the state of the checkpoint ``folder``. Raises ValueError if it cannot be read."""
        try:
            tree = json.loads((folder / RUN_STATE).read_text(encoding="utf-8"))
            best = tree.pop("best")
            return cls(**tree, best=Best(**best) if best else None)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"checkpoint {folder} cannot be read ({error}); restart with --fresh") from error


def latest(run_dir: Path) -> RunState | None:
    """Read the state of the newest complete checkpoint of a run; None if it has none."""
    folder = latest_checkpoint(run_dir)
    return RunState.read(folder) if folder else None


def check_resumable(state: RunState, recipe: Recipe, world_size: int, manifest_hash: str | None) -> list[str]:
    """Check that ``recipe`` may continue the run of ``state`` on ``world_size`` ranks.

    Args:
        manifest_hash: of the recipe's store; None if the store does not exist yet.

    Returns:
        The settings that differ and may differ, each as "name = old (now new)".

    Raises:
        ValueError: the recipe, the store or the number of ranks cannot continue the run.
    """
    run = f"{recipe.run_dir} was trained"
    remedy = "; undo that change, choose another output_dir, or start from step 0 with --fresh"
    if state.world_size != world_size:
        raise ValueError(f"{run} by {state.world_size} processes, now there are {world_size}{remedy}")
    if manifest_hash not in (None, state.manifest_hash):
        raise ValueError(_other_data(state, recipe))
    then, now = state.recipe["parallel"]["ulysses"] * state.recipe["parallel"]["ring"], recipe.parallel.size
    if then != now:
        raise ValueError(f"{run} with ulysses * ring = {then}, now it is {now}{remedy}")
    changed = differences(state.recipe, recipe.model_dump(mode="json"))
    if fatal := [text for name, text in changed.items() if name not in MAY_CHANGE]:
        raise ValueError(f"{run} with {', '.join(fatal)}{remedy}")
    return list(changed.values())


def _other_data(state: RunState, recipe: Recipe) -> str:
    """Say that the store is not the one of the run, and how to train its draft on new data."""
    then, now, run = state.recipe["data"]["store"], recipe.data.store, recipe.run_dir
    trained = f"{run} was trained to step {state.step}"
    new_run = "--output_dir OTHER_FOLDER" if recipe.output_dir else "--name OTHER_NAME"
    onward = (
        f"to train its draft on new data, start another run from it: {new_run} --draft.init_from {run}; to "
    )
    if then == now:
        onward += "train on the changed store from step 0: --fresh"
        return f"{now} has changed since {trained} (samples were added, removed or replaced); {onward}"
    onward += f"resume, set data.store to {then} again; to start from step 0: --fresh"
    return f"{trained} on the store {then}; data.store is now {now}, which holds other samples; {onward}"


def differences(then: dict[str, Any], now: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Compare two recipe trees. Returns {dotted name: "name = old (now new)"} of what differs."""
    changed: dict[str, str] = {}
    for name in sorted(then.keys() | now.keys()):
        old, new, dotted = then.get(name), now.get(name), prefix + name
        if isinstance(old, dict) and isinstance(new, dict):
            changed |= differences(old, new, f"{dotted}.")
        elif old != new:
            changed[dotted] = f"{dotted} = {old} (now {new})"
    return changed
