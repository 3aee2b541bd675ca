"""The draft, the frozen head that teaches it, and the DeepSpeed engine around it.

Where a draft starts: the folder that ``draft.init_from`` names, else random layers and, where the draft is as wide as the
target, the target's own frozen embedding.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor

from eagle_ds.config.deepspeed import bf16_enabled
from eagle_ds.config.recipe import Recipe
from eagle_ds.drafts.folder import untrained_draft
from eagle_ds.model.draft import Eagle3Draft
from eagle_ds.target.files import load_target_weights
from eagle_ds.target.head import TargetHead, argmax_and_logsumexp
from eagle_ds.training.inputs import Inputs
from eagle_ds.training.world import World

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trainable:
    """An engine and what its loss needs."""

    engine: deepspeed.DeepSpeedEngine
    config: dict[str, Any]  # what DeepSpeed was given
    head: TargetHead
    labeler: HeadLabeler
    dtype: torch.dtype


def build(recipe: Recipe, config: dict[str, Any], inputs: Inputs, world: World) -> Trainable:
    """Collective. ``config`` is what DeepSpeed is given."""
    dtype = torch.bfloat16 if bf16_enabled(config) else torch.float32
    weights = world.agreement.together(lambda: _target_weights(inputs))
    model = make_draft(recipe, inputs, weights)
    if not inputs.arch.trains_embedding:
        model.embed_tokens.to(dtype)  # a buffer: DeepSpeed casts parameters and leaves buffers as they came
    parameters = [p for p in model.parameters() if p.requires_grad]
    logger.info("draft: %.1f million trained parameters in %s", sum(p.numel() for p in parameters) / 1e6, str(dtype).removeprefix("torch."))
    engine, *_ = deepspeed.initialize(model=model, model_parameters=parameters, config=config)
    vocab = inputs.vocab
    rows = weights["lm_head"][vocab.target_ids].to(world.device, dtype)
    head = TargetHead(None, rows, vocab.t2d.to(world.device), vocab.d2t.to(world.device))
    return Trainable(engine, config, head, HeadLabeler(inputs.target, world.device, dtype), dtype)


def _target_weights(inputs: Inputs) -> dict[str, Tensor]:
    return load_target_weights(inputs.target, ("lm_head",) if inputs.arch.trains_embedding else ("embed_tokens", "lm_head"))


def make_draft(recipe: Recipe, inputs: Inputs, weights: dict[str, Tensor]) -> Eagle3Draft:
    """The draft in float32 on the CPU at its starting point, the same on all ranks."""
    start = inputs.start or untrained_draft(inputs.arch, inputs.vocab, recipe.training.seed)
    logger.info("the draft starts %s", f"from {start.folder}" if inputs.start else "untrained")
    torch.manual_seed(recipe.training.seed)
    model = Eagle3Draft(inputs.arch)
    model.load_state_dict(start.state)
    if not inputs.arch.trains_embedding:
        model.embed_tokens.weight.copy_(weights["embed_tokens"])
    return model


class HeadLabeler:
    """Label facts by the target's whole head, for samples stored without them. Called in the reading thread; loads the head
    when the first such sample turns up, so that stores with label facts never pay for it."""

    def __init__(self, target: Path, device: torch.device, dtype: torch.dtype) -> None:
        self.target, self.device, self.dtype = target, device, dtype
        self._head: Tensor | None = None
        self._lock = threading.Lock()  # training reads ahead while an evaluation reads
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Target hidden states [M, H] on the CPU -> argmax int64 [M] and log-sum-exp float32 [M], on the CPU."""
        if self._stream is None:
            return self._label(hidden)
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            return self._label(hidden)

    def _label(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        with self._lock:
            if self._head is None:
                logger.info("the store lacks label facts: they are made with the target's whole head while reading")
                self._head = load_target_weights(self.target, ("lm_head",))["lm_head"].to(self.device, self.dtype)
        token, logsumexp = argmax_and_logsumexp(hidden.to(self.device, self.dtype), self._head, widen=False)
        return token.cpu(), logsumexp.float().cpu()
