"""The dense float64 reference over a whole store: the expected result of an optimizer step and an
evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eagle_ds.config.recipe import Recipe
from eagle_ds.data.vocab import load_or_build
from eagle_ds.model.arch import DraftArch
from eagle_ds.model.loss import step_decays
from eagle_ds.store.store import Store
from eagle_ds.target.files import load_target_weights
from tests.plain_reference import ReferenceSums, document_sums


@dataclass
class Dense:
    """Loss, gradients and metric sums of every sample of a store as one global batch."""

    loss: float
    gradients: dict[str, Tensor]
    sums: ReferenceSums
    tokens: int

    @property
    def norm(self) -> float:
        return float(torch.stack([g.norm() for g in self.gradients.values()]).norm())


def dense_step(recipe: Recipe, weights: dict[str, Tensor], root: str | None = None) -> Dense:
    """Compute one step in float64 over the store ``root``, by default the recipe's. ``weights`` have training
    names.
    """
    training, arch = recipe.training, DraftArch.from_recipe(recipe)
    store = Store(root or recipe.data.store)
    vocab = load_or_build(Store(recipe.data.store), arch.draft_vocab_size)
    target = load_target_weights(recipe.target.model, ("embed_tokens", "lm_head"), torch.float64)
    leaves = {name: tensor.double().requires_grad_() for name, tensor in weights.items()}
    lookup = {"embed_tokens.weight": target["embed_tokens"], **leaves}
    mix = torch.ones(training.ttt_steps, dtype=torch.float64)
    sums, tokens = _sums(recipe, arch, store, lookup, target["lm_head"], vocab.t2d, mix)
    counted = sums.counted.clamp(min=1)
    if training.loss == "lambda":
        mix = training.kl_scale * torch.exp(-training.kl_decay * (sums.alpha / counted).detach())
        sums, tokens = _sums(recipe, arch, store, lookup, target["lm_head"], vocab.t2d, mix)
    divisor = torch.full_like(counted, tokens) if training.loss_normalization == "positions" else counted
    loss = (step_decays(training.step_decay, training.ttt_steps) * sums.loss / divisor).sum()
    gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    return Dense(float(loss.detach()), gradients, sums, tokens)


def _sums(
    recipe: Recipe,
    arch: DraftArch,
    store: Store,
    lookup: dict[str, Tensor],
    head: Tensor,
    t2d: Tensor,
    mix: Tensor,
) -> tuple[ReferenceSums, int]:
    training, parts, tokens = recipe.training, [], 0
    for entry in store.entries:
        with store.reader(entry) as reader:
            ids, mask = reader.read_small("input_ids").long(), reader.read_small("loss_mask").numpy()
            aux, hidden = (
                reader.read_rows(name, [(0, entry.num_tokens)]).double()
                for name in ("aux_hidden_state", "hidden_state")
            )
        found = document_sums(
            lookup, arch, head, t2d, ids, mask, aux, hidden,
            training.ttt_steps, training.mask_alignment, training.loss, mix,
        )  # fmt: skip
        parts.append(found)
        tokens += entry.num_tokens if found.trained.any() else 0
    fields = ReferenceSums.__dataclass_fields__
    return ReferenceSums(
        **{name: torch.stack([getattr(part, name) for part in parts]).sum(0) for name in fields}
    ), tokens
