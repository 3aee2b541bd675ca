"""bench_attention.py times the attention of training, and checks its options before it needs a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from eagle_ds.bench.attention import intervals
from eagle_ds.kernels.attention import ReferenceAttention
from eagle_ds.model.ttt import PrefixAttention
from eagle_ds.parallel.exchange import SequenceExchange
from eagle_ds.parallel.topology import SOLO
from eagle_ds.sharding.sequence import Document, shard_sequence

TOOL = Path(__file__).resolve().parents[2] / "tools/bench_attention.py"
TIMEOUT_S = 300  # for hangs only: at least ten times what the command takes on an idle machine


def test_the_timed_rows_see_the_keys_that_they_see_in_training() -> None:
    documents = [Document(40, ((3, 20), (31, 40))), Document(9, ()), Document(25, ((0, 25),))]
    plan = shard_sequence(documents, ttt_steps=7)
    prefix = PrefixAttention(SequenceExchange(plan, SOLO, 4, 2), ReferenceAttention(), head_dim=8)
    lo, hi, keys = intervals(documents, 7)
    bounds = prefix.bounds(0, 0)
    assert np.array_equal(lo, bounds.lo) and np.array_equal(hi, bounds.hi) and keys == plan.num_tokens


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--kv-heads", "0"), "--kv-heads 0: give 1 or more"),
        (("--seq", "0"), "--seq 0: give 1 or more"),
        (
            ("--heads", "6", "--kv-heads", "4"),
            "--heads 6 is not a multiple of --kv-heads 4; each KV head serves the same number of query heads"
        ),
    ],
)
def test_a_wrong_option_gives_a_one_line_error(arguments: tuple[str, ...], said: str) -> None:
    done = subprocess.run(
        [sys.executable, str(TOOL), *arguments], capture_output=True,
        text=True, check=False, timeout=TIMEOUT_S
    )
    assert done.returncode == 1 and done.stderr == f"error: {said}\n"
