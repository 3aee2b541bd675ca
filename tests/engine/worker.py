"""What each process of an engine test does."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

import torch
from torch import Tensor

from eagle_ds.config import Recipe
from eagle_ds.ds_config import deepspeed_config, read_ds_json
from eagle_ds.engine.build import build
from eagle_ds.engine.checkpoint import full_state
from eagle_ds.engine.feed import Feed
from eagle_ds.engine.inputs import open_inputs
from eagle_ds.engine.metrics import Metrics, metrics_of, sum_over_ranks
from eagle_ds.engine.train import Trainer, train
from eagle_ds.engine.world import join_world


@dataclass
class Steps:
    """What some optimizer steps did: weights after them, and per step the gradient norm and the global metrics."""

    before: dict[str, Tensor]
    after: dict[str, Tensor]
    norms: list[float]
    metrics: list[Metrics]
    applied: list[bool]


def run_training(rank: int, world: int, recipe: Recipe) -> None:
    """The whole of ``train``."""
    alone(world)
    train(recipe, rank)


def take_steps(rank: int, world: int, recipe: Recipe, optimizer: str = "SGD") -> Steps:
    """The recipe's steps by the trainer's own parts, with plain SGD, which shows gradients as they are."""
    trainer = make_trainer(rank, world, recipe, optimizer)
    engine, steps = trainer.trainable.engine, trainer.sampler.steps(0, trainer.total_steps)
    before = full_state(engine)
    norms, metrics, applied = [], [], []
    with Feed(trainer.dataset, steps, depth=2, device=torch.device("cpu"), dtype=torch.float32) as feed:
        for _ in range(trainer.total_steps):
            outcome = trainer.step.run(feed, recipe.training.learning_rate)
            norms.append(outcome.grad_norm)
            applied.append(outcome.applied)
            metrics.append(metrics_of(sum_over_ranks(outcome.sums, world), trainer.step.decay, outcome.positions))
    return Steps(before, full_state(engine), norms, metrics, applied)


def make_trainer(rank: int, world: int, recipe: Recipe, optimizer: str = "AdamW") -> Trainer:
    alone(world)
    joined = join_world(recipe.parallel, rank)
    config = deepspeed_config(recipe, read_ds_json(recipe.deepspeed), world)
    if optimizer == "SGD":
        config["optimizer"] = {"type": "SGD", "params": {"lr": recipe.training.learning_rate}}
        config["zero_allow_untested_optimizer"] = True
    inputs = open_inputs(recipe, joined)
    return Trainer(recipe, joined, inputs, build(recipe, config, inputs, joined))


def alone(world: int) -> None:
    """A process group of one is not made by the pool, so ``join_world`` makes it; it needs an address."""
    if world == 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(probe.getsockname()[1]))
