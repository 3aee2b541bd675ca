"""What is decided from sizes before the first step: the ring's mode, and a word if the longest sequence may not fit."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from eagle_ds.config import Recipe
from eagle_ds.data.dataset import PlanSettings
from eagle_ds.data.packing import Pack, TrainSample
from eagle_ds.engine.world import World
from eagle_ds.planner import GIB, Device, check_fits, choose_ring_mode, predict_memory

logger = logging.getLogger(__name__)


def plan_settings(recipe: Recipe, samples: Sequence[TrainSample], element: int, world: World) -> PlanSettings:
    """How sequences are sharded; ``ring_mode`` auto is decided once, for the longest. ``element``: bytes of a state."""
    parallel, training = recipe.parallel, recipe.training
    longest = max(recipe.data.pack_tokens or 0, *(sample.document.num_tokens for sample in samples))
    mode = choose_ring_mode(recipe, longest, element, world.memory_bytes)
    if parallel.ring > 1:
        logger.info("K_0/V_0 of other ring ranks: %s (ring_mode %s, sequences of up to %d tokens)", mode, parallel.ring_mode, longest)
    return PlanSettings(parallel.ulysses, parallel.ring, mode, training.ttt_steps, training.mask_alignment, parallel.trained_rows_only)


def warn_if_too_large(
    recipe: Recipe, config: dict[str, Any], settings: PlanSettings, samples: Sequence[TrainSample], packs: Sequence[Pack], world: World
) -> None:
    """Log the memory predicted for the costliest of ``packs``; warn, with what would fit, where it exceeds the GPU's."""
    costliest = max(packs, key=lambda pack: sum(samples[n].document.num_tokens + settings.ttt_steps * samples[n].query_rows for n in pack))
    plan = settings.plan([samples[n] for n in costliest])
    world_size = world.topology.world_size
    needed = sum(predict_memory(recipe, config, world_size, plan, cpu=world.device.type != "cuda").values())
    text = f"longest sequence: {plan.num_tokens} tokens, {plan.num_queries} trained rows, about {needed / GIB:.1f} GiB a process"
    logger.info("%s; busiest rank / mean: %s", text, ", ".join(f"{name} {value:.3f}" for name, value in plan.balance.items()))
    if world.device.type == "cuda":
        try:
            check_fits(recipe, config, world_size, plan, Device(world.device.type, world.memory_bytes / GIB))
        except ValueError as error:
            logger.warning("this run may run out of memory: %s", error)
