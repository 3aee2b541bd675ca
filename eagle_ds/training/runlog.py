"""What a run reports while it trains: one line per optimizer step, on the terminal, as JSON, to monitors.

`Pace` measures between two lines, `gather_line` collects one line from all ranks, `DeferredLine` writes it at
a time when nothing waits for it, `RunLog` is the writer on rank 0.
"""

from __future__ import annotations

import json
import logging
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from eagle_ds.config.recipe import Recipe
from eagle_ds.config.run_folder import EVAL_LOG, RECIPE_FILE, STEP_LOG
from eagle_ds.estimate.devices import GIB
from eagle_ds.training.agreement import Agreement, attempt
from eagle_ds.training.metrics import metrics_of, sum_over_ranks
from eagle_ds.training.step import StepOutcome
from eagle_ds.training.world import World

logger = logging.getLogger(__name__)

Line = dict[str, Any]
LateLine = Callable[[], Line]  # waits for the device, then returns the line


@dataclass
class Pace:
    """Time, tokens and waiting since the last log line."""

    started: float = field(default_factory=time.perf_counter)
    steps: int = 0
    tokens: int = 0
    wait_s: float = 0.0

    def add(self, outcome: StepOutcome) -> None:
        """Count one optimizer step."""
        self.steps += 1
        self.tokens += outcome.tokens
        self.wait_s += outcome.wait_s


def gather_line(outcome: StepOutcome, pace: Pace, decay: Tensor, fields: Line, world: World) -> LateLine:
    """Collect the fields of a step's log line from all ranks. Collective.

    Nothing here waits for the device: the metric sums and the gradient norm are still being computed, and
    their copies to the host are queued after the step.

    Args:
        decay: float64 [T], weight of each TTT step in the loss.
        fields: what the caller adds, by name: "step", "lr" and "skipped_steps".

    Returns:
        A function that waits for the device to finish the step and returns the line.
    """
    sums = sum_over_ranks(outcome.sums, world.topology.world_size)
    stats, elapsed = outcome.stats, (time.perf_counter() - pace.started) / pace.steps
    # One gather of integers, so times are sent in microseconds. The line has the maximum over ranks of the
    # first three numbers, and the sum of the others.
    slowest = (peak_bytes(world.device), int(pace.wait_s * 1e6), int(outcome.read_s * 1e6))
    table = world.agreement.gather((*slowest, stats.bytes_read, stats.bytes_inflated, stats.bytes_used))
    peak, wait, read = table[:, :3].max(0).tolist()
    volumes = zip(("bytes_read", "bytes_inflated", "bytes_used"), table[:, 3:].sum(0).tolist(), strict=True)
    return lambda: {
        "step": fields["step"],
        **metrics_of(sums(), decay, outcome.positions).as_dict(),
        "grad_norm": outcome.grad_norm,
        "lr": fields["lr"],
        "tokens_per_s": pace.tokens / pace.steps / elapsed,
        "tokens": outcome.tokens,
        "step_s": elapsed,
        "data_wait_s": wait / 1e6 / pace.steps,
        "read_s": read / 1e6,
        "peak_gib": peak / GIB,
        "epoch": outcome.global_batch.epoch,
        "skipped_steps": fields["skipped_steps"],
        **dict(volumes),
    }


class DeferredLine:
    """The log line of the last step, written one forward later. A context manager around the loop.

    Loss and gradient norm reach the host only when the GPU has finished the step. A host that waits for them
    at the end of a step queues no kernels meanwhile, and the GPU is idle when the next step begins. So the
    line is kept in ``pending`` at the end of its step and written after the next step's first forward has
    been queued: the values have arrived by then, and the GPU is busy while the host formats and writes.

    At that point other ranks may already wait for this one in a collective, so a write error must not be
    raised there. It is kept, and `check` raises it on all ranks together.
    """

    def __init__(self, log: RunLog | None, agreement: Agreement) -> None:
        self._log, self._agreement = log, agreement
        self.pending: LateLine | None = None  # what `gather_line` returned, not yet written
        self._error: BaseException | None = None

    def write_while_busy(self) -> None:
        """Write the line. Call it while the GPU has work queued. Never raises."""
        _, error = attempt(self._write)
        self._error = self._error or error

    def check(self) -> None:
        """Raise RankFailure on all ranks if a line could not be written. Collective."""
        self._agreement.raise_together(self._error)

    def write_now(self) -> None:
        """Write the line before something that must follow it, such as a checkpoint. Collective."""
        self._agreement.together(self._write)

    def _write(self) -> None:
        line, self.pending = self.pending, None  # forgotten first, so that an error is reported only once
        if line and self._log:
            self._log.step(line())

    def __enter__(self) -> DeferredLine:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """However the loop ends, write the line of the last step that was completed."""
        if kind is None:
            self.write_now()
            return
        # The loop failed, so other ranks cannot be expected in a collective: write, and only log what goes
        # wrong.
        self.write_while_busy()
        if self._error:
            logger.error("the log line of the last step could not be written: %s", self._error)


class RunLog:
    """Writes the logs in ``run_dir`` and DeepSpeed's monitors. Only rank 0 makes one."""

    def __init__(self, run_dir: Path, engine: DeepSpeedEngine, total_steps: int) -> None:
        self.run_dir, self.total_steps = run_dir, total_steps
        self.monitor = engine.monitor if engine.monitor.enabled else None

    def start(self, recipe: Recipe, step: int) -> None:
        """Save the resolved recipe, and drop lines written after the checkpoint of ``step``."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        (self.run_dir / RECIPE_FILE).write_text(recipe.model_dump_json(indent=2) + "\n", encoding="utf-8")
        for name in (STEP_LOG, EVAL_LOG):
            keep_until(self.run_dir / name, step)

    def step(self, line: Line) -> None:
        """Write the line of one optimizer step."""
        self._append(STEP_LOG, line)
        logger.info("%s", describe_step(line, self.total_steps))
        self._monitor("train", line)

    def evaluation(self, line: Line) -> None:
        """Write the line of one evaluation."""
        self._append(EVAL_LOG, line)
        logger.info("%s", describe_evaluation(line))
        self._monitor("eval", line)

    def _append(self, name: str, line: Line) -> None:
        path = self.run_dir / name
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise ValueError(f"cannot write {path} ({error}); free space and run again to resume") from error

    def _monitor(self, kind: str, line: Line) -> None:
        if self.monitor is not None:
            numbers = [(name, value) for name, value in scalars(line) if name != "step"]
            self.monitor.write_events([(f"{kind}/{name}", value, line["step"]) for name, value in numbers])


def describe_step(line: Line, total_steps: int) -> str:
    """Format the terminal's line of a step."""
    return (
        f"step {line['step']}/{total_steps}  loss {line['loss']:.4f}  kl {line['kl']:.4f}  "
        f"accuracy {_percent(line['accuracy'])}  length {line['simulated_length']:.2f}  lr {line['lr']:.2e}  "
        f"norm {line['grad_norm']:.3f}  {line['tokens_per_s']:,.0f} tokens/s  "
        f"{line['step_s']:.2f} s (data wait {line['data_wait_s']:.2f})  {line['peak_gib']:.1f} GiB"
    )


def describe_evaluation(line: Line) -> str:
    """Format the terminal's line of an evaluation: on held-out features, by real decoding, or both."""
    parts = []
    if "loss" in line:
        parts += [f"loss {line['loss']:.4f}", f"kl {line['kl']:.4f}"]
        parts.append(f"accuracy {_percent(line['accuracy'])}")
        parts.append(f"acceptance length {line['simulated_length']:.3f} simulated")
    if "accept_length" in line:
        parts.append(f"acceptance length {line['accept_length']:.3f} in real decoding")
    return f"step {line['step']} held out: {', '.join(parts)}"


def scalars(line: Line) -> list[tuple[str, float]]:
    """Flatten a line to (name, number) pairs for monitors: one per element of a list, none for text."""
    flat: list[tuple[str, float]] = []
    for name, value in line.items():
        if isinstance(value, list):
            flat += [(f"{name}_{i}", float(v)) for i, v in enumerate(value)]
        elif isinstance(value, int | float):
            flat.append((name, float(value)))
    return flat


def keep_until(path: Path, step: int) -> None:
    """Keep only the lines of steps up to ``step``, without a last line that a crash left incomplete."""
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
    """Return the most memory this process has ever held, on the GPU or, without one, of the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _percent(values: list[float]) -> str:
    return "/".join(f"{100 * value:.0f}" for value in values) + " %"
