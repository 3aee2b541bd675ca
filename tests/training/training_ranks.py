"""What each process of an engine test does."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.partition_parameters import Init
from torch import Tensor

from eagle_ds.config.deepspeed import deepspeed_config, read_ds_json
from eagle_ds.config.recipe import Recipe
from eagle_ds.data.dataset import MicroBatch, RankDataset
from eagle_ds.data.sampler import GlobalBatch
from eagle_ds.launch import train_rank
from eagle_ds.model.offload import ActivationOffload
from eagle_ds.store.store import StoreError
from eagle_ds.training.build import build
from eagle_ds.training.checkpoint import Checkpoints, RunState, full_state
from eagle_ds.training.feed import Feed
from eagle_ds.training.inputs import open_inputs
from eagle_ds.training.metrics import Metrics, metrics_of, sum_over_ranks
from eagle_ds.training.runlog import STEP_LOG
from eagle_ds.training.sizing import Sizes
from eagle_ds.training.train import Trainer, make_sampler
from eagle_ds.training.world import World, join_world


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
    as_if_new(world)
    train_rank(recipe, rank)


def take_steps(rank: int, world: int, recipe: Recipe, optimizer: str = "SGD") -> Steps:
    """The recipe's steps by the trainer's own parts, with plain SGD, which shows gradients as they are."""
    trainer = make_trainer(rank, world, recipe, optimizer)
    engine, steps = trainer.trainable.engine, trainer.sampler.steps(0, trainer.total_steps)
    before = full_state(engine)
    norms, metrics, applied = [], [], []
    with Feed(trainer.dataset, steps, depth=2, device=torch.device("cpu"), dtype=trainer.trainable.dtype) as feed:
        for _ in range(trainer.total_steps):
            outcome = trainer.step.run(feed, recipe.training.learning_rate)
            norms.append(outcome.grad_norm)
            applied.append(outcome.applied)
            metrics.append(metrics_of(sum_over_ranks(outcome.sums, world)(), trainer.step.decay, outcome.positions))
    return Steps(before, full_state(engine), norms, metrics, applied)


def take_offloading_steps(rank: int, world: int, recipe: Recipe) -> tuple[Steps, int]:
    """``take_steps`` with everything offloaded, however small, and how many slabs that took."""
    made = []

    def offload(device: torch.device) -> ActivationOffload:
        made.append(ActivationOffload(device, min_bytes=0, slab_bytes=1 << 12))
        return made[-1]

    with mock.patch("eagle_ds.training.step.ActivationOffload", offload):
        steps = take_steps(rank, world, recipe)
    return steps, sum(one.slabs.made for one in made)


def make_trainer(rank: int, world: int, recipe: Recipe, optimizer: str = "AdamW") -> Trainer:
    as_if_new(world)
    joined = join_world(recipe.parallel, rank)
    config = deepspeed_config(recipe, read_ds_json(recipe.deepspeed), world)
    if optimizer == "SGD":
        config["optimizer"] = {"type": "SGD", "params": {"lr": recipe.training.learning_rate}}
        config["zero_allow_untested_optimizer"] = True
    inputs = open_inputs(recipe, joined)
    sizes = Sizes.decide(recipe, config, inputs.all_samples, joined)
    return Trainer(recipe, joined, inputs, make_sampler(recipe, inputs, joined), sizes, build(recipe, config, inputs, joined))


def as_if_new(world: int) -> None:
    """What a process that has worked before lacks of a new one: DeepSpeed's ZeRO-3 numbers modules and parameters from where the
    process is, and expects all ranks to be there; and a group of one is not made by the pool, so it needs an address."""
    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
    Init.param_id = 0
    if world == 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(probe.getsockname()[1]))


def message(rank: int, world: int, recipe: Recipe, mischief: str = "", victim: int = -1) -> tuple[str, float]:
    """What ``train`` raises on this rank, and after how many seconds. ``mischief`` befalls rank ``victim``."""
    as_if_new(world)
    if rank == victim:
        recipe = MISCHIEF[mischief](recipe)
    started = time.perf_counter()
    try:
        with mock.patch.multiple(RankDataset, **PATCHES.get(mischief if rank == victim else "", {"batches": RankDataset.batches})):
            train_rank(recipe, rank)
    except ValueError as error:
        return str(error), time.perf_counter() - started
    return "", time.perf_counter() - started


def _other_store(recipe: Recipe) -> Recipe:
    """The same samples, another manifest."""
    copy = Path(recipe.data.store).with_name("train_copy")
    shutil.copytree(recipe.data.store, copy)
    with (copy / "manifest.jsonl").open("rb+") as manifest:
        lines = manifest.readlines()
        manifest.seek(0)
        manifest.writelines(reversed(lines))
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"store": str(copy)})})


def _other_seed(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"seed": 7})})


def _other_samples(self: RankDataset, steps: Iterator[GlobalBatch]) -> Iterator[MicroBatch]:
    """Another sample from the third step on."""
    for step in steps:
        yield from self._step(step if step.number < 2 else replace(step, packs=(((0,),),)))


def _broken_read(self: RankDataset, steps: Iterator[GlobalBatch]) -> Iterator[MicroBatch]:
    for step in steps:
        if step.number == 2:
            raise StoreError("store/samples/ab/cd.h5: the file was cut")
        yield from self._step(step)


def _unwritable_log(recipe: Recipe) -> Recipe:
    (recipe.run_dir / STEP_LOG).mkdir(parents=True)
    return recipe


MISCHIEF: dict[str, Callable[[Recipe], Recipe]] = {
    "other_store": _other_store,
    "other_seed": _other_seed,
    "other_samples": lambda recipe: recipe,
    "broken_read": lambda recipe: recipe,
    "unwritable_log": _unwritable_log,
}
PATCHES = {"other_samples": {"batches": _other_samples}, "broken_read": {"batches": _broken_read}}


class Interrupted(Exception):
    """The run is cut off."""


def train_until(rank: int, world: int, recipe: Recipe, stop_after: int) -> None:
    """``train``, cut off after step ``stop_after`` and what belongs to it."""
    as_if_new(world)
    original = Trainer._pause

    def pause(self: Trainer, done: int) -> bool:
        paused = original(self, done)
        if done == stop_after:
            raise Interrupted
        return paused

    with mock.patch.object(Trainer, "_pause", pause), contextlib.suppress(Interrupted):
        train_rank(recipe, rank)


def train_onto_a_full_disk(rank: int, world: int, recipe: Recipe, from_step: int) -> str:
    """``train`` where no file can grow beyond a few bytes from the checkpoint of ``from_step`` on; what it raises."""
    as_if_new(world)
    original, before = Checkpoints.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save(self: Checkpoints, state: RunState) -> None:
        if state.step == from_step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        original(self, state)

    try:
        with mock.patch.object(Checkpoints, "save", save):
            train_rank(recipe, rank)
    except ValueError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return ""


def refusal(rank: int, world: int, recipe: Recipe, memory_bytes: list[int], host: int = 1 << 40) -> str:
    """What ``Sizes.check`` raises where rank r's GPU has ``memory_bytes[r]``, and the host ``host`` free."""
    as_if_new(world)
    joined = join_world(recipe.parallel, rank)
    config, inputs = deepspeed_config(recipe, read_ds_json(recipe.deepspeed), world), open_inputs(recipe, joined)
    on_gpu = replace(joined, device=torch.device("cuda", rank))
    host_memory = mock.patch("eagle_ds.training.sizing.host_memory_bytes", lambda: host)
    with mock.patch.object(World, "memory_bytes", memory_bytes[rank]), host_memory:
        sizes = Sizes.decide(recipe, config, inputs.all_samples, on_gpu)
        try:
            sizes.check(inputs.train.samples, make_sampler(recipe, inputs, joined).epoch_packs(0))
        except ValueError as error:
            return str(error)
    return ""


def run_into(
    rank: int, world: int, recipe: Recipe, error: BaseException, where: str = "eagle_ds.model.draft.Eagle3Draft.forward"
) -> tuple[str, str]:
    """``train`` where ``error`` befalls the first forward, or the call ``where``; the kind of what comes of it, and its text."""
    as_if_new(world)
    try:
        with mock.patch(where, side_effect=error):
            train_rank(recipe, rank)
    except Exception as raised:
        return type(raised).__name__, str(raised)
    return "", ""


def train_until_sigterm(rank: int, world: int, recipe: Recipe, victim: int, after_step: int) -> int | None:
    """``train``, with SIGTERM sent to rank ``victim`` in step ``after_step``'s wake; the exit code that it ends with."""
    as_if_new(world)
    original = Trainer._pause

    def pause(self: Trainer, done: int) -> bool:
        if rank == victim and done == after_step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, done)

    try:
        with mock.patch.object(Trainer, "_pause", pause):
            train_rank(recipe, rank)
    except SystemExit as ended:
        return int(ended.code)
    return None
