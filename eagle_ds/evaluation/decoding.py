"""Greedy speculative decoding with a transformers target and an EAGLE-3 draft, each with its own KV cache.

One round, with n tokens verified and x[n] just sampled:

1. The draft's cache holds K_0/V_0 of rows 0 to n-1, computed from the target's true hidden states.
2. The draft proposes a chain of K tokens from row p = n-1. Step k reads e(x[p+1+k]) at RoPE position p+k, and
   its own key joins the cache.
3. The target reads x[n] and the K proposed tokens in one pass. The longest prefix that equals the target's
   own argmax is accepted, and the argmax after that prefix comes for free.
4. Both caches are cropped to the accepted tokens. The draft's keys of step 2 are overwritten by K_0/V_0 of
   the rows just verified.

Serving engines do the same, and test-time training simulates it with the same keys, positions and states.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from eagle_ds.capture.hf import decoder_layers
from eagle_ds.drafts.cached_draft import CachedDraft

PREFILL_TOKENS = 4096  # prompts are read in pieces of this many tokens, to bound the attention's memory


class RollbackLayer(DynamicLayer):
    """KV cache of one layer that doubles its capacity when it is full, and is cropped without a copy.

    transformers' DynamicLayer copies the whole cache for every new token.
    """

    def __init__(self, *_: Any) -> None:
        super().__init__()
        self.length = 0
        self.buffers: tuple[Tensor, Tensor] | None = None

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [1, heads, n, d]; return all of them so far, as views."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        end, new = self.length + keys.shape[-2], (keys, values)
        if self.buffers is None or self.buffers[0].shape[-2] < end:
            self.buffers = tuple(self._grown(i, like, 2 * end) for i, like in enumerate(new))
        for buffer, states in zip(self.buffers, new, strict=True):
            buffer[..., self.length : end, :] = states
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
        """Remove everything from position ``max_length`` on."""
        if self.buffers is not None and max_length < self.length:
            self._show(max_length)

    def get_seq_length(self) -> int:
        """Return the number of tokens held."""
        return self.length


class CachedTarget:
    """A transformers model with a cache that can be cropped, and the outputs of the layers for the draft."""

    def __init__(self, model: nn.Module, layers: Sequence[int]) -> None:
        self.model = model
        self.layers = tuple(layers)
        self.reset()
        self._outputs: dict[int, Tensor] = {}
        for layer, module in zip(self.layers, decoder_layers(model.get_decoder(), self.layers), strict=True):
            module.register_forward_hook(self._keep(layer))

    @property
    def device(self) -> torch.device:
        """Device that the tokens must be on."""
        return self.model.get_input_embeddings().weight.device

    @property
    def length(self) -> int:
        """Number of tokens in the cache."""
        return self.cache.get_seq_length()

    def reset(self) -> None:
        """Empty the cache and free its memory."""
        self.cache = Cache(layer_class_to_replicate=RollbackLayer)

    def crop(self, length: int) -> None:
        """Keep the first ``length`` tokens."""
        for layer in self.cache.layers:
            layer.crop(length)

    def forward(self, ids: Tensor, last_only: bool = False) -> tuple[Tensor, Tensor]:
        """Append tokens, int64 [n], and run the model on them.

        Returns:
            Logits [n, V], or [1, V] of the last token if ``last_only``.
            The layers' outputs side by side, [n, A*H].
        """
        keep = int(last_only)  # 0 keeps the logits of all tokens
        logits, aux = self.run(ids[None], self.cache, logits_to_keep=keep)
        return logits[0], aux[0]

    def run(self, ids: Tensor, cache: Cache, **options: Any) -> tuple[Tensor, Tensor]:
        """Run the model on tokens, int64 [B, n], and append them to ``cache``.

        ``options`` go to the model: mask, positions, which logits to keep.

        Returns:
            Logits [B, n, V] and the layers' outputs side by side, [B, n, A*H].
        """
        ids = ids.to(self.device)
        out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, **options)
        # The hooks have stored the outputs; layers may be on other GPUs than the logits.
        outputs = [self._outputs.pop(layer).to(out.logits.device) for layer in self.layers]
        return out.logits, torch.cat(outputs, dim=-1)

    def prefill(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Empty the cache and read a prompt; return logits after it [1, V] and the layers' outputs [n, A*H].
        """
        self.reset()
        parts = [self.forward(piece, last_only=True) for piece in ids.split(PREFILL_TOKENS)]
        return parts[-1][0], torch.cat([aux for _, aux in parts])

    def _keep(self, layer: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self._outputs[layer] = output[0] if isinstance(output, tuple) else output

        return hook


@dataclass(frozen=True)
class DecodeSettings:
    """Longest answer, tokens that the draft proposes per pass, and tokens that end an answer."""

    max_new_tokens: int = 64
    num_draft_tokens: int = 5
    stop_ids: frozenset[int] = frozenset()

    def continues(self, tokens: Sequence[int]) -> bool:
        """Return whether an answer with these tokens goes on: it has not ended and may be longer."""
        return len(tokens) < self.max_new_tokens and tokens[-1] not in self.stop_ids


@dataclass(frozen=True)
class Prefilled:
    """A prompt that the target has read: tokens, first token of the answer, layers' outputs [n, A*H]."""

    ids: Tensor
    first: int
    aux: Tensor


@dataclass(frozen=True)
class Round:
    """One pass of the target that verifies proposed tokens.

    ``context``: tokens before it. ``reached``: proposed tokens that were verified, up to and including the
    first rejected one. ``accepted``: proposed tokens that were accepted. ``gained``: new tokens of the
    answer.
    """

    context: int
    reached: int
    accepted: int
    gained: int


@dataclass(frozen=True)
class Divergence:
    """First position at which an answer differs from plain greedy decoding.

    ``gap``: logit of the token taken minus logit of plain decoding's token, in the pass that took it.
    ``plain_margin``: best logit minus second best where plain decoding chose its token. ``spacing``: distance
    between neighbouring values of the logits' dtype at the logit of the token taken.
    """

    position: int
    plain_token: int
    token: int
    gap: float
    plain_margin: float
    spacing: float


@dataclass
class Decoded:
    """An answer and how it was decoded. ``margins``: best minus second best logit (plain decoding only)."""

    tokens: list[int]
    seconds: float = 0.0
    rounds: list[Round] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    divergence: Divergence | None = None


@torch.inference_mode()
def prefill(target: CachedTarget, ids: Sequence[int]) -> Prefilled:
    """Read a prompt. Plain and speculative decoding both start from the result."""
    prompt = torch.tensor(ids, dtype=torch.int64)
    logits, aux = target.prefill(prompt)
    return Prefilled(prompt, int(logits[-1].argmax()), aux)


class PromptDecoder:
    """Decodes one prompt by the target alone and with drafts. The prompt is read once."""

    def __init__(self, target: CachedTarget, prompt: Sequence[int], settings: DecodeSettings) -> None:
        self.target, self.settings = target, settings
        self.start = prefill(target, prompt)

    def plain(self) -> list[Decoded]:
        """Return the answer of ``decode_plain``, as a list of one."""
        return [decode_plain(self.target, self.start, self.settings)]

    def speculative(self, draft: CachedDraft, plain: Sequence[Decoded] | None = None) -> list[Decoded]:
        """Return the answer of ``decode_speculative``, as a list of one."""
        reference = plain[0] if plain else None
        return [decode_speculative(self.target, draft, self.start, self.settings, reference)]


@torch.inference_mode()
def decode_plain(target: CachedTarget, start: Prefilled, settings: DecodeSettings) -> Decoded:
    """Decode with the target alone, token by token."""
    target.crop(len(start.ids))
    out = Decoded([start.first], margins=[float("nan")])
    began = now(target)
    while settings.continues(out.tokens):
        logits, _ = target.forward(torch.tensor(out.tokens[-1:]))
        best = logits[-1].float().topk(2)
        out.tokens.append(int(best.indices[0]))
        out.margins.append(float(best.values[0] - best.values[1]))
    out.seconds = now(target) - began
    return out


@torch.inference_mode()
def decode_speculative(
    target: CachedTarget, draft: CachedDraft, start: Prefilled, settings: DecodeSettings,
    plain: Decoded | None = None,
) -> Decoded:
    """Decode with target and draft. With ``plain``, record the first token that differs from it."""
    target.crop(len(start.ids))
    draft.reset()
    out = Decoded([start.first])
    draft.extend(start.aux, torch.cat([start.ids[1:], torch.tensor([start.first])]))
    began = now(target)
    while settings.continues(out.tokens):
        context = target.length + 1
        proposed = draft.propose(settings.num_draft_tokens).cpu()
        logits, aux = target.forward(torch.cat([torch.tensor(out.tokens[-1:]), proposed]))
        chosen = logits.argmax(-1).cpu()
        matches = leading_matches(proposed, chosen)
        # Crop rejected tokens from the target's cache; give the draft the true states of accepted ones.
        target.crop(context + matches)
        draft.extend(aux[: matches + 1], chosen[: matches + 1])
        take_verified(out, context, chosen[: matches + 1].tolist(), logits, settings, plain)
    out.seconds = now(target) - began
    out.tokens = out.tokens[: settings.max_new_tokens]
    return out


def take_verified(
    out: Decoded, context: int, verified: list[int], logits: Tensor, settings: DecodeSettings,
    plain: Decoded | None,
) -> None:
    """Append the tokens of one pass to the answer ``out``, and record the pass.

    Args:
        context: tokens before the pass.
        verified: the accepted draft tokens, and the target's own token after them.
        logits: of the pass, [K + 1, V]; read only where the answer first differs from ``plain``.
    """
    # An answer may end before the last match. Tokens after its stop token do not count as accepted.
    gained = _until_stop(verified, settings.stop_ids)
    matches = len(verified) - 1
    accepted = min(matches, len(gained))
    reached = min(accepted + (len(gained) > matches), settings.num_draft_tokens)
    out.rounds.append(Round(context, reached, accepted, len(gained)))
    if plain and out.divergence is None:
        out.divergence = _first_divergence(plain, len(out.tokens), gained, logits)
    out.tokens += gained


def leading_matches(proposed: Tensor, chosen: Tensor) -> int:
    """Return how many of the proposed tokens [K] equal the target's choices [K + 1] before the first
    difference.
    """
    return int((proposed == chosen[: proposed.numel()]).long().cumprod(0).sum())


def _until_stop(tokens: list[int], stop_ids: frozenset[int]) -> list[int]:
    """Return the tokens up to and including the first stop token."""
    stops = [i for i, token in enumerate(tokens) if token in stop_ids]
    return tokens[: stops[0] + 1] if stops else tokens


def _first_divergence(plain: Decoded, start: int, gained: list[int], logits: Tensor) -> Divergence | None:
    for i, (token, expected) in enumerate(zip(gained, plain.tokens[start:], strict=False)):
        if token != expected:
            row, at = logits[i].float(), start + i
            gap, spacing = float(row[token] - row[expected]), spacing_at(logits[i, token])
            return Divergence(at, expected, token, gap, plain.margins[at], spacing)
    return None


def spacing_at(logit: Tensor) -> float:
    """Return the distance between neighbouring values of the dtype of a logit: 0.125 at 16 in bfloat16."""
    _, exponent = math.frexp(float(logit))  # 2^(exponent - 1) <= |logit| < 2^exponent
    return torch.finfo(logit.dtype).eps * 2.0 ** (exponent - 1)


def now(target: CachedTarget) -> float:
    """Return the time in seconds, after the device has finished its queue."""
    if target.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
