"""The staged backend gives what gloo gives, for every collective. Here the tensors are on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.bench import staged_ranks as work
from tests.gloo_pool import GlooPool


@pytest.fixture(scope="module")
def pool() -> Iterator[GlooPool]:
    with GlooPool(4, "staged") as workers:
        yield workers


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_every_collective_gives_what_gloo_gives(pool: GlooPool, world: int, dtype: torch.dtype) -> None:
    for rank, results in enumerate(pool.run(work.both_ways, world, dtype)):
        for name, (staged, gloo) in results.items():
            assert staged.dtype == gloo.dtype and torch.equal(staged, gloo), f"{name} on rank {rank}"


@pytest.mark.parametrize("world", [2, 4])
def test_reduce_scatter_gives_each_rank_its_part(pool: GlooPool, world: int) -> None:
    total = sum(work.own(rank, torch.float32, world, 3) for rank in range(world))
    for rank, (by_list, by_tensor, average) in enumerate(pool.run(work.reduce_scatters, world)):
        assert torch.equal(by_list.float(), total[rank]) and torch.equal(by_tensor, by_list)
        assert torch.equal(average, (total[rank] / world).bfloat16())


def test_collectives_have_the_names_of_torch_2_11(pool: GlooPool) -> None:
    gathered = torch.cat([work.own(rank, torch.float32, 2) for rank in range(2)])
    for rank, (everyone, part, turned) in enumerate(pool.run(work.older_names, 2)):
        summed = 3 * gathered[2 * rank :][:2]
        assert torch.equal(everyone, gathered) and torch.equal(part, summed) and turned.tolist() == [0, 1]


def test_bfloat16_is_summed_in_float32(pool: GlooPool) -> None:
    assert pool.run(work.narrow_sum, 4) == [260.0] * 4  # 259 to the nearest bfloat16


def test_objects_and_barriers_work(pool: GlooPool) -> None:
    expected = ("staged", [{"rank": rank} for rank in range(4)], [{"from": 0}])
    assert pool.run(work.control_messages, 4) == [expected] * 4


@pytest.mark.parametrize("world", [2, 4])
def test_ring_and_ulysses_exchange_as_over_gloo(pool: GlooPool, world: int) -> None:
    for results in pool.run(work.exchanges, world):
        assert all(torch.equal(staged, gloo) for staged, gloo in results.values())


def test_deepspeed_trains_as_over_gloo(pool: GlooPool) -> None:
    staged = pool.run(work.zero1_steps, 2, "staged")
    with GlooPool(2) as plain:
        gloo = plain.run(work.zero1_steps, 2, "gloo")
    for found in (*staged, *gloo):
        assert all(torch.equal(a, b) for a, b in zip(found, gloo[0], strict=True))
