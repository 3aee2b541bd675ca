"""One rank of tools/bench_step.py whose GPU runs out of memory at the second shape.

Usage: python launched_bench_step.py RANK OPTIONS... where RANK is the rank that fails.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from eagle_ds.bench.step import StepBench

TOOL = Path(__file__).resolve().parents[2] / "tools" / "bench_step.py"
STEPS_OF_THE_FIRST = 2  # steps of the first shape: one to warm up, one timed


def main() -> None:
    victim, calls = sys.argv.pop(1), []
    forward = StepBench._forward

    def forward_or_fail(self: StepBench) -> Tensor | None:
        calls.append(self)
        if os.environ["RANK"] == victim and len(calls) > STEPS_OF_THE_FIRST:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self)

    with mock.patch.object(StepBench, "_forward", forward_or_fail):
        runpy.run_path(str(TOOL), run_name="__main__")


if __name__ == "__main__":
    main()
