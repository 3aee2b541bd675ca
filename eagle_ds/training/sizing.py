"""What is decided from sizes before the first step: the ring's mode, and whether the largest sequence fits the GPU.

The same numbers say what to change where a run is out of memory all the same.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eagle_ds.config.deepspeed import bf16_enabled
from eagle_ds.config.recipe import Recipe
from eagle_ds.data.dataset import ShardingSettings
from eagle_ds.data.packing import Pack, TrainSample
from eagle_ds.estimate.memory import GIB, host_bytes, predict_memory
from eagle_ds.estimate.planner import Device, advice, check_fits, choose_ring_mode, describe_need, faster_recompute
from eagle_ds.sharding.sequence import SequenceSharding
from eagle_ds.training.agreement import RankFailure
from eagle_ds.training.world import World

logger = logging.getLogger(__name__)


class OutOfMemory(ValueError):
    """Memory ran out on this rank, maybe alone: others wait for it in a collective until it has left and the launcher ends them."""


def sharding_settings(recipe: Recipe, samples: Sequence[TrainSample], element: int, world: World) -> ShardingSettings:
    """How sequences are sharded; ``ring_mode`` auto is decided once, for the longest. ``element``: bytes of a state."""
    parallel, training = recipe.parallel, recipe.training
    longest = max(recipe.data.pack_tokens or 0, *(sample.document.num_tokens for sample in samples))
    mode = choose_ring_mode(recipe, longest, element, world.memory_bytes)
    if parallel.ring > 1:
        logger.info("K_0/V_0 of other ring ranks: %s (ring_mode %s, sequences of up to %d tokens)", mode, parallel.ring_mode, longest)
    return ShardingSettings(parallel.ulysses, parallel.ring, mode, training.ttt_steps, training.mask_alignment, parallel.trained_rows_only)


@dataclass(frozen=True)
class Sizes:
    """How sequences are sharded, and what a plan takes of this world's devices. ``config`` is what DeepSpeed is given."""

    recipe: Recipe
    config: dict[str, Any]
    world: World
    settings: ShardingSettings

    @classmethod
    def decide(cls, recipe: Recipe, config: dict[str, Any], samples: Sequence[TrainSample], world: World) -> Sizes:
        """Sharding for sequences of ``samples``."""
        return cls(recipe, config, world, sharding_settings(recipe, samples, 2 if bf16_enabled(config) else 4, world))

    @property
    def device(self) -> Device:
        """The GPU that this rank has, or its share of the host's memory."""
        return Device(self.world.device.type, self.world.memory_bytes / GIB)

    def need(self, sharding: SequenceSharding) -> int:
        """Predicted peak bytes of the busiest rank."""
        on_cpu = self.world.device.type != "cuda"
        return sum(predict_memory(self.recipe, self.config, self.world.topology.world_size, sharding, cpu=on_cpu).values())

    def largest(self, samples: Sequence[TrainSample], packs: Sequence[Pack]) -> SequenceSharding:
        """The plan of the pack that is predicted to take most, of the longest, the one with most query rows, and the heaviest."""
        tokens = {pack: sum(samples[n].document.num_tokens for n in pack) for pack in packs}
        queries = {pack: sum(samples[n].query_rows for n in pack) for pack in packs}
        weight = {pack: tokens[pack] + self.settings.ttt_steps * queries[pack] for pack in packs}
        candidates = {max(packs, key=measure.__getitem__) for measure in (tokens, queries, weight)}
        return max((self.settings.sharding([samples[n] for n in pack]) for pack in candidates), key=self.need)

    def check(self, samples: Sequence[TrainSample], packs: Sequence[Pack]) -> None:
        """Log what the largest of ``packs`` is predicted to take; raise RankFailure on all ranks if on any it does not fit its GPU,
        or what is offloaded its host.

        Collective. With ``training.check_memory`` false it warns instead. Never refuses on a CPU, whose memory others share.
        """
        sharding = self.largest(samples, packs)
        need, balance = self.need(sharding) / GIB, ", ".join(f"{name} {value:.3f}" for name, value in sharding.balance.items())
        logger.info("largest sequence: %d tokens, %d trained rows, about %.1f GiB a process", sharding.num_tokens, sharding.num_queries, need)
        logger.info("its busiest rank / mean: %s", balance)
        if self.world.device.type != "cuda":
            return
        if faster := faster_recompute(self.recipe, self.config, self.world.topology.world_size, sharding, self.device):
            logger.info("%s", faster)
        neighbours = self.world.agreement.gather_objects(socket.gethostname()).count(socket.gethostname())
        if self.recipe.training.check_memory:
            self.world.agreement.together(lambda: self.refuse(sharding, neighbours))
            return
        try:
            self.refuse(sharding, neighbours)
        except ValueError as error:
            logger.warning("training.check_memory is false, so this is tried: %s", error)

    def refuse(self, sharding: SequenceSharding, neighbours: int) -> None:
        """Raise ValueError if ``plan`` is predicted not to fit: with the GiB, the length and the setting that would.

        ``neighbours``: processes on this host, this one included.
        """
        check_fits(self.recipe, self.config, self.world.topology.world_size, sharding, self.device)
        wanted, there = neighbours * host_bytes(self.recipe, self.config, sharding), host_memory_bytes()
        if wanted > there:
            raise ValueError(
                f"training.offload_activations would pin about {wanted / GIB:.1f} GiB of host memory for {neighbours} processes, and "
                f"{there / GIB:.1f} GiB are free; switch it off, use more hosts, or shorten data.max_length; --training.check_memory false "
                "tries it all the same"
            )

    def after_out_of_memory(self, sharding: SequenceSharding) -> str:
        """What ``plan`` was predicted to take, and what to change now that it did not fit whatever was predicted."""
        return after_out_of_memory(self.recipe, self.config, self.world, sharding)


def after_out_of_memory(recipe: Recipe, config: dict[str, Any], world: World, sharding: SequenceSharding) -> str:
    """As ``Sizes.after_out_of_memory``."""
    device, size = Device(world.device.type, world.memory_bytes / GIB), world.topology.world_size
    needed = sum(predict_memory(recipe, config, size, sharding, cpu=world.device.type != "cuda").values())
    smaller = Device(device.name, min(device.memory_gib, 0.98 * needed / device.usable_bytes * device.memory_gib))
    return f"by prediction {describe_need(sharding, needed)}; {advice(recipe, config, size, sharding, smaller)}"


def host_memory_bytes() -> int:
    """What processes of this host may still take, by Linux's estimate and the container's limit."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) << 10
    limit, used = (Path("/sys/fs/cgroup", name) for name in ("memory.max", "memory.current"))
    if limit.is_file() and used.is_file() and (most := limit.read_text().strip()) != "max":
        free = min(free, int(most) - int(used.read_text()))
    return free


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: PyTorch's, a library's, that of pinned host memory, or any of these in a thread that reads ahead."""
    said = isinstance(error, RuntimeError | RankFailure) and "out of memory" in str(error).lower()
    return said or isinstance(error, torch.OutOfMemoryError)
