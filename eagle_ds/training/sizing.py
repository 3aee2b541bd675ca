"""Decide from sizes, before the first step: the ring's mode, and whether the largest sequence fits.

Running out of memory hours into a run is expensive, so the largest sequence of the first epoch is checked at
the start. The same estimate says what to change if a run is out of memory nevertheless.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from eagle_ds.config.deepspeed import element_bytes
from eagle_ds.config.recipe import Recipe
from eagle_ds.data.packing import Pack, ShardingSettings, TrainSample
from eagle_ds.estimate.devices import GIB, Device
from eagle_ds.estimate.fit import Setup, choose_ring_mode, describe_need
from eagle_ds.sharding.sequence import SequenceSharding
from eagle_ds.training.agreement import RankFailure
from eagle_ds.training.world import World

logger = logging.getLogger(__name__)


class OutOfMemory(ValueError):
    """Memory ran out on this rank, perhaps on no other.

    The others then wait for it in a collective, so this rank exits at once (`stopping.leave_at_once`) and the
    launcher ends the rest.
    """


def sharding_settings(
    recipe: Recipe, samples: Sequence[TrainSample], element: int, world: World
) -> ShardingSettings:
    """Return how sequences are sharded. ``ring_mode`` "auto" is decided once, for the longest sequence.

    Args:
        element: bytes of one number of K_0/V_0.
    """
    longest = max(recipe.data.pack_tokens or 0, *(sample.document.num_tokens for sample in samples))
    mode = choose_ring_mode(recipe, longest, element, world.memory_bytes)
    if recipe.parallel.ring > 1:
        text = "K_0/V_0 of other ring ranks: %s (ring_mode %s, sequences of up to %d tokens)"
        logger.info(text, mode, recipe.parallel.ring_mode, longest)
    return ShardingSettings.from_recipe(recipe, mode)


def setup_of(recipe: Recipe, config: dict[str, Any], world: World) -> Setup:
    """Return what the estimates need to know. On a CPU the device is this rank's share of the host."""
    device = Device(world.device.type, world.memory_bytes / GIB)
    return Setup(recipe, config, world.topology.world_size, device)


@dataclass(frozen=True)
class Sizes:
    """How sequences are sharded, and what they need of this world's devices."""

    world: World
    setup: Setup
    settings: ShardingSettings

    @classmethod
    def decide(cls, setup: Setup, samples: Sequence[TrainSample], world: World) -> Sizes:
        """Choose the sharding for sequences made of ``samples``."""
        element = element_bytes(setup.ds_json)
        return cls(world, setup, sharding_settings(setup.recipe, samples, element, world))

    def largest(self, samples: Sequence[TrainSample], packs: Sequence[Pack]) -> SequenceSharding:
        """Return the sharding of the pack that is predicted to need the most memory.

        Predicting all packs would take too long. The largest has the most tokens, the most query rows, or the
        largest weighted sum of both, so only those three are predicted.
        """
        tokens = {pack: sum(samples[n].document.num_tokens for n in pack) for pack in packs}
        queries = {pack: sum(samples[n].query_rows for n in pack) for pack in packs}
        weight = {pack: tokens[pack] + self.settings.ttt_steps * queries[pack] for pack in packs}
        candidates = {max(packs, key=measure.__getitem__) for measure in (tokens, queries, weight)}
        shardings = (self.settings.shard([samples[n].document for n in pack]) for pack in candidates)
        return max(shardings, key=partial(predicted_peak, self.setup))

    def check(self, samples: Sequence[TrainSample], packs: Sequence[Pack]) -> None:
        """Log what the largest of ``packs`` is predicted to need; refuse it if it does not fit. Collective.

        With ``training.check_memory`` false this warns instead. A CPU run is never refused: its memory is
        shared with other processes, so what is free now says little.

        Raises RankFailure on all ranks if the sequence does not fit on any GPU, or offloaded activations on
        any host.
        """
        sharding = self.largest(samples, packs)
        text = "largest sequence: %d tokens, %d trained rows, about %.1f GiB a process"
        peak = predicted_peak(self.setup, sharding)
        logger.info(text, sharding.num_tokens, sharding.num_queries, peak / GIB)
        balance = ", ".join(f"{name} {value:.3f}" for name, value in sharding.balance.items())
        logger.info("busiest rank / mean: %s", balance)
        if self.world.device.type != "cuda":
            return
        if faster := self.setup.faster_recompute(sharding):
            logger.info("%s", faster)
        neighbours = self.world.agreement.gather_objects(socket.gethostname()).count(socket.gethostname())
        if self.setup.recipe.training.check_memory:
            self.world.agreement.together(lambda: self.refuse(sharding, neighbours))
            return
        try:
            self.refuse(sharding, neighbours)
        except ValueError as error:
            logger.warning("training.check_memory is false, so the run starts although: %s", error)

    def refuse(self, sharding: SequenceSharding, neighbours: int) -> None:
        """Raise ValueError, naming what would fit, if the sequence is predicted not to fit.

        Args:
            neighbours: processes on this host, this one included. They share the host's memory.
        """
        self.setup.check_fits(sharding)
        wanted, free = neighbours * self.setup.memory(sharding).host_bytes, host_memory_bytes()
        if wanted > free:
            raise ValueError(
                f"training.offload_activations would pin about {wanted / GIB:.1f} GiB of host memory for "
                f"{neighbours} processes, and {free / GIB:.1f} GiB are free; turn it off, use more hosts, or "
                "shorten data.max_length; --training.check_memory false tries it all the same"
            )


def predicted_peak(setup: Setup, sharding: SequenceSharding) -> int:
    """Predict the peak memory of the busiest rank on the device that it really has, a GPU or a CPU."""
    return setup.memory(sharding, cpu=setup.device.name != "cuda").peak_bytes


def after_out_of_memory(setup: Setup, sharding: SequenceSharding) -> str:
    """Return what the sequence was predicted to need, and what to change now that it did not fit.

    The prediction may have been that it fits. The advice then assumes a device of slightly less than the
    predicted need, because the real memory proved to be smaller than that.
    """
    device, needed = setup.device, predicted_peak(setup, sharding)
    share = min(1.0, 0.98 * needed / device.usable_bytes)
    smaller = replace(setup, device=Device(device.name, share * device.memory_gib))
    return f"by prediction {describe_need(sharding, needed)}; {smaller.advice(sharding)}"


def host_memory_bytes() -> int:
    """Return the host memory still available: Linux's estimate, limited by the container."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) << 10
    limit, used = (Path("/sys/fs/cgroup", name) for name in ("memory.max", "memory.current"))
    if limit.is_file() and used.is_file() and (most := limit.read_text().strip()) != "max":
        free = min(free, int(most) - int(used.read_text()))
    return free


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed.

    PyTorch has an exception for its own allocator. CUDA libraries, Triton and pinned host memory only say so
    in their text, and an error in a reading thread arrives as a RankFailure that carries the text.
    """
    said = isinstance(error, RuntimeError | RankFailure) and "out of memory" in str(error).lower()
    return said or isinstance(error, torch.OutOfMemoryError)
