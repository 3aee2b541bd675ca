"""Build the draft, the DeepSpeed engine around it, and the frozen target head that gives the labels.

The draft starts from the folder in ``draft.init_from``, or else from random weights. A draft as wide as its
target uses the target's embedding, frozen, in either case.
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
from eagle_ds.drafts.loading import untrained_draft
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
    head: TargetHead  # rows of the draft vocabulary only
    labeler: HeadLabeler
    dtype: torch.dtype  # of the draft's computation and of the hidden states on the device


def build(recipe: Recipe, config: dict[str, Any], inputs: Inputs, world: World) -> Trainable:
    """Build draft, engine and head. Collective.

    Args:
        config: the DeepSpeed configuration.
    """
    dtype = torch.bfloat16 if bf16_enabled(config) else torch.float32
    weights = world.agreement.together(lambda: _target_weights(inputs))
    model = make_draft(recipe, inputs, weights)
    if not inputs.arch.trains_embedding:
        model.embed_tokens.to(dtype)  # a frozen embedding is a buffer, and DeepSpeed converts parameters only
    parameters = [p for p in model.parameters() if p.requires_grad]
    millions = sum(p.numel() for p in parameters) / 1e6
    logger.info("draft: %.1f million trained parameters in %s", millions, str(dtype).removeprefix("torch."))
    engine, *_ = deepspeed.initialize(model=model, model_parameters=parameters, config=config)
    vocab = inputs.vocab
    rows = weights["lm_head"][vocab.target_ids].to(world.device, dtype)
    head = TargetHead(rows, vocab.t2d.to(world.device), vocab.d2t.to(world.device))
    return Trainable(engine, head, HeadLabeler(inputs.target, world.device, dtype), dtype)


def _target_weights(inputs: Inputs) -> dict[str, Tensor]:
    names = ("lm_head",) if inputs.arch.trains_embedding else ("embed_tokens", "lm_head")
    return load_target_weights(inputs.target, names)


def make_draft(recipe: Recipe, inputs: Inputs, weights: dict[str, Tensor]) -> Eagle3Draft:
    """Build the initial draft, in float32 on the CPU. It is the same on all ranks."""
    start = inputs.start or untrained_draft(inputs.arch, inputs.vocab, recipe.training.seed)
    torch.manual_seed(recipe.training.seed)
    model = Eagle3Draft(inputs.arch)
    model.load_state_dict(start.state)
    if not inputs.arch.trains_embedding:
        model.embed_tokens.weight.copy_(weights["embed_tokens"])
    return model


class HeadLabeler:
    """Computes token labels with the target's whole head, for samples that are stored without them.

    The head is loaded when the first such sample is read, so a store that has its labels costs no memory
    here. Reading threads call it: on a GPU it computes on its own stream, to overlap with training on the
    default stream.
    """

    def __init__(self, target: Path, device: torch.device, dtype: torch.dtype) -> None:
        self.target, self.device = target, device
        self.dtype = dtype
        self._head: Tensor | None = None
        self._lock = threading.Lock()  # training and evaluation read in different threads
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Label positions.

        Args:
            hidden: [M, H], the target's hidden states on the CPU.

        Returns:
            Argmax, int64 [M], and log-sum-exp, float32 [M], of the target's logits, on the CPU.
        """
        if self._stream is None:
            return self._label(hidden)
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            return self._label(hidden)

    def _label(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        with self._lock:
            if self._head is None:
                logger.info("the store has no token labels: the target's head computes them while reading")
                weights = load_target_weights(self.target, ("lm_head",))
                self._head = weights["lm_head"].to(self.device, self.dtype)
        token, logsumexp = argmax_and_logsumexp(hidden.to(self.device, self.dtype), self._head, widen=False)
        return token.cpu(), logsumexp.float().cpu()
