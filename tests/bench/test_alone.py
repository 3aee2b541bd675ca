"""One rank of a simulated world does that rank's work on that rank's rows, and all its numbers stay finite.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from eagle_ds.bench.process_groups import AloneGroup
from eagle_ds.bench.simulated_world import busiest_rank
from eagle_ds.sharding.sequence import Document
from tests.bench.step_ranks import alone_steps, outlived
from tests.gloo_pool import GlooPool
from tests.training.tiny_run import Tiny

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 600  # for hangs only: at least ten times what the command takes on an idle machine
BF16 = {
    "bf16": {"enabled": True, "check_grad_overflow": True},
    "data_types": {"grad_accum_dtype": "fp32"},
    "communication_data_type": "fp32",
}
LATE = Document(96, ((50, 96),))
LAYOUTS = [
    {"parallel__ulysses": 4},
    {"parallel__ring": 4, "parallel__ring_mode": "p2p"},
    {"parallel__ring": 4, "parallel__ring_mode": "gather"},
    {"parallel__ulysses": 2, "parallel__ring": 2},
    {"parallel__ulysses": 2},  # two sequences at once
]


@pytest.fixture(scope="module")
def pool() -> Iterator[GlooPool]:
    with GlooPool(1) as workers:
        yield workers


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    tiny = Tiny(tmp_path_factory.mktemp("alone"))
    for stage in (1, 3):
        (tiny.root / f"ds_{stage}.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    (tiny.root / "ds_bf16.json").write_text(json.dumps(BF16 | {"zero_optimization": {"stage": 1}}))
    return tiny


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: " ".join(map(str, layout.values())))
@pytest.mark.parametrize("config", ["ds_bf16", "ds_3"])
def test_a_rank_trains_alone(pool: GlooPool, tiny: Tiny, layout: dict, config: str) -> None:
    recipe = tiny.recipe(deepspeed=str(tiny.root / f"{config}.json"), **layout)
    for rank in (None, 3) if config == "ds_bf16" else (0,):
        (found,) = pool.run(alone_steps, 1, recipe, LATE, rank)
        assert found.rank == (busiest_rank(recipe, [LATE]) if rank is None else rank)
        assert found.finite and found.moved  # losses and weights are finite, gradients changed the weights
        assert found.rows == found.planned
        assert found.times.step_ms > 0


def test_a_dropped_bench_frees_its_memory(pool: GlooPool, tiny: Tiny) -> None:
    recipe = tiny.recipe(deepspeed=str(tiny.root / "ds_bf16.json"), parallel__ulysses=4)
    assert pool.run(outlived, 1, recipe, LATE) == [[]]


def test_the_busiest_rank_is_chosen(tiny: Tiny) -> None:
    """With two trained rows after a long prompt, rank 0 of four owns the extra ones; keys are equal."""
    assert busiest_rank(tiny.recipe(parallel__ulysses=4), [Document(1024, ((1019, 1024),))]) == 0


def test_a_rank_or_layout_outside_the_world_is_refused(pool: GlooPool, tiny: Tiny) -> None:
    recipe = tiny.recipe(parallel__ulysses=4, deepspeed=str(tiny.root / "ds_1.json"))
    with pytest.raises(AssertionError, match="rank 4 is out of range in a world of 4 ranks; use 0 to 3"):
        pool.run(alone_steps, 1, recipe, LATE, 4)
    with pytest.raises(AssertionError, match="world_size=4 is not a multiple of"):
        pool.run(alone_steps, 1, tiny.recipe(parallel__ulysses=8), LATE, None)
    with pytest.raises(AssertionError, match=r"rank 3 cannot run alone under ZeRO-3, .*; use rank 0"):
        pool.run(
            alone_steps, 1, tiny.recipe(parallel__ulysses=4, deepspeed=str(tiny.root / "ds_3.json")), LATE, 3
        )


def test_received_data_are_made_of_sent_data() -> None:
    group = AloneGroup(1, 3)
    sent, received = [torch.full((n,), float(n)) for n in (2, 0, 3)], [torch.empty(n) for n in (5, 2, 1)]
    group.alltoall(received, sent).wait()
    assert [x.tolist() for x in received] == [[2.0] * 5, [3.0] * 2, [3.0]]
    arrived = torch.empty(2, 3)
    group.send([torch.arange(4.0)], 2)
    group.recv([arrived], 0)
    assert arrived.flatten().tolist() == [0, 1, 2, 3, 0, 1]
    assert group.recv([arrived], 0).wait() and not arrived.any()
    buffer = torch.arange(6.0)
    group.all_gather_single(buffer, buffer[2:4])
    assert buffer.tolist() == [0, 1, 2, 3, 4, 5]  # in place: other ranks' parts stay
    group.all_gather_single(buffer, torch.tensor([7.0, 8.0]))
    assert buffer.tolist() == [7, 8] * 3
    fresh = torch.tensor([float("nan")] * 2 + [5.0, 6.0] + [float("nan")] * 2)  # as ZeRO-3 allocates it
    AloneGroup(1, 3, fills_gathers_in_place=True).all_gather_single(fresh, fresh[2:4])
    assert fresh.tolist() == [5, 6] * 3
    group.reduce_scatter_single(arrived[0, :2], buffer * torch.arange(6.0), dist.ReduceScatterOptions())
    assert arrived[0, :2].tolist() == [14, 24]


def test_the_tool_reports_one_rank_alone(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.json"
    recipe.write_text(tiny.recipe(deepspeed=str(tiny.root / "ds_1.json")).model_dump_json())
    options = [
        "--recipe", str(recipe), "--alone-of", "4", "--alone-rank",
        "2", "--ulysses", "4", "--steps", "1", "--ttt-steps", "2"
    ]
    command = [
        sys.executable, "tools/bench_step.py", *options, "--sweep", "64", "128", "--out", str(tmp_path)
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(text) for text in done.stdout.splitlines()]
    assert [
        (line["alone_of"], line["alone_rank"], line["gpus"], line["layout"]) for line in lines
    ] == [(4, 2, 4, "U4 R1")] * 2
    assert "one rank alone" in (tmp_path / "steps.md").read_text() and (tmp_path / "length.png").is_file()
