"""The life of a run, from the recipe to the last checkpoint. Read it from the top.

`train` is what every rank does: open and check everything that the run reads, lock the run folder, build the
engine, train. `Trainer._train_steps` is the loop over optimizer steps; the methods below it are its parts, in
the order in which a step uses them.

One rule holds everywhere: what can fail on a single rank (reading, writing) is done through
``world.agreement``, which raises the same error on all ranks. Otherwise the healthy ranks would wait for the
failed one in their next collective.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from eagle_ds.config.deepspeed import deepspeed_config, read_ds_json
from eagle_ds.config.recipe import Recipe
from eagle_ds.config.run_folder import lock_run
from eagle_ds.config.run_state import Best, RunState, latest
from eagle_ds.data.dataset import RankDataset
from eagle_ds.data.sampler import Sampler
from eagle_ds.drafts.loading import DraftOnDisk
from eagle_ds.kernels.backend import choose_attention
from eagle_ds.training.build import Trainable, build
from eagle_ds.training.checkpoint import Checkpoints, find_resumable, full_state
from eagle_ds.training.evaluate import Evaluator
from eagle_ds.training.feed import Feed, FeedSettings, read_pool
from eagle_ds.training.inputs import Inputs, OpenStore, open_inputs
from eagle_ds.training.runlog import DeferredLine, Pace, RunLog, gather_line
from eagle_ds.training.sizing import OutOfMemory, Sizes, after_out_of_memory, is_out_of_memory, setup_of
from eagle_ds.training.step import MicroBatchRunner, OptimizerStep, StepOutcome, learning_rate
from eagle_ds.training.stopping import EXIT_CODE, StopRequest, peers_on_this_host
from eagle_ds.training.world import World

logger = logging.getLogger(__name__)

# Decodes held-out prompts with a draft; returns fields for one line of eval.jsonl ("accept_length" and
# others). Passed in because speculative decoding lives in evaluation/, a later folder than this one.
MeasureAcceptance = Callable[[Recipe, DraftOnDisk, torch.device], dict[str, Any]]


def train(recipe: Recipe, world: World, measure: MeasureAcceptance) -> None:
    """Train as one rank of ``world`` until the recipe's last step. Collective.

    Resumes from the newest checkpoint in the run folder, if there is one. If the run is complete, says so and
    builds no engine.

    Args:
        measure: called on rank 0 every ``training.acceptance_interval`` steps, while the other ranks wait.

    Raises:
        ValueError: on every rank, with the same message, for anything wrong with recipe, files or data.
        OutOfMemory: on the rank that ran out of memory.
        SystemExit: with code 143 after SIGTERM, once a checkpoint is saved.
    """
    setup, size = prepare(recipe, world), world.topology.world_size
    # No lock on the other ranks, nor where the file system has none.
    lock = world.agreement.together(lambda: lock_run(recipe.run_dir) if world.is_first else None)
    with lock or nullcontext():
        data = setup.inputs.train.store.manifest_hash
        resumed = world.agreement.together(lambda: find_resumable(recipe, data, size))
        world.agreement.same({"checkpoint to resume from": resumed.step if resumed else None})
        if resumed and resumed.step >= setup.total_steps:
            # Leave recipe.json alone: it must stay that of the steps that were trained.
            ends = f"epochs = {recipe.training.epochs}, training.max_steps = {recipe.training.max_steps}"
            text = "nothing left to do: %s is at step %d of %d (training.%s)"
            logger.info(text, recipe.run_dir, resumed.step, setup.total_steps, ends)
            return
        finished = Trainer(setup, build_engine(setup), measure).run(resumed)
    if not finished:
        raise SystemExit(EXIT_CODE)


@dataclass(frozen=True)
class RunSetup:
    """A run that has been checked and can start, except for its engine."""

    recipe: Recipe
    config: dict[str, Any]  # what DeepSpeed is given
    world: World
    inputs: Inputs
    sampler: Sampler
    sizes: Sizes

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        training = self.recipe.training
        return self.sampler.count_steps(training.epochs, training.max_steps)


def prepare(recipe: Recipe, world: World) -> RunSetup:
    """Open and check everything before an engine is built. Collective. Raises RankFailure on all ranks."""
    size = world.topology.world_size
    config = world.agreement.together(lambda: deepspeed_config(recipe, read_ds_json(recipe.deepspeed), size))
    inputs = open_inputs(recipe, world)
    for caveat in recipe.caveats if world.is_first else ():
        logger.warning("%s", caveat)
    sampler = world.agreement.together(lambda: make_sampler(recipe, inputs, world))
    sizes = Sizes.decide(setup_of(recipe, config, world), inputs.all_samples, world)
    sizes.check(inputs.train.samples, sampler.epoch_packs(0))
    return RunSetup(recipe, config, world, inputs, sampler, sizes)


def make_sampler(recipe: Recipe, inputs: Inputs, world: World) -> Sampler:
    """Return the order of the data. Raises ValueError if the store does not fill one optimizer step."""
    return Sampler(
        inputs.train.samples, dp=world.topology.dp, accumulation=recipe.training.gradient_accumulation,
        pack_tokens=recipe.data.pack_tokens, seed=recipe.training.seed, ttt_steps=recipe.training.ttt_steps,
    )  # fmt: skip


def build_engine(setup: RunSetup) -> Trainable:
    """Build draft, head and engine. Collective. Raises OutOfMemory on a rank that has too little."""
    try:
        return build(setup.recipe, setup.config, setup.inputs, setup.world)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        largest = setup.sizes.largest(setup.inputs.train.samples, setup.sampler.epoch_packs(0))
        remedy, reason = after_out_of_memory(setup.sizes.setup, largest), str(error).splitlines()[0]
        raise OutOfMemory(f"out of memory before the first step ({reason}): {remedy}") from error


class Trainer:
    """A run in progress."""

    def __init__(self, setup: RunSetup, trainable: Trainable, measure: MeasureAcceptance) -> None:
        recipe, training = setup.recipe, setup.recipe.training
        world, inputs = setup.world, setup.inputs
        self.setup, self.world = setup, world
        self.trainable, self.measure = trainable, measure
        self.recipe, self.training = recipe, training
        self.sampler = setup.sampler
        self.total_steps = setup.total_steps

        # Data: reading processes, one dataset for each store, and how far ahead they are read.
        self.pool = read_pool(recipe.data, world.device)
        self.dataset = self._dataset(inputs.train)
        self.feed_settings = FeedSettings(recipe.data.prefetch, world.device, trainable.dtype)

        # Computation: the attention kernel is chosen once. Training and evaluation share the forward.
        kernel = choose_attention(world.device, trainable.dtype, inputs.arch.head_dim)
        runner = MicroBatchRunner(trainable.engine, inputs.arch, trainable.head, kernel, training, world)
        self.step = OptimizerStep(runner)
        self.evaluator = None
        if inputs.held_out is not None:
            held_out = self._dataset(inputs.held_out)
            self.evaluator = Evaluator(runner, held_out, recipe.data.pack_tokens, self.feed_settings)

        # Output: checkpoints by all ranks, logs by rank 0.
        self.checkpoints = Checkpoints(recipe, trainable.engine, inputs, world)
        self.log = RunLog(recipe.run_dir, trainable.engine, self.total_steps) if world.is_first else None
        self.line = DeferredLine(self.log, world.agreement)

        # Position of the run.
        self.done = self.saved = self.skipped_steps = 0
        self.best: Best | None = None
        packs, trained = len(self.sampler.epoch_packs(0)), self.sampler.trained_packs(0)
        logger.info("%d optimizer steps; an epoch is %d of %d sequences", self.total_steps, trained, packs)

    def _dataset(self, opened: OpenStore) -> RankDataset:
        topology = self.world.topology
        return RankDataset(
            opened.store, opened.samples, self.setup.sizes.settings, t2d=self.setup.inputs.vocab.t2d,
            dp_rank=topology.dp_rank, sp_rank=topology.sp_rank,
            labeler=self.trainable.labeler, pool=self.pool, pin=self.world.device.type == "cuda",
        )  # fmt: skip

    def run(self, resumed: RunState | None) -> bool:
        """Train from ``resumed``, or from the start, to the last step. Collective.

        Returns False if SIGTERM ended the run earlier, after a checkpoint.

        Raises OutOfMemory, on the rank whose memory does not suffice, with a change that would help.
        """
        try:
            with self._explaining_memory(), StopRequest(peers_on_this_host(self.world.agreement)) as stop:
                return self._run(resumed, stop)
        finally:
            if self.pool is not None:
                self.pool.close()

    def _run(self, resumed: RunState | None, stop: StopRequest) -> bool:
        if resumed:
            self._restore(resumed)
        else:
            origin = self.setup.inputs.start
            logger.info("the draft starts %s", f"from {origin.folder}" if origin else "untrained")
        start = self.done
        self._on_first(lambda log: log.start(self.recipe, start))
        if start == 0:
            self._evaluate()  # the untrained draft is the first point of the curves
        return self._train_steps(start, stop)

    def _train_steps(self, start: int, stop: StopRequest) -> bool:
        """Train from step ``start`` to the last; False if SIGTERM ended the loop. Collective."""
        pace = Pace()
        steps = self.sampler.global_batches(start, self.total_steps)
        with Feed(self.dataset, steps, self.feed_settings) as feed, self.line:
            for number in range(start, self.total_steps):
                rate = learning_rate(number, self.total_steps, self.training)
                # The line of the previous step is written during this one: see DeferredLine.
                outcome = self.step.run(feed, rate, while_busy=self.line.write_while_busy)
                self.line.check()
                pace.add(outcome)
                self.done = number + 1
                if not outcome.applied:
                    self._handle_not_finite(outcome)
                elif self._due(self.training.log_interval):
                    fields = {"step": self.done, "lr": rate, "skipped_steps": self.skipped_steps}
                    self.line.pending = gather_line(outcome, pace, self.step.decay, fields, self.world)
                    pace = Pace()
                if self._evaluate_and_save():
                    pace = Pace()  # its time is not training time
                if self.done < self.total_steps and self._stops(stop):
                    return False
        return True

    def _due(self, interval: int) -> bool:
        """Whether something due every ``interval`` steps (0: only at the end) is due after this step."""
        return self.done == self.total_steps or (interval > 0 and self.done % interval == 0)

    def _handle_not_finite(self, outcome: StepOutcome) -> None:
        """Stop, or skip the step, as ``training.non_finite`` says. Collective: all ranks share the norm."""
        culprits = [name for names in self.world.agreement.gather_objects(outcome.culprits) for name in names]
        named = ", ".join(dict.fromkeys(culprits))
        if not named:  # every loss is finite, so the norm became infinite when gradients were summed
            numbers = [n for packs in outcome.global_batch.packs for pack in packs for n in pack]
            held = ", ".join(self.dataset.samples[n].entry.id for n in numbers)
            named = f"none alone; the step held {held}"
        message = (
            f"step {self.done}: a loss or gradient is not finite (gradient norm {outcome.grad_norm}); "
            f"samples with such a loss: {named}"
        )
        if self.training.non_finite == "stop":
            raise ValueError(
                f"{message}; the weights are as before this step. Check these samples (tools/inspect_hdf5.py "
                "--verify), lower training.learning_rate, or set training.non_finite to skip"
            )
        self.skipped_steps += 1
        if self.world.is_first:
            logger.warning("%s; the step is skipped (%d so far)", message, self.skipped_steps)

    def _evaluate_and_save(self) -> bool:
        """Evaluate and save where that is due. Returns whether it was. Collective."""
        decodes = self.training.acceptance_interval > 0 and self._due(self.training.acceptance_interval)
        evaluates = decodes or self._due(self.training.eval_interval)
        saves = self._due(self.training.save_interval)
        if evaluates:
            self._evaluate(decodes=decodes)
        if saves:
            self._save()
        return evaluates or saves

    def _evaluate(self, *, decodes: bool = False) -> None:
        """Evaluate on held-out features if there are any, and by real decoding if ``decodes``. Collective.

        Saves the draft if it is the best so far.
        """
        self.line.write_now()
        found: dict[str, Any] = {}
        if self.evaluator is not None:
            found |= self.evaluator.run().as_dict()
        if decodes:
            found |= self._decode()
        if found:
            self._on_first(lambda log: log.evaluation({"step": self.done, **found}))
        length = found.get("accept_length" if self.training.best_by == "acceptance" else "simulated_length")
        if self.done and length is not None and (self.best is None or length > self.best.length):
            self.best = Best(self.done, length)
            self.checkpoints.save_best()

    def _decode(self) -> dict[str, Any]:
        """Measure acceptance by speculative decoding of a few held-out prompts on rank 0. Collective."""
        tensors, made = full_state(self.trainable.engine), self.setup.inputs
        draft = DraftOnDisk(tensors, made.arch, made.vocab, self.recipe.run_dir, self.recipe.target.aux_ids)
        found = self.world.agreement.together(
            lambda: self.measure(self.recipe, draft, self.world.device) if self.world.is_first else {}
        )
        # All ranks need the numbers: they decide together whether this is the best draft.
        return self.world.agreement.gather_objects(found)[0]

    def _save(self) -> None:
        """Write a checkpoint. Collective."""
        self.line.write_now()  # a run that resumes from this checkpoint has all log lines up to it
        recipe, size = self.recipe.model_dump(mode="json"), self.world.topology.world_size
        data = self.setup.inputs.train.store.manifest_hash
        self.checkpoints.save(RunState(self.done, size, data, recipe, self.skipped_steps, self.best))
        self.saved = self.done

    def _restore(self, state: RunState) -> None:
        """Continue from a checkpoint. Collective."""
        self.checkpoints.load(state)
        self.done = self.saved = state.step
        self.best, self.skipped_steps = state.best, state.skipped_steps
        logger.info("resuming %s at step %d of %d", self.recipe.run_dir, state.step, self.total_steps)

    def _stops(self, stop: StopRequest) -> bool:
        """Whether any rank received SIGTERM; all ranks have then saved this step. Collective."""
        if not self.world.agreement.gather([stop.received]).any():
            return False
        if self.saved < self.done:
            self._save()
        logger.info("SIGTERM: saved step %d of %d; the same command resumes", self.done, self.total_steps)
        return True

    def _on_first(self, write: Callable[[RunLog], None]) -> None:
        """Let rank 0 write a log; all ranks fail if it cannot. Collective."""
        self.world.agreement.together(lambda: write(self.log) if self.log else None)

    @contextmanager
    def _explaining_memory(self) -> Iterator[None]:
        """Turn an out-of-memory error into a message that says what to change.

        Only the rank that ran out of memory has the error. The others wait for it in a collective, so it must
        not join an agreement here; the launcher ends them.
        """
        try:
            yield
        except (RuntimeError, ValueError) as error:
            if not is_out_of_memory(error):
                raise
            remedy, kept = "no sequence was being trained yet", "nothing was saved yet"
            if sharding := self.step.runner.sharding:
                remedy = after_out_of_memory(self.setup.sizes.setup, sharding)
            if state := latest(self.recipe.run_dir):
                kept = f"the checkpoint of step {state.step} is complete, the same command resumes from it"
            position, reason = f"step {self.done} of {self.total_steps}", str(error).splitlines()[0]
            text = f"out of memory after {position} ({reason}): {remedy}; {kept}"
            raise OutOfMemory(f"{text}; the launcher ends the other ranks") from error
