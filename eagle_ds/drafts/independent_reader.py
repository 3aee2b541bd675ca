"""An independent reader of an exported draft: it computes what a serving engine would compute from the
folder.

It shares no code with the training model or with the export. Tensors are read by their served names, rope
comes from transformers' reading of config.json, and attention is a dense causal softmax. If its logits equal
those of the training model, engines read the export as intended.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor


@dataclass(frozen=True)
class Probe:
    """Random inputs of a draft: aux [S, A*H], embeddings [S + 1, D] (the last one of a drafted token), rising
    positions [S].
    """

    aux: Tensor
    embedded: Tensor
    positions: Tensor

    @classmethod
    def random(cls, aux_width: int, hidden_size: int, spread: int, rows: int = 24, seed: int = 0) -> Probe:
        """Make random inputs with positions up to about ``spread``; with 1 they are 0, 1, 2, ...

        Distant positions reveal a wrong rope; very distant ones would drown in float32's rounding of the
        angles.
        """
        generator = torch.Generator().manual_seed(seed)
        far = torch.logspace(0, 1, rows, base=spread, dtype=torch.float64).long() - 1
        positions = far + torch.arange(rows)
        aux = torch.randn(rows, aux_width, generator=generator)
        return cls(aux, torch.randn(rows + 1, hidden_size, generator=generator), positions)


class ServedReader:
    """A draft folder as a serving engine reads it, computed in float32."""

    def __init__(self, folder: Path) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        with safe_open(folder / "model.safetensors", framework="pt") as archive:
            names = archive.keys()  # an archive is not a dict and cannot be iterated itself
            self.tensors = {name: archive.get_tensor(name) for name in names}
        self.used: set[str] = {"t2d"}  # engines need only d2t
        self.heads, self.kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        self.rotary = _rotary(folder)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor by its served name. KeyError means that engines would not find it either."""
        self.used.add(name)
        return self.tensors[name].float()

    def unused(self) -> set[str]:
        """Return the names of tensors that were never read; engines would drop them without a warning."""
        return self.tensors.keys() - self.used

    def token_ids(self) -> Tensor:
        """Return the target token id of each draft token, int64 [Vd]. Without d2t ids are the target's."""
        if "d2t" not in self.tensors and self.config["draft_vocab_size"] == self.config["vocab_size"]:
            return torch.arange(self.config["vocab_size"])
        self.used.add("d2t")
        return self.tensors["d2t"] + torch.arange(self.tensors["d2t"].numel())

    def logits(self, probe: Probe) -> Tensor:
        """Return [S + 1, Vd]: logits of step 0 for every row, then of step 1 for the last row."""
        state, raw = self._layer(self._fuse(probe.aux), probe.embedded[:-1], probe.positions, None)
        next_state = self._norm(raw[-1:], "norm") if self.config.get("norm_output") else raw[-1:]
        _, drafted = self._layer(next_state, probe.embedded[-1:], probe.positions[-1:] + 1, state)
        return self._norm(torch.cat([raw, drafted]), "norm") @ self.tensor("lm_head.weight").T

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.tensor(f"{name}.weight"), self.config["rms_norm_eps"])

    def _fuse(self, aux: Tensor) -> Tensor:
        if self.config.get("norm_before_fc"):
            aux = self._norm(aux, "input_norm")
        if self.config.get("fc_norm"):
            count = len(self.config["eagle_config"]["eagle_aux_hidden_state_layer_ids"])
            parts = enumerate(aux.chunk(count, dim=-1))
            aux = torch.cat([self._norm(part, f"fc_norm.{i}") for i, part in parts], dim=-1)
        return aux @ self.tensor("fc.weight").T

    def _project(self, name: str, x: Tensor) -> Tensor:
        bias = self.tensor(f"midlayer.self_attn.{name}.bias") if self.config["attention_bias"] else None
        return F.linear(x, self.tensor(f"midlayer.self_attn.{name}.weight"), bias)

    def _layer(
        self, state: Tensor, embedded: Tensor, positions: Tensor, cache: tuple | None
    ) -> tuple[tuple, Tensor]:
        """Run the decoder layer on n rows that see the cached rows and, causally, each other.

        Returns ((keys, values, positions) of all rows, output [n, D]).
        """
        normed = self._norm(embedded, "midlayer.input_layernorm"), self._norm(state, "midlayer.hidden_norm")
        z = torch.cat(normed, dim=-1)
        q, k, v = (self._project(f"{n}_proj", z).unflatten(-1, (-1, self.config["head_dim"])) for n in "qkv")
        if "Qwen3" in self.config["architectures"][0]:  # the engines' class with a norm for each head
            q, k = (self._norm(x, f"midlayer.self_attn.{name}_norm") for name, x in (("q", q), ("k", k)))
        q, k = (self._rotate(x, positions) for x in (q, k))
        if cache:
            k, v = torch.cat([cache[0], k]), torch.cat([cache[1], v])
        key_positions = torch.cat([cache[2], positions]) if cache else positions
        distance = positions[:, None] - key_positions[None]  # [n, keys]; negative: the key comes later
        seen = (distance >= 0) & (distance < (self.config.get("sliding_window") or 1 << 40))
        group = self.heads // self.kv_heads
        wide_k, wide_v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, wide_k) * self.config["head_dim"] ** -0.5
        attended = torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), wide_v)
        residual = normed[1] if self.config.get("norm_before_residual") else state
        state = residual + self._project("o_proj", attended.flatten(1))
        y = self._norm(state, "midlayer.post_attention_layernorm")
        gate, up = (y @ self.tensor(f"midlayer.mlp.{n}_proj.weight").T for n in ("gate", "up"))
        down = self.tensor("midlayer.mlp.down_proj.weight").T
        return (k, v, key_positions), state + (F.silu(gate) * up) @ down

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        cos, sin = (part[0, :, None] for part in self.rotary(x[None], positions[None]))
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin


def _rotary(folder: Path) -> torch.nn.Module:
    """Build transformers' rotary embedding for this config.json.

    This also proves that transformers reads the file.
    """
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    return LlamaRotaryEmbedding(AutoConfig.from_pretrained(folder))
