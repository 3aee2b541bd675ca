"""A training step on random features through the real code path, timed by phase and set beside its floor.

The floor is the floating-point work of the busiest rank (``planner.floor_seconds``) at rates measured in the same run: an
8192^3 matmul, and cuDNN's causal attention at 32K tokens, the fastest kernels known here whatever kernel runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import deepspeed
import numpy as np
import torch
from torch import Tensor

from eagle_ds import ranges as rg
from eagle_ds.config import Recipe
from eagle_ds.data.batch import Batch, TokenFacts, assemble
from eagle_ds.ds_config import bf16_enabled
from eagle_ds.engine.metrics import step_weights
from eagle_ds.engine.step import MicroBatchRunner
from eagle_ds.engine.world import World
from eagle_ds.layout import Document, SequencePlan
from eagle_ds.loss import TargetHead, uniform_decay
from eagle_ds.model.arch import DraftArch
from eagle_ds.model.attention import KeyBounds
from eagle_ds.model.attention_cuda import CudnnBackend, choose_attention
from eagle_ds.model.draft import Eagle3Draft
from eagle_ds.planner import GIB, Device, choose_ring_mode, floor_seconds, plan_for


@dataclass(frozen=True)
class StepTimes:
    """Milliseconds of the slowest rank, means over the timed steps, and the peak of the fullest rank."""

    step_ms: float
    forward_ms: float
    backward_ms: float
    optimizer_ms: float
    peak_gib: float


class StepBench:
    """A draft of the recipe's sizes in its DeepSpeed engine, and one random sequence."""

    def __init__(self, recipe: Recipe, config: dict[str, Any], documents: list[Document], world: World) -> None:
        self.recipe, self.world = recipe, world
        self.dtype = torch.bfloat16 if bf16_enabled(config) else torch.float32
        torch.manual_seed(recipe.training.seed)
        arch = DraftArch.from_recipe(recipe)
        model = Eagle3Draft(arch)
        if not arch.trains_embedding:
            model.embed_tokens.weight.normal_()
            model.embed_tokens.to(self.dtype)
        self.engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
        mode = choose_ring_mode(recipe, sum(d.num_tokens for d in documents), self.dtype.itemsize, world.memory_bytes)
        self.plan = plan_for(recipe, documents, mode)
        kernel = choose_attention(world.device, self.dtype, arch.head_dim)
        self.runner = MicroBatchRunner(self.engine, arch, self._head(arch), kernel, recipe.training, world)
        self.batch = self._batch(arch)

    def run(self, steps: int, warmup: int = 1) -> StepTimes:
        """Time ``steps`` optimizer steps after ``warmup``. Collective."""
        for _ in range(warmup):
            self.step()
        self._reset_peak()
        times = torch.tensor([self.step() for _ in range(steps)], dtype=torch.float64)
        slowest = self._slowest(torch.cat([times.mean(0), torch.tensor([self._peak()], dtype=torch.float64)]))
        forward, backward, optimizer, peak = slowest.tolist()
        return StepTimes(1e3 * (forward + backward + optimizer), 1e3 * forward, 1e3 * backward, 1e3 * optimizer, peak / GIB)

    def step(self) -> tuple[float, float, float]:
        """Seconds of forward, backward and optimizer of one step."""
        training = self.recipe.training
        counted = torch.full((training.ttt_steps,), max(self.plan.num_queries * self.world.topology.dp, 1))
        weights = self.world.topology.world_size * step_weights(counted, uniform_decay(training.step_decay, training.ttt_steps), None)
        marks = [self._now()]
        loss, _ = self.runner(self.batch, weights)
        marks.append(self._now())
        self.engine.backward(loss)
        marks.append(self._now())
        self.engine.step()
        marks.append(self._now())
        return marks[1] - marks[0], marks[2] - marks[1], marks[3] - marks[2]

    def _now(self) -> float:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _reset_peak(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def _peak(self) -> float:
        return float(torch.cuda.max_memory_allocated()) if self.world.device.type == "cuda" else 0.0

    def _slowest(self, values: Tensor) -> Tensor:
        everyone = self.world.agreement.gather([int(v * 1e9) for v in values[:-1].tolist()] + [int(values[-1])]).max(0)
        return torch.tensor([*(everyone[:-1] / 1e9), everyone[-1]], dtype=torch.float64)

    def _head(self, arch: DraftArch) -> TargetHead:
        """A random head; every token counts as in the draft vocabulary, so that every trained row is worked on."""
        device = self.world.device
        rows = torch.randn(arch.draft_vocab_size, arch.target_hidden_size, device=device, dtype=self.dtype) * arch.target_hidden_size**-0.5
        all_tokens = torch.ones(arch.target_vocab_size, dtype=torch.bool, device=device)
        return TargetHead(None, rows, all_tokens, torch.zeros(arch.draft_vocab_size, dtype=torch.int64, device=device))

    def _batch(self, arch: DraftArch) -> Batch:
        device, rank, rng = self.world.device, self.world.topology.sp_rank, np.random.default_rng(0)
        facts = []
        for document in self.plan.documents:
            size, mask = document.num_tokens, np.zeros(document.num_tokens, dtype=np.uint8)
            mask[rg.rows(document.trained_spans)] = 1
            ids = rng.integers(0, arch.target_vocab_size, (2, size), dtype=np.int32)
            facts.append(TokenFacts(ids[0], mask, ids[1], np.full(size, 10.0, dtype=np.float32)))
        generator = torch.Generator(device).manual_seed(rank)

        def random(rows: rg.Ranges, width: int) -> Tensor:
            return torch.randn(rg.count(rows), width, device=device, dtype=self.dtype, generator=generator)

        aux = random(self.plan.aux_rows(rank), arch.num_aux * arch.target_hidden_size)
        hidden = random(self.plan.target_rows(rank), arch.target_hidden_size)
        return assemble(self.plan, rank, facts, aux, hidden, alignment=self.recipe.training.mask_alignment).to(device)


def measure_ceilings(device: torch.device) -> Device:
    """This GPU's rates, TFLOP/s: matmul 8192^3, and causal attention of 32K tokens, 32 heads over 8, d = 128."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    matmul = 2 * 8192**3 / _seconds(lambda: a @ b, 20)
    rows = 32768
    q, k, v, dout = (torch.randn(rows, heads, 128, device=device, dtype=torch.bfloat16) for heads in (32, 8, 8, 32))
    bounds = KeyBounds.make(np.zeros(rows, dtype=np.int64), np.arange(1, rows + 1), device)
    kernel, scale = CudnnBackend(), 128**-0.5
    out, lse = kernel.forward(q, k, v, bounds, scale)
    dk, dv = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
    work = 4 * 32 * 128 * rows * (rows + 1) / 2
    forward = work / _seconds(lambda: kernel.forward(q, k, v, bounds, scale), 5)
    backward = 2.5 * work / _seconds(lambda: kernel.backward(dout, q, k, v, out, lse, bounds, scale, dk, dv), 3)
    total = torch.cuda.get_device_properties(device).total_memory / GIB
    return Device(torch.cuda.get_device_name(device), total, matmul / 1e12, forward / 1e12, backward / 1e12, "measured in this run")


def _seconds(work: Callable[[], Any], repeats: int) -> float:
    work()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / repeats


def summary(recipe: Recipe, plan: SequencePlan, times: StepTimes, device: Device | None) -> dict[str, Any]:
    """One JSON line: times, rates, and with ``device`` the floor of this shape and the ratio to it."""
    seconds, world = times.step_ms / 1e3, plan.world
    line: dict[str, Any] = {
        "tokens": plan.num_tokens,
        "documents": len(plan.documents),
        "trained_rows": plan.num_queries,
        "layout": f"U{plan.ulysses} R{plan.ring}" + (f" {plan.ring_mode}" if plan.ring > 1 else ""),
        "recompute": recipe.training.recompute,
        **{name: round(value, 2) for name, value in asdict(times).items()},
        "tokens_per_s_per_gpu": round(plan.num_tokens / seconds / world),
        "trained_rows_per_s": round(plan.num_queries / seconds),
    }
    if device is None:
        return line
    floor = floor_seconds(recipe, plan, device)
    at_one_rate = replace(device, attention_forward_tflops=device.matmul_tflops, attention_backward_tflops=device.matmul_tflops)
    flops = sum(floor_seconds(recipe, plan, at_one_rate).values()) * device.matmul_tflops * 1e12
    return line | {
        "floor_ms": round(1e3 * sum(floor.values()), 2),
        "ratio_to_floor": round(seconds / sum(floor.values()), 3),
        "tflops_per_gpu": round(flops / seconds / 1e12, 1),
        "ceilings_tflops": [round(x) for x in (device.matmul_tflops, device.attention_forward_tflops, device.attention_backward_tflops)],
        "gpu": device.name,
    }
