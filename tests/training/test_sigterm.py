"""SIGTERM ends a run on all ranks at the next step, with a checkpoint; at once if another rank has already
ended.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from eagle_ds.training.checkpoint import latest
from eagle_ds.training.stopping import EXIT_CODE
from tests.gloo_pool import GlooPool
from tests.training.test_resume import lines
from tests.training.tiny_run import Tiny, make_tiny
from tests.training.training_ranks import run_training, train_until_sigterm

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("save_interval", [0, 2])
def test_sigterm_to_one_rank_stops_all_ranks_and_the_run_resumes(
    pool: GlooPool, tiny: Tiny, save_interval: int
) -> None:
    settings = {"training__max_steps": 5, "training__save_interval": save_interval, "parallel__ring": 2}
    whole, halves = (tiny.recipe(f"{name}{save_interval}", **settings) for name in ("whole", "halves"))
    pool.run(run_training, 2, whole)
    assert pool.run(train_until_sigterm, 2, halves, 1, 2) == [EXIT_CODE, EXIT_CODE] == [143, 143]
    assert latest(halves.run_dir).step == 2
    pool.run(run_training, 2, halves)
    assert lines(halves.run_dir / "log.jsonl") == lines(whole.run_dir / "log.jsonl")


def test_sigterm_after_the_last_step_changes_nothing(pool: GlooPool, tiny: Tiny) -> None:
    recipe = tiny.recipe("last", training__max_steps=2, parallel__ring=2)
    assert pool.run(train_until_sigterm, 2, recipe, 0, 2) == [None, None]
    assert latest(recipe.run_dir).step == 2


BUSY_RANK = """
import sys, time
from eagle_ds.training.stopping import StopRequest
with StopRequest([int(sys.argv[1])]) as stop:
    print("ready", flush=True)
    end = time.monotonic() + 600
    while time.monotonic() < end:
        time.sleep(0.05)
        if stop.received:
            print("asked", flush=True)
            break
"""


@pytest.mark.parametrize("peer_lives", [True, False])
def test_a_rank_without_its_peer_leaves_at_once(peer_lives: bool) -> None:
    peer = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(900)"])
    rank = subprocess.Popen(
        [sys.executable, "-c", BUSY_RANK, str(peer.pid)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert rank.stdout.readline() == "ready\n"
        if not peer_lives:
            peer.kill()
            peer.wait()
        started = time.monotonic()
        rank.terminate()
        said = rank.stdout.read()
        assert rank.wait(120) == (0 if peer_lives else EXIT_CODE) and time.monotonic() - started < 60
        assert ("asked" in said) is peer_lives or not peer_lives
    finally:
        for process in (peer, rank):
            process.kill()
            process.wait()
