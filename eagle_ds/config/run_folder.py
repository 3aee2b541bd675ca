"""The run folder: names of its files, order of its checkpoints, and the lock that keeps a second run out.

    recipe.json            the resolved recipe
    log.jsonl              one line per optimizer step
    eval.jsonl             one line per evaluation
    checkpoints/step_N/    checkpoint after N optimizer steps
    checkpoints/latest     name of the newest complete checkpoint
    best/                  the draft of the best evaluation
    draft/                 the draft exported for serving (draft-vllm/ if only vLLM can serve it)
    acceptance.json        acceptance measured by tools/eval_acceptance.py
    report.html            the report

Standard library only: the launcher imports this module before torch.
"""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path
from typing import TextIO

from eagle_ds.config.outputs import InUse, hold

logger = logging.getLogger(__name__)

RECIPE_FILE, STEP_LOG, EVAL_LOG = "recipe.json", "log.jsonl", "eval.jsonl"
CHECKPOINTS, BEST = "checkpoints", "best"
EXPORTED, EXPORTED_VLLM = "draft", "draft-vllm"
ARCH_FILE, SERVED_CONFIG = "arch.json", "config.json"  # describe the draft of a checkpoint, an exported one
ACCEPTANCE, REPORT = "acceptance.json", "report.html"
LATEST, LOCK = "latest", ".lock"
STEP_PREFIX = "step_"


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Return the checkpoint folder of optimizer step ``step``; it need not exist."""
    return run_dir / CHECKPOINTS / f"{STEP_PREFIX}{step}"


def step_of(checkpoint: Path) -> int:
    """Return N of a checkpoint folder ``step_N``."""
    return int(checkpoint.name.removeprefix(STEP_PREFIX))


def checkpoints_newest_first(run_dir: Path) -> list[Path]:
    """List the complete checkpoints of a run, newest first. Incomplete ones have hidden names."""
    return sorted((run_dir / CHECKPOINTS).glob(f"{STEP_PREFIX}*"), key=step_of, reverse=True)


def draft_candidates(folder: Path) -> list[Path]:
    """List where ``folder`` may hold a draft: itself, a run's best, its checkpoints, newest first."""
    return [folder, folder / BEST, *checkpoints_newest_first(folder)]


def find_draft(folder: Path) -> Path | None:
    """Return the file that describes the draft in ``folder``; None if there is no draft.

    Args:
        folder: an exported or published draft, a checkpoint, or a run. Of a run the best checkpoint is taken,
            else the newest.
    """
    places = [folder / SERVED_CONFIG, *(place / ARCH_FILE for place in draft_candidates(folder))]
    return next((place for place in places if place.is_file()), None)


def latest_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest complete checkpoint of a run, None if it has none."""
    pointer = run_dir / CHECKPOINTS / LATEST
    return pointer.parent / pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else None


def lock_run(run_dir: Path) -> TextIO | None:
    """Create ``run_dir`` if necessary and lock it until the returned file is closed or this process ends.

    A launcher that is killed can leave its ranks running. Without the lock, the same command started again
    would write to the same folder as those ranks.

    Returns:
        The open lock file; None, with a warning, where the file system does not support locks.

    Raises:
        ValueError: another run is active in the folder.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        file = hold(run_dir / LOCK)
    except InUse as owner:
        who = str(owner) or "it has not named its process yet"
        raise ValueError(
            f"another run is active in {run_dir} ({who}); its launcher may have ended before it. "
            "Stop it with SIGTERM, which saves a checkpoint, run again to resume, or choose another --name"
        ) from owner
    except OSError as error:
        text = "cannot lock %s (%s): its file system has no locks; make sure that no other run uses it"
        logger.warning(text, run_dir, error)
        return None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
