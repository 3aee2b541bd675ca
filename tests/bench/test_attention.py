"""bench_attention.py times the attention of training, and checks its options before it needs a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from eagle_ds.bench.attention import intervals
from eagle_ds.bench.synthetic_data import document_in_exact_turns
from eagle_ds.estimate.sequences import document_in_turns
from eagle_ds.kernels.attention import ReferenceAttention
from eagle_ds.model.ttt import PrefixAttention
from eagle_ds.parallel.exchange import SequenceExchange
from eagle_ds.sharding.sequence import Document, shard_sequence
from tests.micro_batch import SOLO

TOOL = Path(__file__).resolve().parents[2] / "tools/bench_attention.py"
TIMEOUT_S = 300  # for hangs only: at least ten times what the command takes on an idle machine


def test_the_timed_rows_see_the_keys_that_they_see_in_training() -> None:
    documents = [Document(40, ((3, 20), (31, 40))), Document(9, ()), Document(25, ((0, 25),))]
    sharding = shard_sequence(documents, ttt_steps=7)
    prefix = PrefixAttention(SequenceExchange(sharding, SOLO, 4, 2), ReferenceAttention(), head_dim=8)
    lo, hi, keys = intervals(documents, 7)
    bounds = prefix.bounds(0, 0)
    assert np.array_equal(lo, bounds.lo) and np.array_equal(hi, bounds.hi) and keys == sharding.num_tokens


def test_a_turn_longer_than_its_share_is_refused() -> None:
    told = r"a turn of 512 tokens is more than 0.5 of 256; give --turn 128 or less"
    with pytest.raises(ValueError, match=told):
        document_in_exact_turns(256, 0.5, 512)
    assert document_in_exact_turns(256, 0.5, 128) == document_in_turns(256, 0.5, 128)
    assert document_in_exact_turns(256, 1, 512) == document_in_turns(256, 1, 512)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--kv-heads", "0"), "--kv-heads 0 is out of range; give 1 or more"),
        (("--seq", "0"), "--seq 0 is out of range; give 1 or more"),
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
