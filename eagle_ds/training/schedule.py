"""Learning rate as a function of the step number alone, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from eagle_ds.config.recipe import TrainingConfig


def learning_rate(step: int, total_steps: int, training: TrainingConfig) -> float:
    """Rate of optimizer step ``step`` (from 0) of ``total_steps``: a linear rise over ``warmup_ratio`` of all steps to the
    peak, then ``schedule`` towards ``min_learning_rate``, which the step after the last would have."""
    peak, least = training.learning_rate, training.min_learning_rate
    warmup = round(training.warmup_ratio * total_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if training.schedule == "constant":
        return peak
    progress = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
    left = 1 - progress if training.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return least + (peak - least) * left
