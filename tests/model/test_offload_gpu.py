"""Offload on a GPU: overlapping copies never race with the computation, and peak memory is as predicted."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from eagle_ds.config.recipe import Recipe
from eagle_ds.data.batch import TokenLabels
from eagle_ds.estimate.memory import MemoryModel
from eagle_ds.estimate.sequences import document_in_turns, sharding_for
from eagle_ds.kernels.backend import choose_attention
from eagle_ds.model.arch import DraftArch
from eagle_ds.model.draft import Eagle3Draft
from eagle_ds.model.loss import LossSettings, head_loss
from eagle_ds.model.offload import ActivationOffload
from tests.allocation_cases import beyond_model_and_inputs
from tests.micro_batch import (
    WholeHead,
    WholeSequence,
    gradients,
    kept_bytes,
    make_targets,
    prefix_for,
    rank_batch,
    relative_error,
)

pytestmark = pytest.mark.gpu

D, ROWS = 1024, 32768
BF16 = {"bf16": {"enabled": True}}
NOISE = 5e-3  # relative L2 of a bfloat16 gradient, from sums in another order
PEAK_BOUND = 0.10
SIZES = {
    "hidden_size": D, "intermediate_size": 7 * D // 2, "num_attention_heads": 8, "num_key_value_heads": 2,
    "head_dim": 128
}


def make_recipe(recompute: str, offload: bool) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "offload",
            "target": {"model": "none", "hidden_size": D, "num_layers": 8, "vocab_size": 8000},
            "draft": {**SIZES, "vocab_size": 4000, "rope_theta": 1e4},
            "data": {"store": "none", "max_length": ROWS},
            "training": {"recompute": recompute, "offload_activations": offload},
            "deepspeed": "none",
        }
    )


@dataclass
class Taken:
    """Results of one step, and its peak memory beyond what was allocated before."""

    loss: Tensor
    gradients: dict[str, Tensor]
    peak_bytes: int


class GpuStep:
    """A draft and one sequence on the GPU."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.device = recipe, torch.device("cuda", 0)
        self.sharding = sharding_for(recipe, [document_in_turns(ROWS, 1.0)])
        torch.manual_seed(0)
        arch = DraftArch.from_recipe(recipe)
        self.model = Eagle3Draft(arch)
        self.model.embed_tokens.weight.normal_()
        self.model.to(self.device, torch.bfloat16)
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(0, 8000, (ROWS,), generator=generator, dtype=torch.int32).numpy()
        mask = torch.ones(ROWS, dtype=torch.uint8).numpy()
        aux, hidden = (torch.randn(ROWS, width, generator=generator).bfloat16() for width in (3 * D, D))
        self.batch = rank_batch(
            self.sharding, 0, WholeSequence([TokenLabels(ids, mask)], aux, hidden), "serving"
        ).to(self.device)
        full = (torch.randn(8000, D, generator=generator) * D**-0.5).to(self.device, torch.bfloat16)
        # Every pair counts, as the prediction assumes.
        inside = torch.ones(8000, dtype=torch.bool, device=self.device)
        self.head = WholeHead(
            full[:4000], inside, torch.zeros(4000, dtype=torch.int64, device=self.device), full
        )
        self.targets = make_targets(self.batch, self.head)
        self.kernel = choose_attention(self.device, torch.bfloat16, arch.head_dim)
        self.offload: ActivationOffload | None = None
        if recipe.training.offload_activations:
            self.offload = ActivationOffload(self.device, slab_bytes=1 << 22)

    def take(self) -> Taken:
        self.model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        settings = LossSettings(torch.full((7,), 1 / ROWS, device=self.device))
        recompute = self.recipe.training.recompute
        prefix = prefix_for(self.model, self.sharding, kernel=self.kernel, recompute=recompute)
        loss, _ = self.model(
            self.batch, prefix, lambda *states: head_loss(*states, self.targets, settings),
            recompute, self.offload,
        )
        loss.backward()
        torch.cuda.synchronize()
        return Taken(loss.detach(), gradients(self.model), torch.cuda.max_memory_allocated() - before)


@pytest.mark.parametrize("recompute", ["full", "mlp"])
def test_steps_with_offload_give_the_gradients_of_steps_without(recompute: str) -> None:
    plain = GpuStep(make_recipe(recompute, offload=False)).take()
    step = GpuStep(make_recipe(recompute, offload=True))
    for _ in range(5):  # a race may not show at once
        taken = step.take()
        assert float(taken.loss) == pytest.approx(float(plain.loss), rel=1e-5)
        for name, gradient in taken.gradients.items():
            assert relative_error(gradient, plain.gradients[name]) < NOISE, name
    assert step.offload is not None and kept_bytes(step.offload) == 0


@pytest.mark.parametrize("offload", [False, True])
def test_the_peak_is_as_predicted(offload: bool) -> None:
    step = GpuStep(make_recipe("full", offload))
    step.take()
    found = step.take().peak_bytes
    stages = MemoryModel(step.recipe, BF16, 1, step.sharding, prefetched=0).by_stage()
    predicted = max(map(beyond_model_and_inputs, stages.values()))
    assert predicted == pytest.approx(found, rel=PEAK_BOUND)
