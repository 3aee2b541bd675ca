"""Sequences that cannot fit are refused before training; an out-of-memory error says what to change."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eagle_ds.config.recipe import Recipe
from eagle_ds.estimate.devices import GIB
from eagle_ds.training.agreement import RankFailure
from eagle_ds.training.checkpoint import latest
from eagle_ds.training.sizing import host_memory_bytes, is_out_of_memory
from tests.gloo_pool import GlooPool, free_port
from tests.training.test_resume import lines
from tests.training.tiny_run import Tiny, make_tiny
from tests.training.training_ranks import refusal, run_into, run_training

CUDA_ERROR = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def test_all_ranks_refuse_together_what_one_gpu_cannot_hold(pool: GlooPool, tiny: Tiny) -> None:
    found = pool.run(refusal, 2, tiny.recipe(parallel__ring=2), [80 * GIB, 3 * GIB // 2])
    assert found[0] == found[1]
    assert re.match(
        r"rank 1: a sequence of \d+ tokens .* needs about 1.5 GiB a GPU on ulysses 1 \* ring 2, and 1.4 GiB",
        found[0],
    )
    assert "0 tokens would fit" in found[0] and "--training.check_memory false" in found[0]


def test_what_fits_is_not_refused(pool: GlooPool, tiny: Tiny) -> None:
    assert pool.run(refusal, 2, tiny.recipe(parallel__ring=2), [80 * GIB, 2 * GIB]) == ["", ""]


def test_a_host_too_small_for_offloaded_activations_is_refused(pool: GlooPool, tiny: Tiny) -> None:
    recipe = tiny.recipe(parallel__ring=2, training__offload_activations=True)
    found = pool.run(refusal, 2, recipe, [80 * GIB, 80 * GIB], 1000)
    assert re.match(
        r"training.offload_activations would pin about [\d.]+ GiB of host memory "
        r"for 2 processes, and 0.0 GiB",
        found[0],
    )
    assert pool.run(refusal, 2, recipe, [80 * GIB, 80 * GIB]) == ["", ""]
    assert 0 < host_memory_bytes() < 1 << 50


def test_the_check_can_be_switched_off(pool: GlooPool, tiny: Tiny) -> None:
    recipe = tiny.recipe(parallel__ring=2, training__check_memory=False)
    assert pool.run(refusal, 2, recipe, [80 * GIB, GIB]) == ["", ""]


def test_out_of_memory_says_what_to_change_and_the_run_resumes(pool: GlooPool, tiny: Tiny) -> None:
    """Uses the real launcher, which ends the other rank: that one waits in a collective for the failed
    rank.
    """
    settings = {"training__max_steps": 4, "training__save_interval": 2, "parallel__ring": 2}
    whole, broken = (tiny.recipe(name, **settings) for name in ("whole", "broken"))
    pool.run(run_training, 2, whole)
    ended = launched(broken, "memory", rank=1, micro_batch=4)
    assert ended.returncode != 0
    text = next(line for line in ended.stderr.splitlines() if line.startswith("error (rank 1): "))
    assert (
        "out of memory after step 3 of 4 (CUDA out of memory. Tried to allocate 2.00 GiB.): "
        "by prediction a sequence of "
        in text
    )
    assert "GiB a GPU on ulysses 1 * ring 2; " in text and "tokens would fit; " in text
    assert (
        "; the checkpoint of step 2 is complete, the same command resumes from it; "
        "the launcher ends the other ranks"
        in text
    )
    assert latest(broken.run_dir).step == 2
    pool.run(run_training, 2, broken)
    assert lines(broken.run_dir / "log.jsonl") == lines(whole.run_dir / "log.jsonl")


def launched(recipe: Recipe, fault: str, *, rank: int, micro_batch: int) -> subprocess.CompletedProcess[str]:
    """Run two processes of ``launched_run.py`` under DeepSpeed's launcher."""
    path = Path(recipe.output_dir).with_suffix(".json")
    path.parent.mkdir(exist_ok=True)
    path.write_text(recipe.model_dump_json())
    script = Path(__file__).with_name("launched_run.py")
    command = [
        "-m",
        "deepspeed.launcher.runner",
        "--num_gpus",
        "2",
        "--master_port",
        str(free_port()),
        str(script),
    ]
    variables = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    }
    arguments = [sys.executable, *command, str(path), fault, str(rank), str(micro_batch)]
    variables |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.run(arguments, env=variables, capture_output=True, text=True, timeout=900, check=False)


def test_out_of_memory_before_the_first_checkpoint_says_so(pool: GlooPool, tiny: Tiny) -> None:
    _, text = pool.run(run_into, 1, tiny.recipe("early"), RuntimeError("Triton Error [CUDA]: out of memory"))[
        0
    ]
    assert text.startswith("out of memory after step 0 of 4") and "nothing was saved yet" in text


def test_out_of_memory_before_the_first_step_says_what_would_fit(pool: GlooPool, tiny: Tiny) -> None:
    kind, text = pool.run(run_into, 1, tiny.recipe("made"), CUDA_ERROR, "eagle_ds.training.train.build")[0]
    assert kind == "OutOfMemory"
    assert text.startswith(
        "out of memory before the first step (CUDA out of memory. Tried to allocate 2.00 GiB.): "
        "by prediction "
    )
    assert "tokens would fit; " in text


def test_other_errors_are_left_alone(pool: GlooPool, tiny: Tiny) -> None:
    assert pool.run(run_into, 1, tiny.recipe("other"), RuntimeError("shapes differ")) == [
        ("RuntimeError", "shapes differ")
    ]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (CUDA_ERROR, True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RankFailure("rank 1: OutOfMemoryError: CUDA out of memory."), True),
        (RankFailure("rank 1: the file was cut"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected
