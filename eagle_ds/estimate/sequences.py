"""Make and shard the sequences for estimates: synthetic documents, or the heaviest sequence of a store."""

from __future__ import annotations

from pathlib import Path

from eagle_ds.config.recipe import Recipe
from eagle_ds.data.packing import ShardingSettings, screen
from eagle_ds.data.sampler import Sampler
from eagle_ds.sharding.sequence import Document, RingMode, SequenceSharding
from eagle_ds.store.manifest import STORE_JSON, read_manifest


def sharding_for(
    recipe: Recipe, documents: list[Document], ring_mode: RingMode = "gather"
) -> SequenceSharding:
    """Pack ``documents`` into one sequence and shard it by the recipe's ``parallel`` section."""
    return ShardingSettings.from_recipe(recipe, ring_mode).shard(documents)


def document_in_turns(num_tokens: int, fraction: float, turn: int = 512) -> Document:
    """Return a synthetic document with about ``fraction`` of its tokens trained, in evenly spaced turns.

    Args:
        turn: trained tokens of one turn.

    Raises:
        ValueError: unless 0 < ``fraction`` <= 1 and ``turn`` >= 1.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"a trained fraction of {fraction:g} is out of range; use one above 0 and at most 1")
    if turn < 1:
        raise ValueError(f"a turn of {turn} trained tokens is too short; use 1 or more, such as 512")
    if fraction == 1:
        return Document(num_tokens, ((0, num_tokens),))
    # One turn ends each period. A document shorter than one period gets a single turn at its end.
    period = max(int(turn / fraction), turn + 1)
    ends = range(period, num_tokens + 1, period) or (num_tokens,)
    return Document(num_tokens, tuple((max(end - turn, 0), end) for end in ends))


def heaviest_sequence(recipe: Recipe, dp: int) -> tuple[list[Document], str]:
    """Find the most expensive sequence of the first epoch.

    Without a captured store it is one document of ``data.max_length`` tokens, all trained.

    Returns:
        The sequence's documents, and a text that says where they come from.
    """
    data, training = recipe.data, recipe.training
    root = Path(data.store)
    entries = read_manifest(root)[0] if (root / STORE_JSON).is_file() else []
    if not entries:
        origin = f"{root} holds no samples yet, so it is assumed to be one sample of max_length, all trained"
        return [document_in_turns(data.max_length, 1.0)], origin
    samples, screening = screen(
        entries, max_length=data.max_length, overlong=data.overlong,
        ttt_steps=training.ttt_steps, alignment=training.mask_alignment,
    )
    sampler = Sampler(
        samples, dp=dp, accumulation=training.gradient_accumulation, pack_tokens=data.pack_tokens,
        seed=training.seed, ttt_steps=training.ttt_steps,
    )
    packs = sampler.epoch_packs(0)
    heaviest = max(packs, key=lambda pack: sum(sampler.costs[number] for number in pack))
    steps = sampler.count_steps(training.epochs, training.max_steps)
    sequences = f"{len(packs)} sequence{'s' if len(packs) > 1 else ''} per epoch"
    origin = (
        f"{root}: {screening}\n{sequences}, {steps} optimizer steps in all; "
        f"the heaviest sequence packs {len(heaviest)} sample{'s' if len(heaviest) > 1 else ''}"
    )
    return [samples[number].document for number in heaviest], origin
