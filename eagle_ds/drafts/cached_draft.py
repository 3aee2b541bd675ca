"""An EAGLE-3 draft with a KV cache, for speculative decoding and for verifying an export."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from eagle_ds.data.vocab import VocabMap
from eagle_ds.model.draft import Eagle3Draft


class CachedDraft:
    """A draft with its KV cache.

    Cache rows below ``rows`` hold K_0/V_0 of verified tokens, computed from the target's states. Later rows
    hold keys and values of tokens that were drafted but not verified; the next ``extend`` overwrites them.
    """

    def __init__(self, draft: Eagle3Draft, vocab: VocabMap) -> None:
        self.draft = draft
        weight = draft.fc.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.target_ids = vocab.target_ids.to(self.device)
        self.rows = 0
        arch = draft.arch
        self.keys = weight.new_empty(0, arch.num_key_value_heads, arch.head_dim)  # [capacity, Hkv, d]
        self.values = torch.empty_like(self.keys)
        self.state = self._z = self._position = weight.new_empty(0)

    def reset(self) -> None:
        """Empty the cache."""
        self.rows = 0

    def extend(self, aux: Tensor, next_ids: Tensor, positions: Tensor | None = None) -> None:
        """Append n verified rows. ``propose`` drafts from the last one.

        Args:
            aux: target states [n, A*H].
            next_ids: the token that follows each row, int64 [n].
            positions: rope positions, int64 [n]; by default the row numbers.
        """
        embedded = self.draft.embed_tokens(next_ids.to(self.device))
        self.extend_embedded(aux, embedded, positions)

    def extend_embedded(self, aux: Tensor, embedded: Tensor, positions: Tensor | None = None) -> None:
        """Append n verified rows as ``extend`` does, with the embeddings [n, D] of the next tokens."""
        count = aux.shape[0]
        if positions is None:
            positions = torch.arange(self.rows, self.rows + count, device=self.device)
        state = self.draft.fuse(aux.to(self.device, self.dtype))
        z = self.draft.midlayer.qkv_input(embedded, state)
        self._write(self.rows, z, positions)
        self.rows += count
        self.state, self._z, self._position = state[-1:], z[-1:], positions[-1:]

    def propose(self, steps: int) -> Tensor:
        """Draft ``steps`` tokens greedily after the last row and return their target ids, int64 [steps]."""
        tokens: list[Tensor] = []
        state, embedded = self.state, None
        for step in range(steps):
            logits, state = self.step(step, state, embedded)
            tokens.append(self.target_ids[logits.argmax(-1)])
            embedded = self.draft.embed_tokens(tokens[-1])
        return torch.cat(tokens)

    def step(self, step: int, state: Tensor, embedded: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run drafting step ``step`` and return (logits [1, Vd], next hidden state [1, D]).

        ``embedded``: embedding [1, D] of the last drafted token; None at step 0, whose input ``extend``
        prepared.
        """
        layer = self.draft.midlayer
        position = self._position + step
        z = self._z
        if step:  # Step 0 writes nothing: its K/V are K_0/V_0 of the last row, which ``extend`` cached.
            assert embedded is not None
            z = layer.qkv_input(embedded, state)
            self._write(self.rows - 1 + step, z, position)
        raw = layer.finish(state, self._attend(layer.self_attn.project_q(z, position), step))
        return self.draft.head.logits(raw), self.draft.next_state(raw)

    def _attend(self, q: Tensor, step: int) -> Tensor:
        """Attend with q [1, Hq, d] to the cached rows that it sees. Returns [1, Hq, d]."""
        end = self.rows + step
        window = self.draft.arch.sliding_window
        # The window limits K_0/V_0 only: drafted keys are always seen, as the diagonals are in training.
        start = min(max(end - window, 0), self.rows) if window else 0
        # [Hkv, rows, d]. The Hq / Hkv query heads that share a KV head become the rows of one small matrix.
        keys, values = (x[start:end].transpose(0, 1) for x in (self.keys, self.values))
        grouped = q.view(keys.shape[0], -1, q.shape[-1])
        return F.scaled_dot_product_attention(grouped, keys, values, scale=q.shape[-1] ** -0.5).reshape_as(q)

    def _write(self, start: int, z: Tensor, positions: Tensor) -> None:
        """Write keys and values of z [n, 2D] to the n cache rows from ``start`` on. A full cache grows."""
        k, v = self.draft.midlayer.self_attn.project_kv(z, positions)
        end = start + z.shape[0]
        if end > self.keys.shape[0]:
            # Copy the rows in use and append rows until the capacity is 2 * end.
            more = (0, 0, 0, 0, 0, 2 * end - start)
            self.keys, self.values = (F.pad(x[:start], more) for x in (self.keys, self.values))
        self.keys[start:end], self.values[start:end] = k, v
