"""A training step on the CPU that allocates what a GPU would, and what the allocator saw of it.

A GPU's fused kernels (norms, rope, SwiGLU, attention, the loss's rows) are replaced by ones that allocate the
same tensors and compute nothing; autograd, checkpointing, the unroll, the exchange and the loss's chunks are
the real ones. Sizes keep the proportions of a Llama-3.1-8B draft.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from eagle_ds.config.recipe import Recipe
from eagle_ds.data.batch import TokenLabels, counted_rows
from eagle_ds.estimate import tensor_sizes
from eagle_ds.estimate.memory import MemoryModel, Parts
from eagle_ds.estimate.sequences import document_in_turns, sharding_for
from eagle_ds.kernels.backend import PlainOperations
from eagle_ds.model import draft, loss, projections
from eagle_ds.model.arch import DraftArch
from eagle_ds.model.draft import Eagle3Draft
from eagle_ds.model.loss import HeadTargets, LossSettings, head_loss
from eagle_ds.model.offload import ActivationOffload
from eagle_ds.sharding import ranges as rg
from eagle_ds.sharding import tiles
from eagle_ds.target.head import TargetHead
from tests.micro_batch import WholeSequence, kept_bytes, prefix_for, rank_batch

ROWS, TILE, TURN = 1024, 64, 32
D = 256
UNITS = {
    "hidden_size": D, "intermediate_size": 7 * D // 2, "num_attention_heads": 8, "num_key_value_heads": 2,
    "head_dim": 32
}


@dataclass(frozen=True)
class AllocationCase:
    """One shape and setting."""

    recompute: str
    fraction: float
    offload: bool = False
    target_width: int = 0  # H where it is not D: the draft then trains an embedding of its own

    def __str__(self) -> str:
        wide = f"-H{self.target_width}" if self.target_width else ""
        return f"{self.recompute}-{self.fraction}{'-offload' if self.offload else ''}{wide}"

    def recipe(self) -> Recipe:
        return Recipe.model_validate(
            {
                "name": "allocations",
                "target": {
                    "model": "none", "hidden_size": self.target_width or D, "num_layers": 8,
                    "vocab_size": 1000
                },
                "draft": {**UNITS, "vocab_size": 500, "rope_theta": 100.0},
                "data": {"store": "none", "max_length": ROWS},
                "training": {"recompute": self.recompute, "offload_activations": self.offload},
                "deepspeed": "none",
            }
        )


CASES = tuple(
    AllocationCase(mode, fraction, offload)
    for mode in ("full", "mlp", "selective", "none")
    for fraction in (1.0, 0.1)
    for offload in (False, True)
    if not (offload and mode == "selective")
) + tuple(AllocationCase(mode, 0.1, offload, 2 * D) for mode in ("full", "mlp") for offload in (False, True))


@dataclass(frozen=True)
class Held:
    """Bytes beyond model and inputs, measured and predicted: until the loss is done, and in all."""

    loss: int
    peak: int
    predicted_loss: int
    predicted: int
    host: int  # bytes that lay in host memory when the loss was done
    predicted_host: int


def held_bytes(case: AllocationCase) -> Held:
    """Run two steps, the first to warm up, and count the second."""
    recipe = case.recipe()
    with _as_on_a_gpu():
        step = _Step(recipe, case.fraction)
        step.forward().backward()
        step.model.zero_grad(set_to_none=True)
        loss_peak, peak, host = _traced(step)
        model = MemoryModel(recipe, {}, 1, step.sharding, prefetched=0)
        stages, predicted_host = model.by_stage(), model.host_bytes
    beyond = {stage: beyond_model_and_inputs(parts) for stage, parts in stages.items()}
    predicted_loss = max(size for stage, size in beyond.items() if stage.phase.is_forward)
    return Held(loss_peak, peak, predicted_loss, max(beyond.values()), host, predicted_host)


def beyond_model_and_inputs(parts: Parts) -> int:
    before = (
        "process", "weights", "target's embedding and head", "gradients accumulated", "optimizer state",
        "hidden states"
    )
    return sum(size for name, size in parts.items() if name not in before)


class _Step:
    """A draft, one random sequence, and the step over it."""

    def __init__(self, recipe: Recipe, fraction: float) -> None:
        self.recipe, arch, wide = recipe, DraftArch.from_recipe(recipe), recipe.target.hidden_size
        self.sharding = sharding_for(recipe, [document_in_turns(ROWS, fraction, TURN)])
        self.model = Eagle3Draft(arch)
        mask = np.zeros(ROWS, dtype=np.uint8)
        mask[rg.rows(self.sharding.documents[0].trained_spans)] = 1
        ids, logsumexp = np.zeros(ROWS, dtype=np.int32), np.zeros(ROWS, dtype=np.float32)
        labels = [TokenLabels(ids, mask, ids, logsumexp)]
        whole = WholeSequence(labels, torch.zeros(ROWS, 3 * wide), torch.zeros(ROWS, wide))
        self.batch = rank_batch(self.sharding, 0, whole, "serving")
        self.offload: ActivationOffload | None = None
        if recipe.training.offload_activations:
            self.offload = ActivationOffload(torch.device("cpu"), min_bytes=ROWS, slab_bytes=1 << 14)
        self.head = TargetHead(
            torch.zeros(500, wide), torch.ones(1000, dtype=torch.bool), torch.zeros(500, dtype=torch.int64)
        )

    def forward(self) -> Tensor:
        batch = self.batch
        counted = counted_rows(batch.trained, batch.target_token, batch.target_index, self.head.t2d)
        targets = HeadTargets(
            self.head, batch.target_hidden, batch.target_logsumexp, batch.target_token, batch.target_index,
            batch.trained, counted,
        )
        settings, training = LossSettings(torch.ones(self.sharding.ttt_steps)), self.recipe.training
        prefix = prefix_for(self.model, self.sharding, kernel=AllocatingAttention())

        def loss_of(*states: Any) -> Any:
            return head_loss(*states, targets, settings)

        return self.model(batch, prefix, loss_of, training.recompute, self.offload)[0]


def _traced(step: _Step) -> tuple[int, int, int]:
    """Return the peak bytes of the forward and of the whole step, and the bytes in host memory.

    The peaks are those of the CPU's allocator. Slabs were allocated before, so they are not part of them.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        loss = step.forward()
        with record_function("backward begins"):
            host = kept_bytes(step.offload) if step.offload else 0
        loss.backward()
    events = sorted((e.start_ns(), e.name(), e.nbytes()) for e in recorded.profiler.kineto_results.events())
    held = peak = forward = 0
    for _, name, size in events:
        if name == "backward begins":
            forward = peak
        elif name == "[memory]":
            held += size
            peak = max(peak, held)
    return forward, peak, host


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    budget = {"cuda": ROWS * D * 8, "cpu": ROWS * D * 8}
    with ExitStack() as stack:
        for place, name, value in (
            (draft, "operations_for", lambda x: _AllocatingOperations),
            (projections, "operations_for", lambda x: _AllocatingOperations),
            (loss, "operations_for", lambda x: _LossOperations),
            (tiles, "TILE_ROWS", TILE),
            (loss, "LOSS_CHUNK_BYTES", budget),
            (tensor_sizes, "LOSS_CHUNK_BYTES", budget),
        ):
            stack.enter_context(mock.patch.object(place, name, value))
        yield


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None]:
        x, weight = ctx.saved_tensors
        return torch.empty_like(x) if ctx.needs_input_grad[0] else None, torch.zeros_like(weight), None


class _NormInto(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, column: int, x: Tensor, weight: Tensor, eps: float, rows: Tensor | None = None
    ) -> Tensor:
        ctx.mark_dirty(z)
        ctx.table = rows is not None
        ctx.save_for_backward(weight, x if rows is None else rows)
        return z

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        weight, x = ctx.saved_tensors
        dx = torch.empty_like(x) if ctx.needs_input_grad[2] and not ctx.table else None
        return (dz if ctx.needs_input_grad[0] else None), None, dx, torch.zeros_like(weight), None, None


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        grad = grad if grad.stride()[1:] == (grad.shape[-1], 1) else grad.contiguous()
        return torch.zeros(grad.shape, dtype=grad.dtype), None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return gate, up


class AllocatingAttention:
    """Kernels that allocate and compute nothing."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bounds: Any, scale: float) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(q), torch.zeros(q.shape[:2])

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bounds: Any,
        scale: float, dk: Tensor, dv: Tensor,
    ) -> Tensor:
        workspace = torch.empty(q.shape), torch.empty_like(k), torch.empty_like(v)
        dq = torch.zeros_like(q)
        del workspace
        return dq

    def diagonal_forward(
        self, q: Tensor, out: Tensor, lse: Tensor, diagonals: Sequence[Tensor], scale: float
    ) -> tuple[Tensor, Tensor]:
        return (torch.zeros_like(out), torch.zeros_like(lse)) if diagonals else (out, lse)

    def diagonal_backward(
        self, dout: Tensor, q: Tensor, out: Tensor, lse: Tensor, diagonals: Sequence[Tensor], scale: float,
        dq: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:
        return (torch.zeros_like(dq) if diagonals else dq), [torch.zeros_like(x) for x in diagonals]


class _RowKernels:
    @staticmethod
    def label_sums(target_logits: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(target_logits)), torch.zeros(len(target_logits))

    @staticmethod
    def row_losses(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        return torch.zeros(len(logits)), torch.zeros(len(logits)), torch.zeros(len(logits), dtype=torch.int64)


class _AllocatingOperations(PlainOperations):
    """Allocate and keep for the backward what the Triton operations do."""

    rms_norm = _Norm.apply
    norm_into = _NormInto.apply
    rope = _Rope.apply

    @staticmethod
    def norm_rows_into(
        z: Tensor, column: int, table: Tensor, rows: Tensor, weight: Tensor, eps: float
    ) -> Tensor:
        return _NormInto.apply(z, column, table, weight, eps, rows)

    @staticmethod
    def rms_norm_gradients(grad: Tensor, x: Tensor, weight: Tensor, *_: Any, **named: Any) -> Tensor:
        return torch.zeros_like(weight)

    @staticmethod
    def rotate_into(*_: Any, **named: Any) -> None:
        pass

    @staticmethod
    def swiglu(gate: Tensor, up: Tensor, *, overwrite: bool = False) -> Tensor:
        return _SwiGLU.apply(gate, up)

    @staticmethod
    def take_rows(table: Tensor, index: Tensor, columns: int) -> Tensor:
        return table.new_empty(len(index), columns)

    @staticmethod
    def add_rows(*_: Any) -> None:
        pass

    @staticmethod
    def add_product(*_: Any) -> None:
        pass


class _LossOperations(_AllocatingOperations):
    """The loss's own row kernels, and the real product, which allocates its result."""

    loss = _RowKernels
    add_product = PlainOperations.add_product
