"""An EAGLE-3 draft with a KV cache, as speculative decoding and the check of an export run it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from eagle_ds.data.vocab import VocabMap
from eagle_ds.model.draft import Eagle3Draft


class CachedDraft:
    """A draft with its KV cache. Rows below ``rows`` hold K_0/V_0 from true states; those above are drafting keys."""

    def __init__(self, draft: Eagle3Draft, vocab: VocabMap) -> None:
        self.draft = draft
        weight = draft.fc.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.target_ids = vocab.target_ids.to(self.device)
        self.rows = 0
        arch = draft.arch
        self.keys, self.values = (weight.new_empty(0, arch.num_key_value_heads, arch.head_dim) for _ in range(2))
        self.state = self._z = self._position = weight.new_empty(0)

    def reset(self) -> None:
        """Forget everything."""
        self.rows = 0

    def extend(self, aux: Tensor, next_ids: Tensor, positions: Tensor | None = None) -> None:
        """Fill in n verified rows: target states [n, A*H], and the token that follows each, int64 [n].

        Rope positions are the rows' own numbers unless given. The last row is the one that ``propose`` drafts from.
        """
        embedded = self.draft.embed_tokens(next_ids.to(self.device))
        self.extend_embedded(aux, embedded, positions)

    def extend_embedded(self, aux: Tensor, embedded: Tensor, positions: Tensor | None = None) -> None:
        """As ``extend``, from embeddings [n, D]."""
        count = aux.shape[0]
        if positions is None:
            positions = torch.arange(self.rows, self.rows + count, device=self.device)
        state = self.draft.fuse(aux.to(self.device, self.dtype))
        z = self.draft.midlayer.qkv_input(embedded, state)
        self._write(self.rows, z, positions)
        self.rows += count
        self.state, self._z, self._position = state[-1:], z[-1:], positions[-1:]

    def propose(self, steps: int) -> Tensor:
        """int64 [steps]: target ids of a greedy chain after the last row."""
        tokens: list[Tensor] = []
        state, embedded = self.state, None
        for step in range(steps):
            logits, state = self.step(step, state, embedded)
            tokens.append(self.target_ids[logits.argmax(-1)])
            embedded = self.draft.embed_tokens(tokens[-1])
        return torch.cat(tokens)

    def step(self, step: int, state: Tensor, embedded: Tensor | None) -> tuple[Tensor, Tensor]:
        """(logits [1, Vd], state handed on [1, D]) of drafting step ``step``; ``embedded`` [1, D] from step 1 on."""
        layer = self.draft.midlayer
        position = self._position + step
        z = self._z
        if step:
            assert embedded is not None
            z = layer.qkv_input(embedded, state)
            self._write(self.rows - 1 + step, z, position)
        raw = layer.finish(state, self._attend(layer.self_attn.project_q(z, position), step))
        return self.draft.head.logits(raw), self.draft.hand_on(raw)

    def _attend(self, q: Tensor, step: int) -> Tensor:
        """q [1, Hq, d] over the rows that it sees; the query heads of one KV head are the rows of one small matrix."""
        end = self.rows + step
        window = self.draft.arch.sliding_window
        start = min(max(end - window, 0), self.rows) if window else 0
        keys, values = (x[start:end].transpose(0, 1) for x in (self.keys, self.values))
        grouped = q.view(keys.shape[0], -1, q.shape[-1])
        return F.scaled_dot_product_attention(grouped, keys, values, scale=q.shape[-1] ** -0.5).reshape_as(q)

    def _write(self, start: int, z: Tensor, positions: Tensor) -> None:
        """Keys and values of rows ``start``.. into the cache, which doubles when it is full."""
        k, v = self.draft.midlayer.self_attn.project_kv(z, positions)
        end = start + z.shape[0]
        if end > self.keys.shape[0]:
            self.keys, self.values = (self._grown(x, start, 2 * end) for x in (self.keys, self.values))
        self.keys[start:end], self.values[start:end] = k, v

    @staticmethod
    def _grown(old: Tensor, used: int, capacity: int) -> Tensor:
        new = old.new_empty(capacity, *old.shape[1:])
        new[:used] = old[:used]
        return new
