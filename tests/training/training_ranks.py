"""Functions that the training tests run on each rank of a process pool: train, with or without a fault."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.partition_parameters import Init
from torch import Tensor

from eagle_ds.config.deepspeed import deepspeed_config, read_ds_json
from eagle_ds.config.recipe import Recipe
from eagle_ds.config.run_folder import STEP_LOG
from eagle_ds.data.dataset import MicroBatch, RankDataset
from eagle_ds.data.sampler import GlobalBatch
from eagle_ds.launch import train_rank
from eagle_ds.model.offload import ActivationOffload
from eagle_ds.store.store import StoreError
from eagle_ds.training.build import build
from eagle_ds.training.checkpoint import Checkpoints, RunState, full_state
from eagle_ds.training.feed import Feed, FeedSettings
from eagle_ds.training.inputs import open_inputs
from eagle_ds.training.metrics import Metrics, metrics_of, sum_over_ranks
from eagle_ds.training.sizing import Sizes, setup_of
from eagle_ds.training.train import Trainer, make_sampler, prepare
from eagle_ds.training.world import World, join_world


@dataclass
class Steps:
    """What several optimizer steps did: weights before and after them; norm, metrics and outcome of each."""

    before: dict[str, Tensor]
    after: dict[str, Tensor]
    norms: list[float]
    metrics: list[Metrics]
    applied: list[bool]


def run_training(rank: int, world: int, recipe: Recipe) -> None:
    """Train the recipe from start to end."""
    reset_process(world)
    train_rank(recipe, rank)


def messages_of_training(rank: int, world: int, recipe: Recipe) -> list[str]:
    """Train the recipe. Returns what was logged, with a line "an engine was built" where that happened."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    def building(*args: Any) -> Any:
        said.append("an engine was built")
        return build(*args)

    root, listener = logging.getLogger("eagle_ds"), Listener()
    root.addHandler(listener)
    level = root.level
    root.setLevel(logging.INFO)
    try:
        with mock.patch("eagle_ds.training.train.build", building):
            run_training(rank, world, recipe)
    finally:
        root.removeHandler(listener)
        root.setLevel(level)
    return said


def take_steps(rank: int, world: int, recipe: Recipe, optimizer: str = "SGD") -> Steps:
    """Take the recipe's optimizer steps. Plain SGD, the default, moves each weight by its gradient."""
    trainer = make_trainer(rank, world, recipe, optimizer)
    engine, steps = trainer.trainable.engine, trainer.sampler.global_batches(0, trainer.total_steps)
    before = full_state(engine)
    norms, metrics, applied = [], [], []
    with Feed(trainer.dataset, steps, FeedSettings(2, torch.device("cpu"), trainer.trainable.dtype)) as feed:
        for _ in range(trainer.total_steps):
            outcome = trainer.step.run(feed, recipe.training.learning_rate)
            norms.append(outcome.grad_norm)
            applied.append(outcome.applied)
            metrics.append(
                metrics_of(sum_over_ranks(outcome.sums, world)(), trainer.step.decay, outcome.positions)
            )
    return Steps(before, full_state(engine), norms, metrics, applied)


def take_offloading_steps(rank: int, world: int, recipe: Recipe) -> tuple[Steps, int]:
    """Run ``take_steps`` with all activations offloaded. Returns also the number of host slabs."""
    made = []

    def offload(device: torch.device) -> ActivationOffload:
        made.append(ActivationOffload(device, min_bytes=0, slab_bytes=1 << 12))
        return made[-1]

    with mock.patch("eagle_ds.training.step.ActivationOffload", offload):
        steps = take_steps(rank, world, recipe)
    return steps, sum(one.slabs.made for one in made)


def make_trainer(rank: int, world: int, recipe: Recipe, optimizer: str = "AdamW") -> Trainer:
    """Build a trainer as ``train`` does, with SGD in place of the recipe's optimizer if asked for."""
    reset_process(world)
    setup = prepare(recipe, join_world(recipe.parallel, rank))
    if optimizer == "SGD":
        setup.config["optimizer"] = {"type": "SGD", "params": {"lr": recipe.training.learning_rate}}
        setup.config["zero_allow_untested_optimizer"] = True
    return Trainer(setup, build(recipe, setup.config, setup.inputs, setup.world), lambda *_: {})


def reset_process(world: int) -> None:
    """Reset what a pool process keeps from earlier tests and a new process would not have.

    DeepSpeed's ZeRO-3 numbers modules and parameters with global counters and expects the same numbers on all
    ranks. The pool forms no group of one process, so a single rank needs an address to form it.
    """
    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
    Init.param_id = 0
    if world == 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(probe.getsockname()[1]))


def error_of_training(
    rank: int, world: int, recipe: Recipe, fault: str = "", faulty_rank: int = -1
) -> tuple[str, float]:
    """Train, with ``fault`` (a key of FAULTS) on rank ``faulty_rank``.

    Returns the text of the error that this rank raises, "" for none, and the seconds until then.
    """
    reset_process(world)
    fault = fault if rank == faulty_rank else ""
    recipe = FAULTS[fault](recipe)
    started = time.perf_counter()
    try:
        with mock.patch.object(
            RankDataset, "micro_batches", FAULTY_READS.get(fault, RankDataset.micro_batches)
        ):
            train_rank(recipe, rank)
    except ValueError as error:
        return str(error), time.perf_counter() - started
    return "", time.perf_counter() - started


def _other_store(recipe: Recipe) -> Recipe:
    """Use a store with the same samples and another manifest."""
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
    """Read another sample from the third step on."""
    for step in steps:
        yield from self._load(step if step.number < 2 else replace(step, packs=(((0,),),)))


def _broken_read(self: RankDataset, steps: Iterator[GlobalBatch]) -> Iterator[MicroBatch]:
    """Fail to read the third step."""
    for step in steps:
        if step.number == 2:
            raise StoreError("store/samples/ab/cd.h5: the file was cut")
        yield from self._load(step)


def _unwritable_log(recipe: Recipe) -> Recipe:
    """Put a folder where the log file would be."""
    (recipe.run_dir / STEP_LOG).mkdir(parents=True)
    return recipe


def _unchanged(recipe: Recipe) -> Recipe:
    return recipe


FAULTS: dict[str, Callable[[Recipe], Recipe]] = {
    "": _unchanged,
    "other_store": _other_store,
    "other_seed": _other_seed,
    "other_samples": _unchanged,
    "broken_read": _unchanged,
    "unwritable_log": _unwritable_log,
}
FAULTY_READS = {"other_samples": _other_samples, "broken_read": _broken_read}


class Interrupted(Exception):
    """Ends a run in the middle, as a crash would."""


def train_until(rank: int, world: int, recipe: Recipe, stop_after: int) -> None:
    """Train, and interrupt the run after step ``stop_after`` with its evaluation and checkpoint."""
    reset_process(world)
    original = Trainer._evaluate_and_save

    def evaluate_and_save(self: Trainer) -> bool:
        was_due = original(self)
        if self.done == stop_after:
            raise Interrupted
        return was_due

    with (
        mock.patch.object(Trainer, "_evaluate_and_save", evaluate_and_save),
        contextlib.suppress(Interrupted),
    ):
        train_rank(recipe, rank)


def train_onto_a_full_disk(rank: int, world: int, recipe: Recipe, from_step: int) -> str:
    """Train with a tiny limit on file sizes from the checkpoint of ``from_step`` on. Returns the error's
    text.
    """
    reset_process(world)
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
    """Return the error of ``Sizes.check`` for GPUs of ``memory_bytes[rank]`` and ``host`` bytes of host
    memory.
    """
    reset_process(world)
    joined = join_world(recipe.parallel, rank)
    config, inputs = (
        deepspeed_config(recipe, read_ds_json(recipe.deepspeed), world),
        open_inputs(recipe, joined),
    )
    on_gpu = replace(joined, device=torch.device("cuda", rank))
    host_memory = mock.patch("eagle_ds.training.sizing.host_memory_bytes", lambda: host)
    with mock.patch.object(World, "memory_bytes", memory_bytes[rank]), host_memory:
        sizes = Sizes.decide(setup_of(recipe, config, on_gpu), inputs.all_samples, on_gpu)
        try:
            sizes.check(inputs.train.samples, make_sampler(recipe, inputs, joined).epoch_packs(0))
        except ValueError as error:
            return str(error)
    return ""


def run_into(
    rank: int,
    world: int,
    recipe: Recipe,
    error: BaseException,
    where: str = "eagle_ds.model.draft.Eagle3Draft.forward",
) -> tuple[str, str]:
    """Train, with ``error`` raised by the first forward or by the function ``where``.

    Returns type and text of the error that training raises.
    """
    reset_process(world)
    try:
        with mock.patch(where, side_effect=error):
            train_rank(recipe, rank)
    except Exception as raised:
        return type(raised).__name__, str(raised)
    return "", ""


def train_until_sigterm(
    rank: int, world: int, recipe: Recipe, signalled_rank: int, after_step: int
) -> int | None:
    """Train, with SIGTERM sent to one rank after step ``after_step``. Returns the exit code, None for a
    complete run.
    """
    reset_process(world)
    original = Trainer._evaluate_and_save

    def evaluate_and_save(self: Trainer) -> bool:
        if rank == signalled_rank and self.done == after_step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    try:
        with mock.patch.object(Trainer, "_evaluate_and_save", evaluate_and_save):
            train_rank(recipe, rank)
    except SystemExit as ended:
        return int(ended.code)
    return None
