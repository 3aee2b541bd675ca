"""What each process of an engine test does."""

from __future__ import annotations

import logging

from eagle_ds.config import Recipe
from eagle_ds.engine.train import train


def run_training(rank: int, world: int, recipe: Recipe) -> None:
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, force=True)
    train(recipe, rank)
