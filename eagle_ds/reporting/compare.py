"""Do runs track each other? Losses of several runs over the same data, step by step, beside the first run's.

For whoever changes layout, precision or kernels: two runs that should be the same differ by rounding alone, which grows from
step to step but stays far below the loss. Runs over other data, or with other steps, say nothing and are refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eagle_ds.config.run_folder import STEP_LOG
from eagle_ds.reporting.figures import comparison_figure
from eagle_ds.reporting.report import read_lines

SAME_DATA = ("data_hash", "epoch", "tokens", "trained_rows")  # fields of a line that tell which samples a step held


@dataclass(frozen=True)
class Curve:
    """A run's losses by step."""

    label: str
    path: Path
    lines: tuple[dict[str, Any], ...]

    @classmethod
    def read(cls, path: Path, label: str | None = None) -> Curve:
        """From a run folder or a JSONL file. Raises ValueError if it holds no losses, or one that is not finite."""
        if not path.exists():
            raise ValueError(f"{path} does not exist; give run folders (runs/NAME) or their {STEP_LOG}")
        file = path / STEP_LOG if path.is_dir() else path
        lines = read_lines(file)
        if not lines:
            raise ValueError(f"{file} holds no steps; give run folders (runs/NAME) or their {STEP_LOG}")
        for line in lines:
            if not isinstance(line.get("loss"), int | float) or not math.isfinite(line["loss"]):
                raise ValueError(f"{file}: the loss of step {line['step']} is {line.get('loss')}; only finite losses can be compared")
        return cls(label or (path.name if path.is_dir() else path.stem), path, tuple(lines))

    @property
    def steps(self) -> list[int]:
        return [line["step"] for line in self.lines]

    @property
    def losses(self) -> list[float]:
        return [float(line["loss"]) for line in self.lines]


@dataclass(frozen=True)
class Largest:
    """A difference and the step at which it is largest."""

    value: float
    step: int

    @classmethod
    def of(cls, values: Sequence[float], steps: Sequence[int]) -> Largest:
        at = max(range(len(values)), key=values.__getitem__)
        return cls(values[at], steps[at])


@dataclass(frozen=True)
class Compared:
    """One run against the first."""

    curve: Curve
    absolute: tuple[float, ...]  # by step
    relative: tuple[float, ...]  # to the first run's loss

    @property
    def largest_absolute(self) -> Largest:
        return Largest.of(self.absolute, self.curve.steps)

    @property
    def largest_relative(self) -> Largest:
        return Largest.of(self.relative, self.curve.steps)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        losses = self.curve.losses
        return {
            "label": self.curve.label,
            "path": str(self.curve.path),
            "first_loss": losses[0],
            "last_loss": losses[-1],
            "largest_absolute": vars(self.largest_absolute),
            "largest_relative": vars(self.largest_relative),
            "loss": losses,
            "relative": list(self.relative),
        }


def compare(curves: Sequence[Curve]) -> list[Compared]:
    """Every run against the first, itself included. Raises ValueError unless all hold the same steps over the same data."""
    first = curves[0]
    for curve in curves[1:]:
        _check_same_steps(first, curve)
        _check_same_data(first, curve)
    return [_against(first, curve) for curve in curves]


def write(compared: Sequence[Compared], folder: Path) -> list[Path]:
    """``compare.json`` and ``compare.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {"reference": compared[0].curve.label, "steps": compared[0].curve.steps, "runs": [run.as_dict() for run in compared]}
    paths = [folder / "compare.json", folder / "compare.png"]
    paths[0].write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    runs = [(run.curve.label, run.curve.losses, run.relative) for run in compared]
    paths[1].write_bytes(comparison_figure(compared[0].curve.steps, runs))
    return paths


def read_all(paths: Sequence[Path], labels: Sequence[str] = ()) -> list[Curve]:
    """A curve for each path. Raises ValueError if there are other than as many labels, or two runs of one name."""
    if labels and len(labels) != len(paths):
        raise ValueError(f"{len(labels)} labels for {len(paths)} runs; give one for each, in the same order")
    curves = [Curve.read(path, label) for path, label in zip(paths, labels or [None] * len(paths), strict=True)]
    names = [curve.label for curve in curves]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"several runs are called {', '.join(twice)}; tell them apart with --labels")
    return curves


def _against(first: Curve, curve: Curve) -> Compared:
    absolute = tuple(abs(b - a) for a, b in zip(first.losses, curve.losses, strict=True))
    relative = tuple((d / abs(a) if a else math.inf) if d else 0.0 for d, a in zip(absolute, first.losses, strict=True))
    return Compared(curve, absolute, relative)


def _check_same_steps(first: Curve, curve: Curve) -> None:
    if first.steps == curve.steps:
        return
    alone = sorted(set(first.steps) ^ set(curve.steps))
    raise ValueError(
        f"{curve.label} has {len(curve.steps)} logged steps up to {curve.steps[-1]}, {first.label} has {len(first.steps)} up to "
        f"{first.steps[-1]} (step {alone[0]} is in one alone); run both with the same training.max_steps and log_interval"
    )


def _check_same_data(first: Curve, curve: Curve) -> None:
    for a, b in zip(first.lines, curve.lines, strict=True):
        for name in SAME_DATA:
            if name in a and name in b and a[name] != b[name]:
                raise ValueError(
                    f"{curve.label} trained on other data than {first.label} at step {a['step']}: {name} is {b[name]} there and {a[name]} "
                    "here; give both the same store, seed, data.pack_tokens and dp * gradient_accumulation"
                )
