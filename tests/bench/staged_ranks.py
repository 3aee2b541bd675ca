"""Functions that each process of the staged backend's tests runs, over that backend and over gloo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed import comm
from torch import Tensor

from eagle_ds.parallel.ring import RingExchange
from eagle_ds.parallel.topology import Group
from eagle_ds.parallel.ulysses import UlyssesExchange
from eagle_ds.sharding.heads import HeadSharding

ZERO1_BF16 = {
    "train_micro_batch_size_per_gpu": 1,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 1},
    "data_types": {"grad_accum_dtype": "fp32"},
    "gradient_clipping": 1.0,
}


def both_ways(rank: int, world: int, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """Return each collective's (result over staged, result over gloo) on this rank."""
    gloo = dist.new_group(backend="gloo")
    return {
        name: (call(rank, world, dtype, None), call(rank, world, dtype, gloo)) for name, call in CALLS.items()
    }


def own(rank: int, dtype: torch.dtype, *shape: int) -> Tensor:
    """Return small integers, which are exact in every dtype and differ between ranks."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(-8, 8, shape, generator=generator).to(dtype)


def _all_reduce(rank: int, world: int, dtype: torch.dtype, group: Any) -> Tensor:
    tensor = own(rank, dtype, 3, 5).t()  # not contiguous
    dist.all_reduce(tensor, group=group)
    return tensor


def _all_reduce_max(rank: int, world: int, dtype: torch.dtype, group: Any) -> Tensor:
    tensor = own(rank, dtype, 7)
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group=group, async_op=True).wait()
    return tensor


def _broadcast(rank: int, world: int, dtype: torch.dtype, group: Any) -> Tensor:
    tensor = own(rank, dtype, 4)
    dist.broadcast(tensor, src=1, group=group)
    return tensor


def _all_gather(rank: int, world: int, dtype: torch.dtype, group: Any) -> Tensor:
    tensors = [torch.empty(2, 3, dtype=dtype) for _ in range(world)]
    dist.all_gather(tensors, own(rank, dtype, 2, 3), group=group)
    return torch.stack(tensors)


def _all_gather_into_tensor(rank: int, world: int, dtype: torch.dtype, group: Any) -> Tensor:
    output = torch.empty(world * 2, 3, dtype=dtype)
    comm.all_gather_into_tensor(output, own(rank, dtype, 2, 3), group=group)
    return output


def _reduce(rank: int, world: int, dtype: torch.dtype, group: Any) -> Tensor:
    tensor = own(rank, dtype, 4)
    dist.reduce(tensor, dst=world - 1, group=group)
    return tensor if rank == world - 1 else torch.zeros(())  # other ranks' tensors are undefined


def _gather(rank: int, world: int, dtype: torch.dtype, group: Any) -> Tensor:
    tensors = [torch.empty(2, 3, dtype=dtype) for _ in range(world)] if rank == 1 else None
    dist.gather(own(rank, dtype, 2, 3), tensors, dst=1, group=group)
    return torch.stack(tensors) if tensors else torch.zeros(())


def _scatter(rank: int, world: int, dtype: torch.dtype, group: Any) -> Tensor:
    output = torch.empty(3, dtype=dtype)
    dist.scatter(output, list(own(rank, dtype, world, 3)) if rank == 0 else None, src=0, group=group)
    return output


def _all_to_all_even(rank: int, world: int, dtype: torch.dtype, group: Any) -> Tensor:
    output = torch.empty(world * 2, 3, dtype=dtype)
    comm.all_to_all_single(output, own(rank, dtype, world * 2, 3), group=group)
    return output


def _all_to_all_uneven(rank: int, world: int, dtype: torch.dtype, group: Any) -> Tensor:
    """Rank r sends r * d rows to rank d; some messages are empty."""
    sent, received = [rank * d for d in range(world)], [r * rank for r in range(world)]
    output = torch.empty(sum(received), 2, dtype=dtype)
    dist.all_to_all_single(output, own(rank, dtype, sum(sent), 2), received, sent, group=group)
    return output


def _neighbours(rank: int, world: int, dtype: torch.dtype, group: Any) -> Tensor:
    """Send to the next rank and receive from the one before, blocking, in an order that cannot deadlock."""
    tensor, arrived = own(rank, dtype, 3), torch.empty(3, dtype=dtype)
    calls: list[Callable[[], Any]] = [
        lambda: dist.send(tensor, (rank + 1) % world, group=group),
        lambda: dist.recv(arrived, (rank - 1) % world, group=group),
    ]
    for call in calls if rank % 2 == 0 else calls[::-1]:
        call()
    return arrived


CALLS = {
    call.__name__.lstrip("_"): call
    for call in (
        *(
            _all_reduce, _all_reduce_max, _broadcast, _all_gather,
            _all_gather_into_tensor, _reduce, _gather, _scatter
        ),
        *(_all_to_all_even, _all_to_all_uneven, _neighbours),
    )
}


def reduce_scatters(rank: int, world: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return bfloat16 sums from a list and from one tensor, and an average (not in every torch's gloo)."""
    whole, outputs = own(rank, torch.bfloat16, world, 3), [
        torch.empty(3, dtype=torch.bfloat16) for _ in range(3)
    ]
    dist.reduce_scatter(outputs[0], list(whole))
    comm.reduce_scatter_tensor(outputs[1], whole.view(-1))
    dist.reduce_scatter_tensor(outputs[2], whole.view(-1), op=dist.ReduceOp.AVG)
    return outputs[0], outputs[1], outputs[2]


def older_names(rank: int, world: int) -> tuple[Tensor, Tensor, Tensor]:
    """Call all-gather, reduce-scatter and all-to-all by the names of torch 2.11."""
    group, options = dist.group.WORLD, dist.ReduceScatterOptions()
    everyone, part, turned = torch.empty(world * 2), torch.empty(2), torch.empty(world)
    group._allgather_base(everyone, own(rank, torch.float32, 2)).wait()
    group._reduce_scatter_base(part, everyone * (rank + 1), options).wait()
    group.alltoall_base(turned, torch.full((world,), float(rank)), [], [], dist.AllToAllOptions()).wait()
    return everyone, part, turned


def narrow_sum(rank: int, world: int) -> float:
    """Return 256 + 1 + 1 + ...; summing in bfloat16 would lose each 1."""
    tensor = torch.tensor([256.0 if rank == 0 else 1.0], dtype=torch.bfloat16)
    dist.all_reduce(tensor)
    return tensor.item()


def control_messages(rank: int, world: int) -> tuple[str, list[Any], list[Any]]:
    """Return the backend's name and objects sent through it, with barriers in between."""
    everyone, sent = [None] * world, [{"from": 0} if rank == 0 else None]
    dist.all_gather_object(everyone, {"rank": rank})
    dist.barrier()
    comm.barrier()
    dist.broadcast_object_list(sent, src=0)
    return dist.get_backend(), everyone, sent


def exchanges(rank: int, world: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Exchange as ring and Ulysses do, over both backends; with four ranks, in groups of two."""
    results: dict[str, list[Tensor]] = {}
    for backend in (None, "gloo"):
        members = [m for m in ([0, 1], [2, 3]) if m[-1] < world]
        handles = {tuple(m): dist.new_group(m, backend=backend) for m in members}
        pair = next(tuple(m) for m in members if rank in m)
        group = Group(pair, pair.index(rank), handles[pair])
        for name, result in {
            "ring": _around(group), "gathered": _gathered(group), "heads": _heads(group)
        }.items():
            results.setdefault(name, []).append(result)
    return {name: (found[0], found[1]) for name, found in results.items()}


def _around(group: Group) -> Tensor:
    """Start two rotations at the same time, then rotate again what arrived."""
    exchange, block = RingExchange(group, [((0, 3),), ((3, 6),)]), own(
        group.ranks[group.rank], torch.bfloat16, 3, 2
    )
    first, second = exchange.rotate(block, 3), exchange.rotate(block + 1, 3)
    return torch.stack([exchange.rotate(first.wait(), 3).wait(), second.wait()])


def _gathered(group: Group) -> Tensor:
    exchange = RingExchange(group, [((0, 1), (4, 6)), ((1, 4),)])
    whole = exchange.gather(own(group.ranks[group.rank], torch.float32, 3, 2))
    return exchange.scatter_sum(whole * (1 + group.rank))


def _heads(group: Group) -> Tensor:
    exchange, counts = UlyssesExchange(group, HeadSharding(4, 1, group.size)), [3, 1]
    rows = own(group.ranks[group.rank], torch.bfloat16, counts[group.rank], 4, 2)
    there = exchange.to_heads(rows, counts)
    return torch.cat([
        exchange.to_rows(there * 2, counts),
        exchange.slots_to_kv(exchange.kv_to_slots(rows[:, :1], counts), counts)
    ], 1)


def zero1_steps(rank: int, world: int, backend: str) -> list[Tensor]:
    """Return the weights after two steps of ZeRO-1 in bfloat16 over a default group of ``backend``."""
    assert dist.get_backend() == backend
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=list(model.parameters()), config=ZERO1_BF16
    )
    for step in range(2):
        engine.backward(engine(own(10 * step + rank, torch.bfloat16, 4, 6)).square().mean())
        engine.step()
    return [parameter.detach().clone() for parameter in model.parameters()]
