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
from dataclasses import asdict
from pathlib import Path

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.utils import safe_get_full_fp32_param
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from eagle_ds.config import run_folder
from eagle_ds.config.recipe import Recipe
from eagle_ds.config.run_state import RUN_STATE, RunState, check_resumable, latest
from eagle_ds.drafts.loading import ARCH_FILE, STATE_FILE, VOCAB_FILE
from eagle_ds.training.inputs import Inputs
from eagle_ds.training.world import World

logger = logging.getLogger(__name__)


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
    for text in check_resumable(state, recipe, world_size, manifest_hash):
        logger.info("resuming with another setting: %s", text)
    return state
