"""Greedy speculative decoding: a transformers target and an EAGLE-3 draft, each with its KV cache.

One round, with n tokens verified and x[n] just sampled:

    the draft's cache holds K_0/V_0 of rows 0..n-1, made from the target's true states;
    row p = n-1 drafts a chain: step k reads e(x[p+1+k]) at rope position p+k, and its own key joins the cache;
    the target reads x[n] and the K drafted tokens in one pass; the longest prefix that equals its own argmax stands,
    and its argmax after that prefix comes free;
    both caches are cut back, and the draft's drafting keys are overwritten by K_0/V_0 of the rows just verified.

That is what serving engines do, and what test-time training simulates: the same keys, positions and states.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from eagle_ds.capture.hf import decoder_layers
from eagle_ds.drafts.cached import CachedDraft

PREFILL_TOKENS = 4096  # a prompt is read in pieces of this many tokens, which bounds the attention's memory


class RollbackLayer(DynamicLayer):
    """KV cache of one layer that grows by doubling and is cut back for free; DynamicLayer copies all of it for every token."""

    def __init__(self, *_: Any) -> None:
        super().__init__()
        self.length = 0
        self.buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [1, heads, n, d] and return all keys and values so far (views)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[-2]
        if self.buffers is None or self.buffers[0].shape[-2] < end:
            self.buffers = tuple(self._grown(i, new, 2 * end) for i, new in enumerate((key_states, value_states)))
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[..., self.length : end, :] = new
        self._show(end)
        return self.keys, self.values

    def _grown(self, which: int, like: Tensor, capacity: int) -> Tensor:
        buffer = like.new_empty(*like.shape[:-2], capacity, like.shape[-1])
        if self.buffers is not None:
            buffer[..., : self.length, :] = self.buffers[which][..., : self.length, :]
        return buffer

    def _show(self, length: int) -> None:
        self.length = length
        self.keys, self.values = (buffer[..., :length, :] for buffer in self.buffers)

    def crop(self, max_length: int) -> None:
        """Forget everything from position ``max_length`` on."""
        if self.buffers is not None and max_length < self.length:
            self._show(max_length)

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.length


class CachedTarget:
    """A transformers model with a cache that can be cut back, and the outputs of the layers that the draft reads."""

    def __init__(self, model: nn.Module, layers: Sequence[int]) -> None:
        self.model = model
        self.layers = tuple(layers)
        self.cache = self._new_cache()
        self._outputs: dict[int, Tensor] = {}
        for layer, module in zip(self.layers, decoder_layers(model.get_decoder(), self.layers), strict=True):
            module.register_forward_hook(self._keep(layer))

    @property
    def length(self) -> int:
        """Tokens that the cache holds."""
        return self.cache.get_seq_length()

    def reset(self) -> None:
        """Forget everything, and the memory with it."""
        self.cache = self._new_cache()

    def crop(self, length: int) -> None:
        """Keep the first ``length`` tokens."""
        for layer in self.cache.layers:
            layer.crop(length)

    def forward(self, ids: Tensor, last_only: bool = False) -> tuple[Tensor, Tensor]:
        """Append int64 [n]: (logits [n, V], or [1, V] of the last token; layer outputs side by side [n, A*H])."""
        ids = ids.to(self.model.get_input_embeddings().weight.device)
        out = self.model(input_ids=ids[None], past_key_values=self.cache, use_cache=True, logits_to_keep=1 if last_only else 0)
        device = out.logits.device
        return out.logits[0], torch.cat([self._outputs.pop(layer)[0].to(device) for layer in self.layers], dim=-1)

    def prefill(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Read a prompt from the beginning: (logits [1, V] after it, layer outputs [n, A*H])."""
        self.reset()
        parts = [self.forward(piece, last_only=True) for piece in ids.split(PREFILL_TOKENS)]
        return parts[-1][0], torch.cat([aux for _, aux in parts])

    def _keep(self, layer: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self._outputs[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    @staticmethod
    def _new_cache() -> Cache:
        return Cache(layer_class_to_replicate=RollbackLayer)


@dataclass(frozen=True)
class DecodeSettings:
    """How long an answer may be, how many tokens the draft proposes at a time, and what ends an answer."""

    max_new_tokens: int = 64
    num_draft_tokens: int = 5
    stop_ids: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Prefilled:
    """A prompt that the target has read: its tokens, the first answer token, and the layer outputs at every prompt row."""

    ids: Tensor
    first: int
    aux: Tensor


@dataclass(frozen=True)
class Round:
    """One pass of the target: context before it, draft tokens that were checked and that stood, tokens gained."""

    context: int
    reached: int
    accepted: int
    gained: int


@dataclass(frozen=True)
class Divergence:
    """Where the answer first left plain greedy decoding, and by how little: ``gap`` is the logit of the token taken over that
    of the plain one in the pass that took it; ``plain_margin`` is how far plain decoding's best was above its second."""

    position: int
    plain_token: int
    token: int
    gap: float
    plain_margin: float


@dataclass
class Decoded:
    """An answer, and how it came about. ``margins`` (plain decoding): best logit over second best of every token."""

    tokens: list[int]
    seconds: float = 0.0
    rounds: list[Round] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    divergence: Divergence | None = None


@torch.inference_mode()
def prefill(target: CachedTarget, ids: Sequence[int]) -> Prefilled:
    """Read a prompt; both ways of decoding start from here."""
    prompt = torch.tensor(ids, dtype=torch.int64)
    logits, aux = target.prefill(prompt)
    return Prefilled(prompt, int(logits[-1].argmax()), aux)


@torch.inference_mode()
def decode_plain(target: CachedTarget, start: Prefilled, settings: DecodeSettings) -> Decoded:
    """The target alone, token by token."""
    target.crop(len(start.ids))
    out = Decoded([start.first], margins=[float("nan")])
    began = _now(target)
    while len(out.tokens) < settings.max_new_tokens and out.tokens[-1] not in settings.stop_ids:
        logits, _ = target.forward(torch.tensor(out.tokens[-1:]))
        best = logits[-1].float().topk(2)
        out.tokens.append(int(best.indices[0]))
        out.margins.append(float(best.values[0] - best.values[1]))
    out.seconds = _now(target) - began
    return out


@torch.inference_mode()
def decode_speculative(
    target: CachedTarget, draft: CachedDraft, start: Prefilled, settings: DecodeSettings, plain: Decoded | None = None
) -> Decoded:
    """Target and draft together; with ``plain``, the first token that differs from it is recorded."""
    target.crop(len(start.ids))
    draft.reset()
    out = Decoded([start.first])
    draft.extend(start.aux, torch.cat([start.ids[1:], torch.tensor([start.first])]))
    began = _now(target)
    while len(out.tokens) < settings.max_new_tokens and out.tokens[-1] not in settings.stop_ids:
        context = target.length + 1
        proposed = draft.propose(settings.num_draft_tokens).cpu()
        logits, aux = target.forward(torch.cat([torch.tensor(out.tokens[-1:]), proposed]))
        chosen = logits.argmax(-1).cpu()
        stood = leading_matches(proposed, chosen)
        target.crop(context + stood)
        draft.extend(aux[: stood + 1], chosen[: stood + 1])
        gained = _until_stop(chosen[: stood + 1].tolist(), settings.stop_ids)
        accepted = min(stood, len(gained))
        reached = min(accepted + (len(gained) > stood), settings.num_draft_tokens)
        out.rounds.append(Round(context, reached, accepted, len(gained)))
        if plain and out.divergence is None:
            out.divergence = _first_divergence(plain, len(out.tokens), gained, logits)
        out.tokens += gained
    out.seconds = _now(target) - began
    out.tokens = out.tokens[: settings.max_new_tokens]
    return out


def leading_matches(proposed: Tensor, chosen: Tensor) -> int:
    """How many proposed tokens [K] stand: those before the first that is not what the target chose there [K + 1]."""
    return int((proposed == chosen[: proposed.numel()]).long().cumprod(0).sum())


def _until_stop(tokens: list[int], stop_ids: frozenset[int]) -> list[int]:
    """Up to and including the first stop token."""
    stops = [i for i, token in enumerate(tokens) if token in stop_ids]
    return tokens[: stops[0] + 1] if stops else tokens


def _first_divergence(plain: Decoded, start: int, gained: list[int], logits: Tensor) -> Divergence | None:
    for i, (token, expected) in enumerate(zip(gained, plain.tokens[start:], strict=False)):
        if token != expected:
            row = logits[i].float()
            return Divergence(start + i, expected, token, float(row[token] - row[expected]), plain.margins[start + i])
    return None


def _now(target: CachedTarget) -> float:
    """Seconds, once the device is done."""
    if target.model.get_input_embeddings().weight.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()
