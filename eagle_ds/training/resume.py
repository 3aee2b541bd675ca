"""Whether a run folder can be gone on with: what may have changed since its newest checkpoint, and what may not."""

from __future__ import annotations

import logging
from typing import Any

from eagle_ds.config.recipe import Recipe
from eagle_ds.training.checkpoint import RunState, latest

logger = logging.getLogger(__name__)

MAY_CHANGE = {
    *("name", "output_dir", "deepspeed", "target.model", "target.revision", "draft.init_from"),
    *("data.conversations", "data.eval_conversations", "data.store", "data.eval_store", "data.prefetch", "data.read_processes"),
    *("parallel.ulysses", "parallel.ring", "parallel.ring_mode", "parallel.trained_rows_only"),
    *("training.learning_rate", "training.min_learning_rate", "training.warmup_ratio", "training.schedule", "training.epochs"),
    *("training.max_steps", "training.recompute", "training.offload_activations", "training.check_memory"),
    *("training.non_finite", "training.log_interval", "training.eval_interval", "training.save_interval"),
    *("training.keep_checkpoints", "training.best_by"),
    *("training.acceptance_interval", "training.acceptance_prompts"),
}
"""Settings under which a checkpoint still means the same; contents of target and store are compared by hash."""


def find_resumable(recipe: Recipe, manifest_hash: str, world_size: int) -> RunState | None:
    """The newest checkpoint's state, or None for a fresh run. Raises ValueError if this recipe cannot continue it."""
    state = latest(recipe.run_dir)
    if state is None:
        return None
    mend = "; undo that, choose another output_dir, or start anew with --fresh"
    if state.world_size != world_size:
        raise ValueError(f"{recipe.run_dir} was trained by {state.world_size} processes, now there are {world_size}{mend}")
    if state.manifest_hash != manifest_hash:
        raise ValueError(f"the store {recipe.data.store} has changed since {recipe.run_dir} was at step {state.step}{mend}")
    if (then := state.recipe["parallel"]["ulysses"] * state.recipe["parallel"]["ring"]) != recipe.parallel.size:
        raise ValueError(f"{recipe.run_dir} was trained with ulysses * ring = {then}, now it is {recipe.parallel.size}{mend}")
    changed = differences(state.recipe, recipe.model_dump(mode="json"))
    if fatal := [text for name, text in changed.items() if name not in MAY_CHANGE]:
        raise ValueError(f"{recipe.run_dir} was trained with {', '.join(fatal)}{mend}")
    for text in changed.values():
        logger.info("resuming with another setting: %s", text)
    return state


def differences(then: dict[str, Any], now: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """{dotted name: "name = old (now new)"} of every setting that differs."""
    changed: dict[str, str] = {}
    for name in sorted(then.keys() | now.keys()):
        old, new, dotted = then.get(name), now.get(name), prefix + name
        if isinstance(old, dict) and isinstance(new, dict):
            changed |= differences(old, new, f"{dotted}.")
        elif old != new:
            changed[dotted] = f"{dotted} = {old} (now {new})"
    return changed
