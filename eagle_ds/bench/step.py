"""Time a training step by phase, through the code that trains, and compare it with its floor.

The floor is the floating-point work of the busiest rank (``step_time.floor_seconds``) at rates measured in
the same run (``flops.measure_ceilings``): an 8192^3 matmul, and cuDNN's causal attention at 32K tokens. These
are the fastest kernels known here, whichever kernels the step itself uses.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import deepspeed
import numpy as np
import torch
from torch import Tensor
from torch.profiler import record_function

from eagle_ds.bench.flops import data_sheet_tflops, model_flops
from eagle_ds.bench.sources import Source
from eagle_ds.config.deepspeed import bf16_enabled
from eagle_ds.config.recipe import Recipe
from eagle_ds.data.batch import Batch
from eagle_ds.estimate.devices import GIB, Device
from eagle_ds.estimate.fit import choose_ring_mode
from eagle_ds.estimate.sequences import sharding_for
from eagle_ds.estimate.step_time import floor_seconds
from eagle_ds.kernels.backend import choose_attention
from eagle_ds.model.arch import DraftArch
from eagle_ds.model.draft import Eagle3Draft
from eagle_ds.model.loss import step_decays
from eagle_ds.sharding.sequence import Document, SequenceSharding
from eagle_ds.target.head import TargetHead
from eagle_ds.training.metrics import step_weights
from eagle_ds.training.step import MicroBatchRunner
from eagle_ds.training.world import World

PHASES = ("data", "forward", "backward", "optimizer")
LOSS_REGION = "head and loss"  # name of a profiler range inside the forward

Moment = float | torch.cuda.Event
"""A time of the host's clock, or an event in the order of the GPU's work."""


@dataclass(frozen=True)
class StepTimes:
    """Mean times of the slowest rank, in milliseconds, and peak memory of the fullest rank.

    Steps follow each other as in training: the host queues work ahead and waits for the GPU only where
    DeepSpeed does. A phase lasts from the moment the GPU has finished the phase before it until the GPU has
    finished this one. ``step_ms`` is the sum of all phases, including the wait for data (0 if the data is in
    memory). All memory is zero on CPU.
    """

    step_ms: float
    data_wait_ms: float
    forward_ms: float
    backward_ms: float
    optimizer_ms: float
    peak_gib: float
    resident_gib: float  # held between steps, without the batch: weights, float32 gradients, optimizer state
    kept_gib: float  # kept by the forward for the backward, with the batch: what sequence parallelism shards


class StepBench:
    """A draft of the recipe's sizes in its DeepSpeed engine. ``use`` sets the source of its batches."""

    def __init__(
        self, recipe: Recipe, config: dict[str, Any], documents: list[Document], world: World
    ) -> None:
        self.recipe, self.world = recipe, world
        self.dtype = torch.bfloat16 if bf16_enabled(config) else torch.float32
        torch.manual_seed(recipe.training.seed)
        arch = DraftArch.from_recipe(recipe)
        with world.device:  # a GPU draws a billion random numbers at once, a CPU takes ten seconds
            model = Eagle3Draft(arch)
            if not arch.trains_embedding:
                model.embed_tokens.weight.normal_()
                model.embed_tokens.to(self.dtype)
        parameters = list(model.parameters())
        self.engine, *_ = deepspeed.initialize(model=model, model_parameters=parameters, config=config)
        tokens = sum(document.num_tokens for document in documents)
        mode = choose_ring_mode(recipe, tokens, self.dtype.itemsize, world.memory_bytes)
        self.sharding = sharding_for(recipe, documents, mode)
        kernel = choose_attention(world.device, self.dtype, arch.head_dim)
        self.runner = MicroBatchRunner(
            _LossMarked(self.engine), arch, self._head(arch), kernel, recipe.training, world
        )
        self.source: Source | None = None
        self._batch: tuple[Batch, Tensor] | None = None
        self._batch_bytes = 0
        self._loss: Tensor | None = None
        self._resident: int | None = None
        self._held = 0  # bytes allocated after the last forward
        # Every rank holds a whole gradient of the head, which the forward computes (see the loss).
        self._head_gradient = arch.draft_vocab_size * arch.hidden_size * self.dtype.itemsize

    def use(self, source: Source | None) -> None:
        """Take batches from ``source`` from now on, and close the previous source."""
        self._batch = self._loss = None
        if self.source is not None:
            self.source.close()
        self.source = source

    def run(self, steps: int, warmup: int = 1) -> StepTimes:
        """Time ``steps`` optimizer steps after ``warmup`` untimed ones. Collective."""
        for _ in range(warmup):
            self.step()
        self._reset_peak()
        marks = [self.step() for _ in range(steps)]
        times = np.array([_seconds_between(moments) for moments in marks])
        if self._resident is None:
            self._resident = self._between_steps()
        kept = max(self._held - self._resident - self._head_gradient, 0)
        phases = times.mean(0)
        seconds, memory = self._fullest([phases.sum(), *phases], [self._peak(), self._resident, kept])
        return StepTimes(*(1e3 * s for s in seconds), *(x / GIB for x in memory))

    def step(self) -> list[Moment]:
        """Run one step; return when it began and when each of ``PHASES`` ended. Does not wait for the GPU."""
        moments = [self._now()]
        for name, work in self._phases():
            with record_function(name):
                work()
            moments.append(self._now())
        return moments

    def memory_by_phase(self) -> dict[str, float]:
        """Run one more step; return the memory held before it and the peak of each phase. Collective.

        GiB of the fullest rank; zeros on CPU.
        """
        held = [self._allocated()]
        for _, work in self._phases():
            self._reset_peak()
            work()
            held.append(self._peak())
        fullest = self.world.agreement.gather(held).max(0)
        names = ("resting", *PHASES)
        return {f"{n}_gib": round(int(value) / GIB, 2) for n, value in zip(names, fullest, strict=True)}

    def _phases(self) -> list[tuple[str, Callable[[], None]]]:
        return list(zip(PHASES, (self._take, self._forward, self._backward, self.engine.step), strict=True))

    def _take(self) -> None:
        assert self.source is not None, "use a source first"
        self._batch = self.source.take()
        tensors = [x for x in vars(self._batch[0]).values() if isinstance(x, Tensor)]
        self._batch_bytes = sum(tensor.nbytes for tensor in tensors)

    def _forward(self) -> None:
        assert self._batch is not None and self.source is not None
        batch, counted = self._batch
        training = self.recipe.training
        decay = step_decays(training.step_decay, training.ttt_steps)
        # DeepSpeed averages over all ranks, the loss is a sum over them: hence the factor world size.
        weights = self.world.topology.world_size * step_weights(counted, decay, None)
        self._loss, _ = self.runner(batch, weights)
        self._held = self._allocated()
        self.source.advance()

    def _backward(self) -> None:
        self.engine.backward(self._loss)
        self._loss = self._batch = None  # freed before the optimizer runs, as in training

    @property
    def _on_gpu(self) -> bool:
        return self.world.device.type == "cuda"

    def _now(self) -> Moment:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _reset_peak(self) -> None:
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self._on_gpu else 0

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated() if self._on_gpu else 0

    def _between_steps(self) -> int:
        """Bytes allocated now, without the batch. Called after a step, so the optimizer's state exists."""
        return max(self._allocated() - self._batch_bytes, 0)

    def _fullest(self, seconds: list[float], memory: list[int]) -> tuple[list[float], list[int]]:
        """Return the largest value among all ranks, for each entry by itself. Collective."""
        # The agreement carries integers: seconds travel as nanoseconds.
        values = [*(int(s * 1e9) for s in seconds), *memory]
        largest = self.world.agreement.gather(values).max(0).tolist()
        return [ns / 1e9 for ns in largest[: len(seconds)]], largest[len(seconds) :]

    def _head(self, arch: DraftArch) -> TargetHead:
        """Make a random head. Every token is in the draft vocabulary, so that every trained row counts."""
        device, width = self.world.device, arch.target_hidden_size
        rows = torch.randn(arch.draft_vocab_size, width, device=device, dtype=self.dtype) * width**-0.5
        all_tokens = torch.ones(arch.target_vocab_size, dtype=torch.bool, device=device)
        offsets = torch.zeros(arch.draft_vocab_size, dtype=torch.int64, device=device)
        return TargetHead(rows, all_tokens, offsets)


def _seconds_between(moments: list[Moment]) -> list[float]:
    """Return the seconds from each moment to the next; waits for the last one."""
    if isinstance(moments[-1], float):
        return np.diff(moments).tolist()
    moments[-1].synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in pairwise(moments)]


class _LossMarked:
    """The engine, with a profiler range around head and loss: by name, their matmuls look like all others."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def __call__(self, batch: Batch, prefix: Any, loss: Callable[..., Any], *rest: Any, **named: Any) -> Any:
        def marked(*states: Any) -> Any:
            with record_function(LOSS_REGION):
                return loss(*states)

        return self._engine(batch, prefix, marked, *rest, **named)


def forget_benches(device: torch.device) -> None:
    """Free the memory of benches that are no longer referenced, so that the next one's peak is its own.

    Collects twice. The first collection ends DeepSpeed's optimizer; only the second one frees the reference
    cycles that the optimizer held, 6 bytes per parameter under ZeRO-1.
    """
    for _ in range(2):
        gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def summary(
    recipe: Recipe, sharding: SequenceSharding, times: StepTimes, device: Device | None
) -> dict[str, Any]:
    """Return the values of one JSON line: times and rates; with ``device`` also the floor and the ratio to
    it.
    """
    seconds, world = times.step_ms / 1e3, sharding.world
    mode = f" {sharding.ring_mode}" if sharding.ring > 1 else ""
    line: dict[str, Any] = {
        "tokens": sharding.num_tokens,
        "documents": len(sharding.documents),
        "trained_rows": sharding.num_queries,
        "layout": f"U{sharding.ulysses} R{sharding.ring}{mode}",
        "ttt_steps": sharding.ttt_steps,
        "recompute": recipe.training.recompute,
        **{name: round(value, 2) for name, value in asdict(times).items()},
        "tokens_per_s_per_gpu": round(sharding.num_tokens / seconds / world),
        "trained_rows_per_s": round(sharding.num_queries / seconds),
    }
    if device is None:
        return line
    floor = floor_seconds(recipe, sharding, device)
    # With one rate for all operations, floor seconds times that rate is the number of operations.
    rate = device.matmul_tflops
    at_one_rate = replace(device, attention_forward_tflops=rate, attention_backward_tflops=rate)
    flops = sum(floor_seconds(recipe, sharding, at_one_rate).values()) * rate * 1e12
    peak = data_sheet_tflops(device.name)
    ceilings = rate, device.attention_forward_tflops, device.attention_backward_tflops
    mfu = model_flops(recipe, sharding) / (seconds * world * peak * 1e12) if peak else None
    return line | {
        "floor_ms": round(1e3 * sum(floor.values()), 2),
        "ratio_to_floor": round(seconds / sum(floor.values()), 3),
        "tflops_per_gpu": round(flops / seconds / 1e12, 1),
        "mfu": None if mfu is None else round(mfu, 4),
        "ceilings_tflops": [round(x) for x in ceilings],
        "gpu": device.name,
        "gpu_gib": round(device.memory_gib, 1),
    }
