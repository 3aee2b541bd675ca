"""The training loop: read, agree, step, log; evaluate and save every so often; resume where an earlier run stopped."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from eagle_ds.config.deepspeed import deepspeed_config, read_ds_json
from eagle_ds.config.recipe import Recipe
from eagle_ds.data.dataset import RankDataset
from eagle_ds.data.sampler import Sampler
from eagle_ds.drafts.folder import DraftOnDisk
from eagle_ds.kernels.attention_cuda import choose_attention
from eagle_ds.training.agreement import attempt
from eagle_ds.training.build import Trainable, build
from eagle_ds.training.checkpoint import Best, Checkpoints, RunState, full_state, latest
from eagle_ds.training.evaluate import Evaluator
from eagle_ds.training.feed import Feed, read_pool
from eagle_ds.training.inputs import Inputs, OpenStore, open_inputs
from eagle_ds.training.metrics import metrics_of, sum_over_ranks
from eagle_ds.training.resume import find_resumable
from eagle_ds.training.runlock import only_run_in
from eagle_ds.training.runlog import GIB, RunLog, peak_bytes
from eagle_ds.training.schedule import learning_rate
from eagle_ds.training.sizing import OutOfMemory, Sizes, is_out_of_memory
from eagle_ds.training.step import MicroBatchRunner, OptimizerStep, StepOutcome
from eagle_ds.training.stopping import EXIT_CODE, StopRequest, peers_on_this_host
from eagle_ds.training.world import World

logger = logging.getLogger(__name__)

MeasureAcceptance = Callable[[Recipe, DraftOnDisk, torch.device], dict[str, Any]]
"""Decodes held-out prompts with a draft and returns the fields of one line of eval.jsonl (``accept_length`` and others)."""


def train(recipe: Recipe, world: World, measure: MeasureAcceptance) -> None:
    """Train as one rank of ``world`` until the recipe's last step. Resume from the run's newest checkpoint. Collective.

    Args:
        measure: called on rank 0 every ``training.acceptance_interval`` steps, while the other ranks wait.

    Raises:
        ValueError: on every rank, with the same message, for anything wrong with recipe, files or data.
        OutOfMemory: on the rank that ran out of memory.
        SystemExit: with code 143 after SIGTERM, once a checkpoint is saved.
    """
    world_size = world.topology.world_size
    config = world.agreement.together(lambda: deepspeed_config(recipe, read_ds_json(recipe.deepspeed), world_size))
    inputs = open_inputs(recipe, world)
    for caveat in recipe.caveats if world.is_first else ():
        logger.warning("%s", caveat)
    sampler = world.agreement.together(lambda: make_sampler(recipe, inputs, world))
    sizes = Sizes.decide(recipe, config, inputs.all_samples, world)
    sizes.check(inputs.train.samples, sampler.epoch_packs(0))
    with only_run_in(recipe.run_dir, world):
        resumed = world.agreement.together(lambda: find_resumable(recipe, inputs.train.store.manifest_hash, world_size))
        world.agreement.same({"checkpoint to resume from": resumed.step if resumed else None})
        trainable = _built(recipe, config, inputs, world, sampler, sizes)
        finished = Trainer(recipe, world, inputs, sampler, sizes, trainable, measure).run(resumed)
    if not finished:
        raise SystemExit(EXIT_CODE)


def _built(recipe: Recipe, config: dict[str, Any], inputs: Inputs, world: World, sampler: Sampler, sizes: Sizes) -> Trainable:
    try:
        return build(recipe, config, inputs, world)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        told = sizes.after_out_of_memory(sizes.largest(inputs.train.samples, sampler.epoch_packs(0)))
        raise OutOfMemory(f"out of memory before the first step ({str(error).splitlines()[0]}): {told}") from error


def make_sampler(recipe: Recipe, inputs: Inputs, world: World) -> Sampler:
    """Raises ValueError if the store does not fill one optimizer step."""
    return Sampler(
        inputs.train.samples,
        dp=world.topology.dp,
        accumulation=recipe.training.gradient_accumulation,
        pack_tokens=recipe.data.pack_tokens,
        seed=recipe.training.seed,
        ttt_steps=recipe.training.ttt_steps,
    )


@dataclass
class Pace:
    """Time and tokens since the last line of the log."""

    started: float = field(default_factory=time.perf_counter)
    steps: int = 0
    tokens: int = 0
    wait_s: float = 0.0

    def add(self, outcome: StepOutcome) -> None:
        self.steps, self.tokens, self.wait_s = self.steps + 1, self.tokens + outcome.tokens, self.wait_s + outcome.wait_s


class Trainer:
    """A run in progress."""

    def __init__(self, recipe: Recipe, world: World, inputs: Inputs, sampler: Sampler, sizes: Sizes, trainable: Trainable, measure: MeasureAcceptance) -> None:
        self.recipe, self.training, self.world, self.sizes, self.trainable = recipe, recipe.training, world, sizes, trainable
        self.measure = measure
        self.manifest_hash = inputs.train.store.manifest_hash
        self.sampler = sampler
        self.total_steps = sampler.count_steps(self.training.epochs, self.training.max_steps)
        self.pool = read_pool(recipe.data, world.device)
        self.dataset = self._dataset(inputs, inputs.train)
        kernel = choose_attention(world.device, trainable.dtype, inputs.arch.head_dim)
        runner = MicroBatchRunner(trainable.engine, inputs.arch, trainable.head, kernel, self.training, world)
        self.step = OptimizerStep(runner)
        self._feed_settings: dict[str, Any] = {"depth": recipe.data.prefetch, "device": world.device, "dtype": trainable.dtype}
        self.evaluator = None
        if inputs.held_out is not None:
            held_out = self._dataset(inputs, inputs.held_out)
            self.evaluator = Evaluator(runner, held_out, recipe.data.pack_tokens, self._feed_settings)
        self.checkpoints = Checkpoints(
            recipe.run_dir, self.training.keep_checkpoints, trainable.engine, inputs.arch, inputs.vocab, world
        )
        self.log = RunLog(recipe.run_dir, trainable.engine, self.total_steps) if world.is_first else None
        self._unwritten: Callable[[], dict[str, Any]] | None = None
        self._write_error: BaseException | None = None
        self.best: Best | None = None
        self.skipped_steps = 0
        self.done = self.saved = 0
        packs = len(sampler.epoch_packs(0))
        logger.info("%d optimizer steps; an epoch is %d of %d sequences", self.total_steps, sampler.trained_packs(0), packs)

    def run(self, resumed: RunState | None) -> bool:
        """From ``resumed``, or the start, to the last step; False where SIGTERM ended it before, after a checkpoint.

        Raises OutOfMemory on the rank whose memory does not suffice, with what would.
        """
        try:
            with self._explaining_memory(), StopRequest(peers_on_this_host(self.world.agreement)) as stop:
                return self._run(self._resume(resumed) if resumed else 0, stop)
        finally:
            if self.pool is not None:
                self.pool.close()

    def _run(self, start: int, stop: StopRequest) -> bool:
        self.done = self.saved = start
        if start >= self.total_steps:  # its recipe.json stays that of the steps that were made
            text = "nothing left to do: %s already stands at step %d; training.epochs = %s and training.max_steps = %s end at %d"
            logger.info(text, self.recipe.run_dir, start, self.training.epochs, self.training.max_steps, self.total_steps)
            return True
        self._on_first(lambda log: log.start(self.recipe, start))
        if not start:
            self._evaluate(0)
        pace = Pace()
        with Feed(self.dataset, self.sampler.steps(start, self.total_steps), **self._feed_settings) as feed, self._all_lines():
            for number in range(start, self.total_steps):
                rate = learning_rate(number, self.total_steps, self.training)
                outcome = self.step.run(feed, rate, meanwhile=self._write_meanwhile)
                self.world.agreement.raise_together(self._write_error)
                pace.add(outcome)
                self.done = done = number + 1
                if not outcome.applied:
                    self._not_finite(outcome, done)
                elif self._due(done, self.training.log_interval):
                    self._log(outcome, done, rate, pace)
                    pace = Pace()
                if self._pause(done):
                    pace = Pace()
                if done < self.total_steps and self._stops(stop):
                    return False
        return True

    def _stops(self, stop: StopRequest) -> bool:
        """Whether any rank was asked to leave; then all of them have saved this step."""
        if not self.world.agreement.gather([stop.received]).any():
            return False
        if self.saved < self.done:
            self._save()
        logger.info("SIGTERM: step %d of %d is saved, and the same command resumes from it", self.done, self.total_steps)
        return True

    @contextmanager
    def _all_lines(self) -> Iterator[None]:
        """However the steps end, unless the process is killed, the last one that came to its end gets its line."""
        try:
            yield
        except BaseException:
            self._write_meanwhile()
            if self._write_error:
                logger.error("the line of the last step could not be written: %s", self._write_error)
            raise
        self._write_now()

    def _save(self) -> None:
        self._write_now()  # a run that resumes from here has the lines up to here
        self.checkpoints.save(self._state(self.done))
        self.saved = self.done

    @contextmanager
    def _explaining_memory(self) -> Iterator[None]:
        """Turn an out-of-memory error into a sentence that says what to change. Only the rank that it befell speaks; the others
        wait for it in a collective until the launcher ends them."""
        try:
            yield
        except (RuntimeError, ValueError) as error:
            if not is_out_of_memory(error):
                raise
            sharding, state = self.step.runner.sharding, latest(self.recipe.run_dir)
            kept = f"the checkpoint of step {state.step} is whole, the same command resumes from it" if state else "nothing was saved yet"
            raise OutOfMemory(
                f"out of memory after step {self.done} of {self.total_steps} ({str(error).splitlines()[0]}): "
                f"{self.sizes.after_out_of_memory(sharding) if sharding else 'no sequence was at work'}; {kept}; the launcher ends the other ranks"
            ) from error

    def _pause(self, done: int) -> bool:
        """Evaluate and save where that is due; whether it was."""
        decodes = self.training.acceptance_interval > 0 and self._due(done, self.training.acceptance_interval)
        evaluates, saves = decodes or self._due(done, self.training.eval_interval), self._due(done, self.training.save_interval)
        if evaluates:
            self._evaluate(done, decodes=decodes)
        if saves:
            self._save()
        return evaluates or saves

    def _state(self, done: int) -> RunState:
        recipe = self.recipe.model_dump(mode="json")
        return RunState(done, self.world.topology.world_size, self.manifest_hash, recipe, self.skipped_steps, self.best)

    def _due(self, done: int, interval: int) -> bool:
        """Every ``interval`` steps, and after the last one."""
        return done == self.total_steps or (interval > 0 and done % interval == 0)

    def _resume(self, state: RunState) -> int:
        self.checkpoints.load(state)
        self.best, self.skipped_steps = state.best, state.skipped_steps
        logger.info("resuming %s at step %d; %d steps in all", self.recipe.run_dir, state.step, self.total_steps)
        return state.step

    def _evaluate(self, done: int, *, decodes: bool = False) -> None:
        """On held-out features where there are some, and by real decoding if ``decodes``; keeps the draft if it is the best."""
        self._write_now()
        line: dict[str, Any] = {}
        if self.evaluator is not None:
            line |= self.evaluator.run().as_dict()
        if decodes:
            line |= self._decode()
        if line:
            self._on_first(lambda log: log.evaluation({"step": done, **line}))
        length = line.get("accept_length" if self.training.best_by == "acceptance" else "simulated_length")
        if done and length is not None and (self.best is None or length > self.best.length):
            self.best = Best(done, length)
            self.checkpoints.save_best()

    def _on_first(self, write: Callable[[RunLog], None]) -> None:
        """Rank 0 writes; all stop if it cannot. Collective."""
        self.world.agreement.together(lambda: write(self.log) if self.log else None)

    def _decode(self) -> dict[str, Any]:
        """Real speculative decoding of a few held-out prompts on rank 0, while the others wait."""
        tensors = full_state(self.trainable.engine)
        draft = DraftOnDisk(tensors, self.checkpoints.arch, self.checkpoints.vocab, self.recipe.run_dir, self.recipe.target.aux_ids)
        found = self.world.agreement.together(
            lambda: self.measure(self.recipe, draft, self.world.device) if self.world.is_first else {}
        )
        return self.world.agreement.gather_objects(found)[0]

    def _log(self, outcome: StepOutcome, done: int, rate: float, pace: Pace) -> None:
        """Gather what the step's line says from all ranks. Collective. It is written while the device works on the next step: sums and
        norm are there only once the device is through with this one, whose update is still to be done (and so is counted to the next)."""
        sums = sum_over_ranks(outcome.sums, self.world.topology.world_size)
        elapsed = (time.perf_counter() - pace.started) / pace.steps
        stats = outcome.stats
        own = (peak_bytes(self.world.device), int(pace.wait_s * 1e6), int(outcome.read_s * 1e6))
        table = self.world.agreement.gather((*own, stats.bytes_read, stats.bytes_inflated, stats.bytes_used))
        peak, wait, read = table[:, :3].max(0).tolist()
        totals = dict(zip(("bytes_read", "bytes_inflated", "bytes_used"), table[:, 3:].sum(0).tolist(), strict=True))
        known = {
            "lr": rate,
            "tokens_per_s": pace.tokens / pace.steps / elapsed,
            "tokens": outcome.tokens,
            "step_s": elapsed,
            "data_wait_s": wait / 1e6 / pace.steps,
            "read_s": read / 1e6,
            "peak_gib": peak / GIB,
            "epoch": outcome.step.epoch,
            "skipped_steps": self.skipped_steps,
            **totals,
        }
        self._unwritten = lambda: {
            "step": done,
            **metrics_of(sums(), self.step.decay, outcome.positions).as_dict(),
            "grad_norm": outcome.grad_norm,
            **known,
        }

    def _write_meanwhile(self) -> None:
        """``_write_line`` while others may wait for this rank: what goes wrong is kept until they listen."""
        _, error = attempt(self._write_line)
        self._write_error = self._write_error or error

    def _write_now(self) -> None:
        """``_write_line`` where all ranks are. Collective."""
        self.world.agreement.together(self._write_line)

    def _write_line(self) -> None:
        """Write the line that was gathered last, if it has not been written yet."""
        line, self._unwritten = self._unwritten, None
        if line and self.log:
            self.log.step(line())

    def _not_finite(self, outcome: StepOutcome, done: int) -> None:
        """All ranks know it from the gradient norm; together they find out whose samples did it, then stop or go on."""
        named = [name for names in self.world.agreement.gather_objects(outcome.culprits) for name in names]
        samples = ", ".join(dict.fromkeys(named)) or f"none alone; the step held {', '.join(self._names(outcome))}"
        message = f"step {done}: a loss or gradient is not finite (gradient norm {outcome.grad_norm}); samples with such a loss: {samples}"
        if self.training.non_finite == "stop":
            raise ValueError(
                f"{message}; the weights are as before this step. Check these samples (tools/inspect_hdf5.py --verify), lower "
                "training.learning_rate, or set training.non_finite to skip"
            )
        self.skipped_steps += 1
        if self.world.is_first:
            logger.warning("%s; the step is skipped (%d so far)", message, self.skipped_steps)

    def _names(self, outcome: StepOutcome) -> list[str]:
        return [self.dataset.samples[n].entry.id for packs in outcome.step.packs for pack in packs for n in pack]

    def _dataset(self, inputs: Inputs, opened: OpenStore) -> RankDataset:
        return RankDataset(
            opened.store,
            opened.samples,
            self.sizes.settings,
            t2d=inputs.vocab.t2d,
            dp_rank=self.world.topology.dp_rank,
            sp_rank=self.world.topology.sp_rank,
            labeler=self.trainable.labeler,
            pool=self.pool,
            pin=self.world.device.type == "cuda",
        )
