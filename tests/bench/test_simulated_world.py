"""Ranks that share GPUs take them in turn and divide their memory."""

from __future__ import annotations

import os
from unittest.mock import Mock

import pytest
import torch

from eagle_ds.bench import simulated_world
from eagle_ds.parallel.topology import Topology
from eagle_ds.training import world


@pytest.mark.parametrize(("gpus", "expected"), [(1, [0, 0, 0, 0]), (3, [0, 1, 2, 0])])
def test_ranks_take_the_gpus_in_turn(monkeypatch: pytest.MonkeyPatch, gpus: int, expected: list[int]) -> None:
    accelerator = Mock(**{"device_name.return_value": "cuda"})
    monkeypatch.setattr(world, "get_accelerator", lambda: accelerator)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for local_rank, index in enumerate(expected):
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        assert simulated_world.take_shared_device(local_rank) == torch.device("cuda", index)
        assert os.environ["LOCAL_RANK"] == str(index)  # DeepSpeed's engine selects its GPU by it
        accelerator.set_device.assert_called_with(index)
    assert world.take_device(2) == torch.device("cuda", 2)


def test_a_shared_gpus_memory_is_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Mock(total_memory=80 << 30))
    place = (Topology(4, 0, 4), Mock(), Mock(), torch.device("cuda", 0))
    joined = simulated_world.SharedWorld(*place, ranks_per_device=4)
    assert joined.memory_bytes == 20 << 30
