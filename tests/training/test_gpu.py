"""Training on a GPU: bfloat16 with ZeRO-1 and float32 masters learns as float32 on the CPU does, and
resumes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from eagle_ds.config.recipe import Recipe
from tests.training.tiny_run import Tiny, make_tiny

pytestmark = pytest.mark.gpu

BF16_BOUND = 3e-2  # relative difference of losses: bfloat16 has 8 significant bits
GPU_DRAFT = {
    "draft__head_dim": 16,
    "draft__num_attention_heads": 4,
}  # the kernels need a head size that is a power of two, at least 16
READ = (
    "import sys; from eagle_ds.config.recipe import Recipe; "
    "recipe = Recipe.model_validate_json(open(sys.argv[1]).read()); "
)
TRAIN = READ + "from tests.training.training_ranks import run_training; run_training(0, 1, recipe)"
STEP = READ + (
    "from tests.bench.step_ranks import step_without_waiting; "
    "from eagle_ds.sharding.sequence import Document; "
    "step_without_waiting(recipe, Document(4096, ((1024, 1536), (2048, 4096))))"
)


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    return make_tiny(tmp_path, labels=False, dtype="bfloat16")


def run_alone(code: str, recipe: Recipe, accelerator: str) -> None:
    """Run ``code`` in a new process that gets the recipe as ``recipe``."""
    path = recipe.run_dir.with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(recipe.model_dump_json())
    environment = {
        **os.environ,
        "DS_ACCELERATOR": accelerator,
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_SIZE": "1",
    }
    found = subprocess.run(
        [sys.executable, "-c", code, str(path)], env=environment, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr[-3000:]


def train_alone(recipe: Recipe, accelerator: str) -> list[dict[str, Any]]:
    """Train in a new process. Returns the lines of the log."""
    run_alone(TRAIN, recipe, accelerator)
    return [json.loads(line) for line in (recipe.run_dir / "log.jsonl").read_text().splitlines()]


def test_bfloat16_on_the_gpu_learns_as_float32_on_the_cpu(tiny: Tiny) -> None:
    settings = {
        **GPU_DRAFT,
        "training__max_steps": 20,
        "data__pack_tokens": 100,
        "training__eval_interval": 10,
    }
    gpu = train_alone(
        tiny.recipe("gpu", **settings, deepspeed=str(tiny.root / "ds_bf16_stage1.json")), "cuda"
    )
    cpu = train_alone(tiny.recipe("cpu", **settings), "cpu")
    assert [line["loss"] for line in gpu] == pytest.approx([line["loss"] for line in cpu], rel=BF16_BOUND)
    assert all(line["peak_gib"] < 1 for line in gpu)


def test_a_gpu_run_resumes_from_its_checkpoint(tiny: Tiny) -> None:
    ds_json = str(tiny.root / "ds_bf16_stage1.json")
    settings = {**GPU_DRAFT, "data__pack_tokens": 100, "training__schedule": "constant", "deepspeed": ds_json}
    whole = train_alone(tiny.recipe("whole", **settings, training__max_steps=6), "cuda")
    train_alone(tiny.recipe("halves", **settings, training__max_steps=3), "cuda")
    halves = train_alone(tiny.recipe("halves", **settings, training__max_steps=6), "cuda")
    assert [line["loss"] for line in halves] == pytest.approx([line["loss"] for line in whole], rel=1e-3)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(
    "layout",
    [{"parallel__ulysses": 4}, {"parallel__ring": 4, "parallel__ring_mode": "p2p"}],
    ids=["U4", "R4"],
)
def test_forward_and_backward_do_not_wait_for_the_gpu(
    tiny: Tiny, layout: dict[str, Any], recompute: str
) -> None:
    settings = {**GPU_DRAFT, **layout, "training__recompute": recompute, "data__max_length": 4096}
    run_alone(STEP, tiny.recipe("step", **settings, deepspeed=str(tiny.root / "ds_bf16_stage1.json")), "cuda")
