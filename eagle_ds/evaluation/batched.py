"""Greedy decoding of several prompts at once: the rounds of decoding.py, with one pass of the target for all.

The rows of a batch have prompts of different lengths, and in every pass each row accepts another number of
tokens. A row keeps the token at position p in slot p of its caches. So no row ever moves, and rejected tokens
are overwritten by the next pass. A mask hides the slots after the position of a query.

Prompts are read one by one, as in decoding.py, and their keys and values are copied into the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from eagle_ds.drafts.cached_draft import CachedDraft
from eagle_ds.evaluation.decoding import (
    CachedTarget,
    Decoded,
    DecodeSettings,
    Prefilled,
    now,
    prefill,
    take_verified,
)

KINDS = {"full_attention", "sliding_attention"}


class SlotLayer(DynamicLayer):
    """KV cache of one layer, [B, capacity, heads, d]: row b's token at position p is in slot p of row b."""

    def __init__(self, rows: int, capacity: int) -> None:
        super().__init__()
        self.shape = rows, capacity
        self.buffers: tuple[Tensor, Tensor] | None = None
        self.slots = torch.empty(rows, 0, dtype=torch.int64)  # of the tokens of the next pass, [B, n]
        self.width = 0  # slots that the next pass may read

    def load(self, row: int, prompt: DynamicLayer) -> None:
        """Copy the keys and values of a prompt, each [1, heads, n, d], into a row."""
        new = prompt.keys, prompt.values
        if self.buffers is None:
            # Zeros, because attention multiplies hidden slots by 0, and 0 * NaN is NaN.
            self.buffers = tuple(x.new_zeros(*self.shape, x.shape[1], x.shape[3]) for x in new)
        for buffer, states in zip(self.buffers, new, strict=True):
            buffer[row, : states.shape[2]] = states[0].transpose(0, 1)

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write keys and values [B, heads, n, d] to their slots; return the first ``width`` slots."""
        assert self.buffers is not None, "load comes first"
        slots = self.slots.to(keys.device)
        rows = torch.arange(len(slots), device=keys.device)[:, None]
        for buffer, states in zip(self.buffers, (keys, values), strict=True):
            buffer[rows, slots] = states.transpose(1, 2)
        keys, values = (buffer[:, : self.width].transpose(1, 2) for buffer in self.buffers)
        return keys, values

    def get_seq_length(self) -> int:
        """Return the number of slots that the next pass may read."""
        return self.width


class BatchedTarget:
    """A target with a cache for several prompts. ``lengths`` [B]: tokens in each row of the cache."""

    def __init__(self, target: CachedTarget, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
        """Read the prompts; leave space for ``new_tokens`` more in each row.

        Raises ValueError for a kind of attention that masks cannot describe.
        """
        self.target = target
        self.config = target.model.config.get_text_config()
        self.kinds = set(getattr(self.config, "layer_types", None) or ())
        if unknown := self.kinds - KINDS:
            found = f"the target has layers of {', '.join(sorted(unknown))}"
            raise ValueError(f"{found}, which cannot decode in batches; use --batch 1")
        capacity = max(map(len, prompts)) + new_tokens
        self.starts: list[Prefilled] = []
        self.layers: list[SlotLayer] = []
        for row, prompt in enumerate(prompts):
            self.starts.append(prefill(target, prompt))
            if not self.layers:
                self.layers = [SlotLayer(len(prompts), capacity) for _ in target.cache.layers]
            for layer, read in zip(self.layers, target.cache.layers, strict=True):
                layer.load(row, read)
        target.reset()
        self.cache = Cache(layers=self.layers)
        self.restart()

    def restart(self) -> None:
        """Forget everything after the prompts."""
        lengths = [len(start.ids) for start in self.starts]
        self.lengths = torch.tensor(lengths, device=self.target.device)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Run the model on the next tokens of each row, int64 [B, n], without counting them in ``lengths``.

        Returns: logits [B, n, V] and the layers' outputs [B, n, A*H].
        """
        count = ids.shape[1]
        positions = self.lengths[:, None] + torch.arange(count, device=self.lengths.device)
        width = int(self.lengths.max()) + count
        for layer in self.layers:
            layer.slots, layer.width = positions, width
        masks = self._masks(positions, width)
        return self.target.run(ids, self.cache, attention_mask=masks, position_ids=positions)

    def _masks(self, positions: Tensor, width: int) -> Tensor | dict[str, Tensor]:
        """Return what transformers takes for a mask: one, or one for each kind of layer."""
        window = getattr(self.config, "sliding_window", None)
        if not self.kinds:  # all layers are of one kind
            return self._mask(positions, width, window)
        windows = {"full_attention": None, "sliding_attention": window}
        masks = {kind: self._mask(positions, width, windows[kind]) for kind in self.kinds}
        return masks if len(masks) > 1 else masks.popitem()[1]

    def _mask(self, positions: Tensor, width: int, window: int | None) -> Tensor:
        """Return what is added to the scores [B, 1, n, width]: 0 where a query sees a slot."""
        distance = positions[..., None] - torch.arange(width, device=positions.device)
        hidden = distance < 0
        if window:
            hidden |= distance >= window
        dtype = self.target.model.dtype
        zeros = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        return zeros.masked_fill(hidden, torch.finfo(dtype).min)[:, None]


class BatchedDraft:
    """A draft with a KV cache for several prompts; see CachedDraft.

    ``rows`` [B]: verified rows of each prompt, in slots 0 to rows - 1. Drafted keys are in the slots after.
    """

    def __init__(self, cached: CachedDraft, starts: Sequence[Prefilled], capacity: int) -> None:
        """Read the prompts, with the target's states of them."""
        self.draft, self.target_ids = cached.draft, cached.target_ids
        self.device, self.dtype = cached.device, cached.dtype
        arch = self.draft.arch
        shape = len(starts), capacity, arch.num_key_value_heads, arch.head_dim
        self.keys = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self.values = torch.zeros_like(self.keys)
        self.rows = torch.zeros(len(starts), dtype=torch.int64, device=self.device)
        states = [self._read(row, start) for row, start in enumerate(starts)]
        self.state, self._z = (torch.cat(parts) for parts in zip(*states, strict=True))  # [B, D], [B, 2D]

    def _read(self, row: int, start: Prefilled) -> tuple[Tensor, Tensor]:
        next_ids = torch.cat([start.ids[1:], torch.tensor([start.first])]).to(self.device)
        state = self.draft.fuse(start.aux.to(self.device, self.dtype))
        z = self.draft.midlayer.qkv_input(self.draft.embed_tokens(next_ids), state)
        slots = torch.arange(len(next_ids), device=self.device)
        self._write(torch.full_like(slots, row), slots, z)
        self.rows[row] = len(next_ids)
        return state[-1:], z[-1:]

    def extend(self, aux: Tensor, next_ids: Tensor, counts: Tensor) -> None:
        """Append the first ``counts[b]`` of n verified rows to prompt b; 0 leaves it as it is.

        Args:
            aux: target states [B, n, A*H].
            next_ids: the token that follows each row, int64 [B, n].
            counts: int64 [B].
        """
        batch, n = next_ids.shape
        counts = counts.to(self.device)
        state = self.draft.fuse(aux.to(self.device, self.dtype).flatten(0, 1))
        embedded = self.draft.embed_tokens(next_ids.to(self.device).flatten())
        z = self.draft.midlayer.qkv_input(embedded, state)
        # All n rows are written. Those beyond counts[b] lie in the slots of drafted keys: ``_attend`` hides
        # such slots until they are overwritten.
        slots = self.rows[:, None] + torch.arange(n, device=self.device)
        prompts = torch.arange(batch, device=self.device)
        self._write(prompts.repeat_interleave(n), slots.flatten(), z)
        self.rows = self.rows + counts
        last = (counts - 1).clamp(min=0)
        grown = (counts > 0)[:, None]
        self.state = torch.where(grown, state.unflatten(0, (batch, n))[prompts, last], self.state)
        self._z = torch.where(grown, z.unflatten(0, (batch, n))[prompts, last], self._z)

    def propose(self, steps: int) -> Tensor:
        """Draft ``steps`` tokens greedily for every prompt and return their target ids, int64 [B, steps]."""
        tokens: list[Tensor] = []
        state, z, layer = self.state, self._z, self.draft.midlayer
        prompts = torch.arange(len(self.rows), device=self.device)
        for step in range(steps):
            position = self.rows - 1 + step
            if step:  # Step 0 reads the last verified row, whose keys are in the cache already.
                z = layer.qkv_input(self.draft.embed_tokens(tokens[-1]), state)
                self._write(prompts, position, z)
            raw = layer.finish(state, self._attend(layer.self_attn.project_q(z, position), step))
            tokens.append(self.target_ids[self.draft.head.logits(raw).argmax(-1)])
            state = self.draft.next_state(raw)
        return torch.stack(tokens, dim=1)

    def _attend(self, q: Tensor, step: int) -> Tensor:
        """Attend with q [B, Hq, d] to the slots that each prompt sees. Returns [B, Hq, d]."""
        end = self.rows + step  # [B]
        width, window = int(end.max()), self.draft.arch.sliding_window
        slots = torch.arange(width, device=self.device)
        seen = slots < end[:, None]  # [B, width]
        if window:  # The window limits verified rows only, as in CachedDraft.
            seen &= (slots >= end[:, None] - window) | (slots >= self.rows[:, None])
        # [B, Hkv, width, d]. The query heads that share a KV head become the rows of one small matrix.
        keys, values = (x[:, :width].transpose(1, 2) for x in (self.keys, self.values))
        grouped = q.view(len(q), keys.shape[1], -1, q.shape[-1])
        mask, scale = seen[:, None, None, :], q.shape[-1] ** -0.5
        return F.scaled_dot_product_attention(grouped, keys, values, mask, scale=scale).reshape_as(q)

    def _write(self, prompts: Tensor, slots: Tensor, z: Tensor) -> None:
        """Write keys and values of z [M, 2D] to slots [M] of prompts [M]. A slot is also the position."""
        k, v = self.draft.midlayer.self_attn.project_kv(z, slots)
        self.keys[prompts, slots], self.values[prompts, slots] = k, v


class BatchDecoder:
    """Decodes a batch of prompts by the target alone and with drafts, from prompts that are read once."""

    def __init__(
        self, target: CachedTarget, prompts: Sequence[Sequence[int]], settings: DecodeSettings
    ) -> None:
        self.settings = settings
        # A row that has ended stays in the batch, and its slots are written again by every pass.
        self.new_tokens = settings.max_new_tokens + 2 * (settings.num_draft_tokens + 1)
        with torch.inference_mode():
            self.target = BatchedTarget(target, prompts, self.new_tokens)

    def _begin(self) -> tuple[list[Decoded], Tensor]:
        """Return answers of one token, and those tokens [B]."""
        self.target.restart()
        first = [start.first for start in self.target.starts]
        return [Decoded([token]) for token in first], torch.tensor(first, device=self.target.target.device)

    def _active(self, answers: Sequence[Decoded]) -> list[int]:
        return [row for row, answer in enumerate(answers) if self.settings.continues(answer.tokens)]

    def _finish(self, answers: list[Decoded], seconds: float) -> list[Decoded]:
        """Cut the answers to their length; share the time of the batch equally among them."""
        longest, share = self.settings.max_new_tokens, seconds / len(answers)
        return [replace(answer, tokens=answer.tokens[:longest], seconds=share) for answer in answers]

    @torch.inference_mode()
    def plain(self) -> list[Decoded]:
        """Decode with the target alone, one token of each prompt in each pass."""
        answers, last = self._begin()
        for answer in answers:
            answer.margins.append(float("nan"))
        began = now(self.target.target)
        while active := self._active(answers):
            logits, _ = self.target.forward(last[:, None])
            best = logits[:, -1].float().topk(2)
            last = best.indices[:, 0].to(last.device)
            margins = (best.values[:, 0] - best.values[:, 1]).tolist()
            for row, token in enumerate(last.tolist()):
                if row in active:
                    answers[row].tokens.append(token)
                    answers[row].margins.append(margins[row])
            self.target.lengths[active] += 1
        return self._finish(answers, now(self.target.target) - began)

    @torch.inference_mode()
    def speculative(self, draft: CachedDraft, plain: Sequence[Decoded] | None = None) -> list[Decoded]:
        """Decode with target and draft. With ``plain``, record where each answer first differs from it."""
        target, settings = self.target, self.settings
        answers, last = self._begin()
        capacity = max(len(start.ids) for start in target.starts) + self.new_tokens
        drafted = BatchedDraft(draft, target.starts, capacity)
        began = now(target.target)
        while active := self._active(answers):
            proposed = drafted.propose(settings.num_draft_tokens).to(last.device)
            logits, aux = target.forward(torch.cat([last[:, None], proposed], dim=1))
            chosen = logits.argmax(-1).to(last.device)  # [B, K + 1]
            matches = (proposed == chosen[:, :-1]).long().cumprod(1).sum(1)
            contexts, accepted, tokens = target.lengths.tolist(), matches.tolist(), chosen.tolist()
            for row in active:
                verified = tokens[row][: accepted[row] + 1]
                reference = plain[row] if plain else None
                take_verified(answers[row], contexts[row] + 1, verified, logits[row], settings, reference)
            # Rows that have ended keep their length, so that the batch does not outgrow its caches.
            counts = torch.zeros_like(matches)
            counts[active] = matches[active] + 1
            drafted.extend(aux, chosen, counts)
            target.lengths += counts
            last = torch.where(counts > 0, chosen.gather(1, matches[:, None])[:, 0], last)
        return self._finish(answers, now(target.target) - began)
