"""Checkpoints that a run resumes from exactly, and the draft beside them that an export reads without DeepSpeed.

    checkpoints/step_N/        DeepSpeed's files; state.json, which says where the run stood; the draft
    checkpoints/latest         name of the newest whole one
    best/                      the draft of the best evaluation so far

Everything is written under another name first and renamed when every rank is done, so what has its name is whole.
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

from eagle_ds.data.vocab import VocabMap
from eagle_ds.drafts.folder import ARCH_FILE, STATE_FILE, VOCAB_FILE
from eagle_ds.model.arch import DraftArch
from eagle_ds.training.world import World

logger = logging.getLogger(__name__)

LATEST, RUN_STATE = "latest", "state.json"


@dataclass(frozen=True)
class Best:
    """The best evaluation so far."""

    step: int
    length: float  # acceptance length, simulated or real as the recipe says


@dataclass(frozen=True)
class RunState:
    """Where a run stands after ``step`` optimizer steps; the data's position is the step number too."""

    step: int
    world_size: int
    manifest_hash: str
    recipe: dict[str, Any]
    skipped_steps: int = 0
    best: Best | None = None

    @classmethod
    def read(cls, folder: Path) -> RunState:
        """Raises ValueError if the checkpoint's state cannot be read."""
        try:
            tree = json.loads((folder / RUN_STATE).read_text(encoding="utf-8"))
            best = tree.pop("best")
            return cls(**tree, best=Best(**best) if best else None)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"checkpoint {folder} cannot be read ({error}); start anew with --fresh") from error


class Checkpoints:
    """The checkpoint folder of a run. Every method is collective, but for ``latest``."""

    def __init__(self, run_dir: Path, keep: int, engine: DeepSpeedEngine, arch: DraftArch, vocab: VocabMap, world: World) -> None:
        self.run_dir, self.folder, self.keep = run_dir, run_dir / "checkpoints", keep
        self.engine, self.arch, self.vocab, self.world = engine, arch, vocab, world

    def save(self, state: RunState) -> None:
        """Write ``step_N`` whole or not at all, then forget the oldest. Raises ValueError if the disk refuses."""
        name, partial = f"step_{state.step}", f".step_{state.step}.partial"
        tensors = full_state(self.engine)
        self._first(lambda: self._clear(partial), self.folder / name)
        with writing(self.folder / name):
            self.engine.save_checkpoint(str(self.folder), tag=partial, client_state={"rng": torch.get_rng_state()}, save_latest=False)
        self._first(lambda: self._finish(partial, name, state, tensors), self.folder / name)

    def load(self, state: RunState) -> None:
        """Put weights, optimizer and random state back as they were at ``state``."""
        path, client = self.engine.load_checkpoint(str(self.folder), tag=f"step_{state.step}")
        if path is None:
            raise ValueError(f"DeepSpeed cannot load {self.folder}/step_{state.step}; start anew with --fresh")
        torch.set_rng_state(client["rng"])

    def save_best(self) -> None:
        """Replace ``best/`` by the draft as it is now. Raises ValueError if the disk refuses."""
        tensors = full_state(self.engine)
        self._first(lambda: self._replace_best(tensors), self.run_dir / "best")

    def _first(self, action: Callable[[], None], what: Path) -> None:
        """Let rank 0 write ``what`` by ``action`` while the others wait."""

        def write() -> None:
            with writing(what):
                action()

        self.world.agreement.together(write if self.world.is_first else lambda: None)

    def _clear(self, partial: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".step_*.partial"):
            shutil.rmtree(leftover)

    def _finish(self, partial: str, name: str, state: RunState, tensors: dict[str, Tensor]) -> None:
        folder = self.folder / partial
        write_draft(folder, tensors, self.arch, self.vocab)
        (folder / RUN_STATE).write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")
        if (self.folder / name).exists():
            shutil.rmtree(self.folder / name)
        folder.rename(self.folder / name)
        temporary = self.folder / f".{LATEST}"
        temporary.write_text(name, encoding="utf-8")
        os.replace(temporary, self.folder / LATEST)
        for old in sorted(self.folder.glob("step_*"), key=step_of)[: -self.keep]:
            shutil.rmtree(old)
        logger.info("saved %s", self.folder / name)

    def _replace_best(self, tensors: dict[str, Tensor]) -> None:
        partial, best, old = (self.run_dir / name for name in (".best.partial", "best", ".best.old"))
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
        write_draft(partial, tensors, self.arch, self.vocab)
        if best.exists():
            best.rename(old)
        partial.rename(best)
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def writing(what: Path) -> Iterator[None]:
    """Turns what a disk refuses into one sentence, whichever library found out."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"cannot write the checkpoint {what} ({error}); free space and run again to resume") from error


def latest(run_dir: Path) -> RunState | None:
    """The state of the newest whole checkpoint of ``run_dir``, None where there is none."""
    pointer = run_dir / "checkpoints" / LATEST
    if not pointer.is_file():
        return None
    return RunState.read(pointer.parent / pointer.read_text(encoding="utf-8").strip())


def step_of(folder: Path) -> int:
    """N of ``step_N``."""
    return int(folder.name.removeprefix("step_"))


def full_state(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """Every trained tensor whole, in float32, on the CPU of rank 0 (empty elsewhere), under any ZeRO stage. Collective."""
    state = {}
    for name, parameter in engine.module.named_parameters():
        whole = safe_get_full_fp32_param(parameter)
        if engine.global_rank == 0:
            state[name] = (parameter if whole is None else whole).detach().float().cpu().clone()
    return state


def write_draft(folder: Path, tensors: dict[str, Tensor], arch: DraftArch, vocab: VocabMap) -> None:
    """The files that ``eagle_ds.drafts.folder.load_checkpoint`` reads."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / STATE_FILE)
    tree = {field.name: getattr(arch, field.name) for field in dataclasses.fields(arch)}
    if arch.rope_scaling is not None:
        tree["rope_scaling"] = arch.rope_scaling.model_dump()
    (folder / ARCH_FILE).write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    vocab.save(folder / VOCAB_FILE)
