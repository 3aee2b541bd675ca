"""What a run leaves for people and plots: a line a step on the terminal, the same as JSON lines, and DeepSpeed's monitors."""

from __future__ import annotations

import json
import logging
import resource
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine

from eagle_ds.config.recipe import Recipe

logger = logging.getLogger(__name__)

GIB = 1 << 30
STEP_LOG, EVAL_LOG, RECIPE_COPY = "log.jsonl", "eval.jsonl", "recipe.json"


class RunLog:
    """Writes to ``run_dir``; only rank 0 makes one."""

    def __init__(self, run_dir: Path, engine: DeepSpeedEngine, total_steps: int) -> None:
        self.run_dir, self.total_steps = run_dir, total_steps
        self.monitor = engine.monitor if engine.monitor.enabled else None

    def start(self, recipe: Recipe, step: int) -> None:
        """Save the resolved recipe, and drop lines that an interrupted run wrote after the checkpoint of ``step``."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        (self.run_dir / RECIPE_COPY).write_text(recipe.model_dump_json(indent=2) + "\n", encoding="utf-8")
        for name in (STEP_LOG, EVAL_LOG):
            keep_until(self.run_dir / name, step)

    def step(self, line: dict[str, Any]) -> None:
        """One optimizer step."""
        self._append(STEP_LOG, line)
        logger.info("%s", describe_step(line, self.total_steps))
        self._monitor("train", line)

    def evaluation(self, line: dict[str, Any]) -> None:
        """One evaluation."""
        self._append(EVAL_LOG, line)
        logger.info("%s", describe_evaluation(line))
        self._monitor("eval", line)

    def _append(self, name: str, line: dict[str, Any]) -> None:
        path = self.run_dir / name
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise ValueError(f"cannot write {path} ({error}); free space and run again to resume") from error

    def _monitor(self, kind: str, line: dict[str, Any]) -> None:
        if self.monitor is not None:
            self.monitor.write_events([(f"{kind}/{name}", value, line["step"]) for name, value in scalars(line) if name != "step"])


def describe_step(line: dict[str, Any], total_steps: int) -> str:
    """The terminal's line of a step."""
    return (
        f"step {line['step']}/{total_steps}  loss {line['loss']:.4f}  kl {line['kl']:.4f}  accuracy {_percent(line['accuracy'])}  "
        f"length {line['simulated_length']:.2f}  lr {line['lr']:.2e}  norm {line['grad_norm']:.3f}  {line['tokens_per_s']:,.0f} tokens/s  "
        f"{line['step_s']:.2f} s (data wait {line['data_wait_s']:.2f})  {line['peak_gib']:.1f} GiB"
    )


def describe_evaluation(line: dict[str, Any]) -> str:
    """The terminal's line of an evaluation: on held-out features, by real decoding, or both."""
    parts = []
    if "loss" in line:
        parts += [f"loss {line['loss']:.4f}", f"kl {line['kl']:.4f}", f"accuracy {_percent(line['accuracy'])}"]
        parts.append(f"acceptance length {line['simulated_length']:.3f} simulated")
    if "accept_length" in line:
        parts.append(f"acceptance length {line['accept_length']:.3f} in real decoding")
    return f"step {line['step']} held out: {', '.join(parts)}"


def scalars(line: dict[str, Any]) -> list[tuple[str, float]]:
    """(name, value) of each number; a list's numbers one by one."""
    flat: list[tuple[str, float]] = []
    for name, value in line.items():
        if isinstance(value, list):
            flat += [(f"{name}_{i}", float(v)) for i, v in enumerate(value)]
        elif isinstance(value, int | float):
            flat.append((name, float(value)))
    return flat


def keep_until(path: Path, step: int) -> None:
    """Leave only the lines up to ``step``, and no torn one."""
    if not path.is_file():
        return
    kept = []
    for text in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if text.endswith("\n") and json.loads(text)["step"] <= step:
            kept.append(text)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)


def peak_bytes(device: torch.device) -> int:
    """Most memory this process ever held: the device's allocator, or the resident set on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _percent(values: list[float]) -> str:
    return "/".join(f"{100 * value:.0f}" for value in values) + " %"
