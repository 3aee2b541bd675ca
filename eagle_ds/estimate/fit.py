"""Decide whether a sequence fits the device. If not, find the longest that does, and the cheapest change.

The cheapest change is the one that makes the sequence fit and costs least time.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import Any

from eagle_ds.config.deepspeed import element_bytes
from eagle_ds.config.recipe import Recipe
from eagle_ds.estimate.devices import GIB, Device
from eagle_ds.estimate.memory import MemoryModel
from eagle_ds.estimate.sequences import document_in_turns, sharding_for
from eagle_ds.estimate.tensor_sizes import prefix_bytes
from eagle_ds.sharding.sequence import RingMode, SequenceSharding

RECOMPUTE = ("none", "selective", "mlp", "full")  # values of training.recompute, the fastest first
CPU_BYTES = 16 * GIB  # memory assumed for the ring mode on a CPU, whose real limit is not known
# Gather-once is used while K_0/V_0 and their gradients take at most this share of the memory
GATHER_SHARE = 0.15


def choose_ring_mode(recipe: Recipe, num_tokens: int, element: int, memory_bytes: float) -> RingMode:
    """Return ``parallel.ring_mode``. ``auto`` becomes "gather" if K_0/V_0 of all ranks fit, else "p2p".

    Args:
        element: bytes of one element of K_0/V_0.
        memory_bytes: memory of one device.
    """
    if recipe.parallel.ring_mode != "auto":
        return recipe.parallel.ring_mode
    return "gather" if prefix_bytes(recipe, num_tokens, element) <= GATHER_SHARE * memory_bytes else "p2p"


def describe_need(sharding: SequenceSharding, needed_bytes: int) -> str:
    """Return a clause that names the sequence, its layout and the memory predicted for it."""
    return (
        f"a sequence of {sharding.num_tokens} tokens with {sharding.num_queries} trained rows needs about "
        f"{needed_bytes / GIB:.1f} GiB a GPU on ulysses {sharding.ulysses} * ring {sharding.ring}"
    )


@dataclass(frozen=True)
class Setup:
    """One way to train: a recipe with its DeepSpeed JSON on ``world_size`` devices of one kind.

    Fit is judged with the memory model of a GPU, whatever the device: on a CPU every sequence is accepted.
    """

    recipe: Recipe
    ds_json: dict[str, Any]
    world_size: int
    device: Device

    def memory(self, sharding: SequenceSharding, *, cpu: bool = False) -> MemoryModel:
        """Return the memory model of one sequence."""
        return MemoryModel(self.recipe, self.ds_json, self.world_size, sharding, cpu=cpu)

    def ring_mode(self, num_tokens: int) -> RingMode:
        """Return the ring mode of a sequence of ``num_tokens`` on this device."""
        memory_bytes = self.device.usable_bytes if self.device.memory_gib < math.inf else CPU_BYTES
        return choose_ring_mode(self.recipe, num_tokens, element_bytes(self.ds_json), memory_bytes)

    def fits(self, sharding: SequenceSharding) -> bool:
        """Whether the predicted peak fits the device."""
        return self.memory(sharding).peak_bytes <= self.device.usable_bytes

    def largest_length(self, fraction: float = 1.0) -> int:
        """Find the longest sequence that fits, with ``fraction`` of its rows trained.

        Returns a multiple of 1024 tokens, at most 2^24; 0 if no sequence fits.
        """

        def length_fits(length: int) -> bool:
            document = document_in_turns(length, fraction)
            return self.fits(sharding_for(self.recipe, [document], self.ring_mode(length)))

        lengths = range(1 << 24, -1, -1024)  # in descending order; the 0 at the end is not tested
        return lengths[bisect_left(lengths, True, hi=len(lengths) - 1, key=length_fits)]

    def check_fits(self, sharding: SequenceSharding) -> None:
        """Raise ValueError if the sequence is predicted not to fit.

        The message names a length and a setting that would.
        """
        needed, usable = self.memory(sharding).peak_bytes, self.device.usable_bytes
        if needed > usable:
            raise ValueError(
                f"{describe_need(sharding, needed)}, and {usable / GIB:.1f} GiB are usable; "
                f"{self.advice(sharding)}; --training.check_memory false tries it all the same"
            )

    def advice(self, sharding: SequenceSharding) -> str:
        """Return two clauses: the longest sequence that fits, and the change that makes this one fit.
        """
        length = self.largest_length(sharding.num_queries / sharding.num_tokens)
        return f"{length} tokens would fit; {self.what_would_fit(sharding)}"

    def what_would_fit(self, sharding: SequenceSharding) -> str:
        """Name the change that makes the sequence fit and costs least time."""
        for changes in self._memory_savings():
            changed = self._with("training", **changes)
            resharded = changed._reshard(sharding)
            if changed.fits(resharded):
                host = changed.memory(resharded).host_bytes
                flags = " ".join(f"--training.{name} {str(value).lower()}" for name, value in changes.items())
                with_host = f", with {host / GIB:.0f} GiB of host memory a GPU" if host else ""
                return f"{flags} makes it fit{with_host}"
        # No setting suffices on these GPUs: recompute everything, and spread the sequence over more of them.
        full, ring = self._with("training", recompute="full"), self.recipe.parallel.ring
        also = "" if self.recipe.training.recompute == "full" else " and --training.recompute full"
        for more in (2, 4, 8, 16, 32, 64):
            wider = replace(full._with("parallel", ring=ring * more), world_size=self.world_size * more)
            if wider.fits(wider._reshard(sharding)):
                return f"{more} times as many GPUs (--parallel.ring {ring * more}){also} makes it fit"
        return "no setting here makes it fit; shorten data.max_length"

    def recompute_bytes(self, sharding: SequenceSharding) -> dict[str, int]:
        """Return the predicted peak bytes for every value of ``training.recompute``, fastest first."""
        on_cpu = self.device.name == "cpu"
        changed = {mode: self._with("training", recompute=mode) for mode in RECOMPUTE}
        return {mode: setup.memory(sharding, cpu=on_cpu).peak_bytes for mode, setup in changed.items()}

    def faster_recompute(self, sharding: SequenceSharding) -> str:
        """Name the fastest ``training.recompute`` that fits the device; "" if the recipe has it already."""
        own = self.recipe.training.recompute
        for mode, needed in self.recompute_bytes(sharding).items():
            if mode == own:
                break
            if needed <= self.device.usable_bytes:
                memory = f"about {needed / GIB:.1f} of {self.device.usable_bytes / GIB:.1f} usable GiB"
                return f"--training.recompute {mode} would fit too ({memory}) and recomputes less than {own}"
        return ""

    def _memory_savings(self) -> list[dict[str, Any]]:
        """List changes of ``training`` that need less device memory, the fastest first."""
        training = self.recipe.training
        changes = [{"recompute": mode} for mode in RECOMPUTE[RECOMPUTE.index(training.recompute) + 1 :]]
        if not training.offload_activations:
            changes.append({**(changes[-1] if changes else {}), "offload_activations": True})
        return changes

    def _reshard(self, sharding: SequenceSharding) -> SequenceSharding:
        """Shard the same documents for this setup. If its ring is wider, choose the ring mode again."""
        wider = self.recipe.parallel.ring > sharding.ring
        mode = self.ring_mode(sharding.num_tokens) if wider else sharding.ring_mode
        return sharding_for(self.recipe, list(sharding.documents), mode)

    def _with(self, section: str, **changes: Any) -> Setup:
        changed = getattr(self.recipe, section).model_copy(update=changes)
        return replace(self, recipe=self.recipe.model_copy(update={section: changed}))
