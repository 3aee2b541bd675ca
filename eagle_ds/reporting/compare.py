"""Compare the loss curves of several runs over the same data, step by step, with the first run.

Use it after changing layout, precision or kernels. Two runs that should be equal differ by rounding only: the
difference grows from step to step but stays far below the loss. Runs over other data or with other steps
cannot be compared and are refused.
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

# fields of a line that tell which samples a step held
SAME_DATA = ("data_hash", "epoch", "tokens", "trained_rows")
"""Fields of a log line that identify the data of a step."""


@dataclass(frozen=True)
class Curve:
    """The log lines of one run."""

    label: str
    path: Path
    lines: tuple[dict[str, Any], ...]

    @classmethod
    def read(cls, path: Path, label: str | None = None) -> Curve:
        """Read a run folder or a JSONL file. Raises ValueError unless it has losses and all are finite."""
        if not path.exists():
            raise ValueError(f"{path} does not exist; give run folders (runs/NAME) or their {STEP_LOG}")
        file = path / STEP_LOG if path.is_dir() else path
        if not (lines := read_lines(file)):
            raise ValueError(f"{file} holds no steps; give run folders (runs/NAME) or their {STEP_LOG}")
        for line in lines:
            loss = line.get("loss")
            if not isinstance(loss, int | float) or not math.isfinite(loss):
                found = f"{file}: the loss of step {line['step']} is {loss}"
                raise ValueError(f"{found}; only finite losses can be compared")
        return cls(label or (path.name if path.is_dir() else path.stem), path, tuple(lines))

    @property
    def steps(self) -> list[int]:
        return [line["step"] for line in self.lines]

    @property
    def losses(self) -> list[float]:
        return [float(line["loss"]) for line in self.lines]


@dataclass(frozen=True)
class Largest:
    """The largest difference of a run, and its step."""

    value: float
    step: int

    @classmethod
    def of(cls, values: Sequence[float], steps: Sequence[int]) -> Largest:
        at = max(range(len(values)), key=values.__getitem__)
        return cls(values[at], steps[at])


@dataclass(frozen=True)
class Compared:
    """One run compared with the first one."""

    curve: Curve
    absolute: tuple[float, ...]  # difference of the losses, by step
    relative: tuple[float, ...]  # the same, divided by the first run's loss
    largest_absolute: Largest
    largest_relative: Largest

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison for JSON."""
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
    """Compare every run, the first included, with the first. Raises ValueError if steps or data differ."""
    first = curves[0]
    for curve in curves[1:]:
        _check_comparable(first, curve)
    return [_against(first, curve) for curve in curves]


def write(compared: Sequence[Compared], folder: Path) -> list[Path]:
    """Write ``compare.json`` and ``compare.png``; return both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    curve, runs = compared[0].curve, [run.as_dict() for run in compared]
    document = {"reference": curve.label, "steps": curve.steps, "runs": runs}
    paths = [folder / "compare.json", folder / "compare.png"]
    paths[0].write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    drawn = [(run.curve.label, run.curve.losses, run.relative) for run in compared]
    paths[1].write_bytes(comparison_figure(curve.steps, drawn))
    return paths


def read_all(paths: Sequence[Path], labels: Sequence[str] = ()) -> list[Curve]:
    """Read a curve for each path. Raises ValueError if there are too few or too many labels, or equal names.
    """
    if labels and len(labels) != len(paths):
        raise ValueError(f"{len(labels)} labels for {len(paths)} runs; give one for each, in the same order")
    named = zip(paths, labels or [None] * len(paths), strict=True)
    curves = [Curve.read(path, label) for path, label in named]
    names = [curve.label for curve in curves]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"several runs are called {', '.join(twice)}; tell them apart with --labels")
    return curves


def _against(first: Curve, curve: Curve) -> Compared:
    absolute = tuple(abs(b - a) for a, b in zip(first.losses, curve.losses, strict=True))
    # A difference from a loss of 0 is infinitely large, no difference is 0 even there.
    pairs = zip(absolute, first.losses, strict=True)
    relative = tuple((d / abs(a) if a else math.inf) if d else 0.0 for d, a in pairs)
    largest = [Largest.of(values, curve.steps) for values in (absolute, relative)]
    return Compared(curve, absolute, relative, *largest)


def _check_comparable(first: Curve, curve: Curve) -> None:
    """Raise ValueError unless both runs have the same steps over the same data."""
    if first.steps != curve.steps:
        alone = min(set(first.steps) ^ set(curve.steps))
        raise ValueError(
            f"{curve.label} has {len(curve.steps)} logged steps up to {curve.steps[-1]}, {first.label} has "
            f"{len(first.steps)} up to {first.steps[-1]} (step {alone} is in only one of them); run both "
            "with the same training.max_steps and log_interval"
        )
    for a, b in zip(first.lines, curve.lines, strict=True):
        for name in SAME_DATA:
            if name in a and name in b and a[name] != b[name]:
                raise ValueError(
                    f"{curve.label} trained on other data than {first.label} at step {a['step']}: its {name} "
                    f"is {b[name]} instead of {a[name]}; give both the same store, seed, data.pack_tokens "
                    "and dp * gradient_accumulation"
                )
