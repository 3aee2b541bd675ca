"""Save and load checkpoints, and decide whether a run may resume from one.

    checkpoints/step_N/        DeepSpeed's files; state.json (position of the run); the draft in safetensors
    checkpoints/latest         name of the newest complete checkpoint
    best/                      the draft of the best evaluation so far

An interrupted save must never be resumed from. Everything is therefore written under a hidden name and
renamed once all ranks have finished: a folder named ``step_N`` is complete. The draft's files are read
without DeepSpeed, by the export.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.utils import safe_get_full_fp32_param
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from eagle_ds.config import run_folder
from eagle_ds.config.recipe import Recipe
from eagle_ds.drafts.loading import ARCH_FILE, STATE_FILE, VOCAB_FILE
from eagle_ds.training.inputs import Inputs
from eagle_ds.training.world import World

logger = logging.getLogger(__name__)

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
    folder = run_folder.latest_checkpoint(run_dir)
    return RunState.read(folder) if folder else None


class Checkpoints:
    """Writes and loads the checkpoints of one run. Every method is collective."""

    def __init__(self, recipe: Recipe, engine: DeepSpeedEngine, inputs: Inputs, world: World) -> None:
        self.run_dir, self.keep = recipe.run_dir, recipe.training.keep_checkpoints
        self.engine, self.inputs = engine, inputs
        self.world = world

    def save(self, state: RunState) -> None:
        """Write the checkpoint of ``state.step``, completely or not at all, then delete the oldest ones.

        Raises ValueError if a file cannot be written.
        """
        folder = run_folder.checkpoint_path(self.run_dir, state.step)
        partial = folder.with_name(f".{folder.name}.partial")
        tensors = full_state(self.engine)
        self._on_first(self._delete_partial, folder)
        # Every rank writes its own partition of the optimizer. DeepSpeed ends with a barrier, so the folder
        # is complete when rank 0 renames it. save_latest is off: DeepSpeed would name the hidden folder in
        # ``latest``.
        with explaining_write_errors(folder):
            client, tag = {"rng": torch.get_rng_state()}, partial.name
            self.engine.save_checkpoint(str(folder.parent), tag, client_state=client, save_latest=False)
        self._on_first(lambda: self._publish(partial, folder, state, tensors), folder)

    def load(self, state: RunState) -> None:
        """Restore weights, optimizer and random state of the checkpoint that ``state`` was read from."""
        folder = run_folder.checkpoint_path(self.run_dir, state.step)
        path, client = self.engine.load_checkpoint(str(folder.parent), tag=folder.name)
        if path is None:
            raise ValueError(f"DeepSpeed cannot load {folder}; start from step 0 with --fresh")
        torch.set_rng_state(client["rng"])

    def save_best(self) -> None:
        """Replace ``best/`` by the current draft. Raises RankFailure on all ranks if rank 0 cannot write."""
        tensors = full_state(self.engine)
        self._on_first(lambda: self._replace_best(tensors), self.run_dir / run_folder.BEST)

    def _on_first(self, action: Callable[[], None], what: Path) -> None:
        """Let rank 0 write ``what`` while the others wait; all ranks fail if it cannot."""
        write = explaining_write_errors(what)(action)
        self.world.agreement.together(write if self.world.is_first else lambda: None)

    def _delete_partial(self) -> None:
        checkpoints = self.run_dir / run_folder.CHECKPOINTS
        checkpoints.mkdir(parents=True, exist_ok=True)
        for leftover in checkpoints.glob(".step_*.partial"):
            shutil.rmtree(leftover)

    def _publish(self, partial: Path, folder: Path, state: RunState, tensors: dict[str, Tensor]) -> None:
        """Add the draft and the state, rename the folder, and only then let ``latest`` name it."""
        write_draft(partial, tensors, self.inputs)
        (partial / RUN_STATE).write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
        temporary = folder.with_name(f".{run_folder.LATEST}")
        temporary.write_text(folder.name, encoding="utf-8")
        os.replace(temporary, folder.with_name(run_folder.LATEST))
        for old in run_folder.checkpoints_newest_first(self.run_dir)[self.keep :]:
            shutil.rmtree(old)
        logger.info("saved %s", folder)

    def _replace_best(self, tensors: dict[str, Tensor]) -> None:
        # A folder cannot replace another one atomically, so the old draft is moved aside first.
        best = self.run_dir / run_folder.BEST
        partial, old = best.with_name(f".{best.name}.partial"), best.with_name(f".{best.name}.old")
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
        write_draft(partial, tensors, self.inputs)
        if best.exists():
            best.rename(old)
        partial.rename(best)
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def explaining_write_errors(what: Path) -> Iterator[None]:
    """Turn every kind of write error into one ValueError: OSError, and what torch and safetensors raise."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        text = f"cannot write the checkpoint {what} ({error}); free space and run again to resume"
        raise ValueError(text) from error


def full_state(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """Gather every trained tensor in float32 on the CPU of rank 0, under any ZeRO stage. Collective.

    Returns an empty dictionary on other ranks.
    """
    state = {}
    for name, parameter in engine.module.named_parameters():
        # None: this stage keeps no separate float32 master, so the parameter itself is the full value.
        whole = safe_get_full_fp32_param(parameter)
        if engine.global_rank == 0:
            state[name] = (parameter if whole is None else whole).detach().float().cpu().clone()
    return state


def write_draft(folder: Path, tensors: dict[str, Tensor], inputs: Inputs) -> None:
    """Write the files that ``eagle_ds.drafts.loading.load_checkpoint`` reads."""
    arch = inputs.arch
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / STATE_FILE)
    tree = {field.name: getattr(arch, field.name) for field in dataclasses.fields(arch)}
    if arch.rope_scaling is not None:
        tree["rope_scaling"] = arch.rope_scaling.model_dump()
    (folder / ARCH_FILE).write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    inputs.vocab.save(folder / VOCAB_FILE)


def find_resumable(recipe: Recipe, manifest_hash: str, world_size: int) -> RunState | None:
    """Return the state of the newest checkpoint, or None for a new run.

    Raises ValueError if this recipe, store or number of ranks cannot continue the run.
    """
    state = latest(recipe.run_dir)
    if state is None:
        return None
    run = f"{recipe.run_dir} was trained"
    remedy = "; undo that change, choose another output_dir, or start from step 0 with --fresh"
    if state.world_size != world_size:
        raise ValueError(f"{run} by {state.world_size} processes, now there are {world_size}{remedy}")
    if state.manifest_hash != manifest_hash:
        raise ValueError(f"{recipe.data.store} has changed since {run} to step {state.step}{remedy}")
    then, now = state.recipe["parallel"]["ulysses"] * state.recipe["parallel"]["ring"], recipe.parallel.size
    if then != now:
        raise ValueError(f"{run} with ulysses * ring = {then}, now it is {now}{remedy}")
    changed = differences(state.recipe, recipe.model_dump(mode="json"))
    if fatal := [text for name, text in changed.items() if name not in MAY_CHANGE]:
        raise ValueError(f"{run} with {', '.join(fatal)}{remedy}")
    for text in changed.values():
        logger.info("resuming with another setting: %s", text)
    return state


def differences(then: dict[str, Any], now: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Compare two recipe trees. Returns {dotted name: "name = old (now new)"} of what differs."""
    changed: dict[str, str] = {}
    for name in sorted(then.keys() | now.keys()):
        old, new = then.get(name), now.get(name)
        dotted = prefix + name
        if isinstance(old, dict) and isinstance(new, dict):
            changed |= differences(old, new, f"{dotted}.")
        elif old != new:
            changed[dotted] = f"{dotted} = {old} (now {new})"
    return changed
