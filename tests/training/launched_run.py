"""One rank of a run under DeepSpeed's launcher, with a fault.

Usage: launched_run.py RECIPE.json FAULT RANK MICRO_BATCH

The fault happens on rank RANK, after its micro-batch number MICRO_BATCH: "memory" raises an out-of-memory
error, "term" sends SIGTERM.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from eagle_ds import launch
from eagle_ds.config.recipe import Recipe
from eagle_ds.data.batch import Batch
from eagle_ds.training.step import MicroBatchRunner


def main() -> None:
    path, fault, faulty_rank, at_call = [
        argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")
    ]
    recipe, rank, calls = Recipe.model_validate_json(Path(path).read_text()), int(os.environ["RANK"]), []
    original = MicroBatchRunner.__call__

    def call(self: MicroBatchRunner, batch: Batch, weights: Tensor) -> object:
        found = original(self, batch, weights)
        calls.append(batch)
        if rank == int(faulty_rank) and len(calls) == int(at_call):
            if fault == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    with mock.patch.object(MicroBatchRunner, "__call__", call):
        launch._train(recipe, rank)


if __name__ == "__main__":
    main()
