"""An independent reader of a served draft: what an engine would compute from the folder, written from the contract alone.

It shares nothing with the training model or with the writer: tensors come from the file by their served names, rope from
transformers' reading of config.json, and attention is a dense causal softmax. An export whose logits agree with it is
one that engines read as it was meant.
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
    """Random inputs: aux [S, A*H], embeddings [S + 1, D] (the last is that of the drafted token), ascending positions [S]."""

    aux: Tensor
    embedded: Tensor
    positions: Tensor

    @classmethod
    def random(cls, aux_width: int, hidden_size: int, spread: int, rows: int = 24, seed: int = 0) -> Probe:
        """Positions grow to about ``spread``: far enough to see a wrong rope, near enough for float32. With 1 they are 0, 1, 2, ..."""
        generator = torch.Generator().manual_seed(seed)
        far = torch.logspace(0, 1, rows, base=spread, dtype=torch.float64).long() - 1
        positions = far + torch.arange(rows)
        aux, embedded = (torch.randn(n, width, generator=generator) for n, width in ((rows, aux_width), (rows + 1, hidden_size)))
        return cls(aux, embedded, positions)


class ServedReader:
    """The folder as an engine sees it, in float32."""

    def __init__(self, folder: Path) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        with safe_open(folder / "model.safetensors", framework="pt") as archive:
            self.tensors = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118 (an archive is no dict)
        self.used: set[str] = {"t2d"}  # engines need only d2t
        self.heads, self.kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        self.rotary = _rotary(folder)

    def tensor(self, name: str) -> Tensor:
        """A tensor by its served name; KeyError means that engines would not find it either."""
        self.used.add(name)
        return self.tensors[name].float()

    def unused(self) -> set[str]:
        """Tensors in the file that nothing read: engines would drop them without a word."""
        return self.tensors.keys() - self.used

    def token_ids(self) -> Tensor:
        """Target token of each draft token."""
        self.used.add("d2t")
        return self.tensors["d2t"] + torch.arange(self.tensors["d2t"].numel())

    def logits(self, probe: Probe) -> Tensor:
        """[S + 1, Vd]: of every row from the target's states, then of the last row's second drafting step."""
        state, raw = self._layer(self._fuse(probe.aux), probe.embedded[:-1], probe.positions, None)
        handed_on = self._norm(raw[-1:], "norm") if self.config.get("norm_output") else raw[-1:]
        _, drafted = self._layer(handed_on, probe.embedded[-1:], probe.positions[-1:] + 1, state)
        return self._norm(torch.cat([raw, drafted]), "norm") @ self.tensor("lm_head.weight").T

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.tensor(f"{name}.weight"), self.config["rms_norm_eps"])

    def _fuse(self, aux: Tensor) -> Tensor:
        if self.config.get("norm_before_fc"):
            aux = self._norm(aux, "input_norm")
        if self.config.get("fc_norm"):
            count = len(self.config["eagle_config"]["eagle_aux_hidden_state_layer_ids"])
            aux = torch.cat([self._norm(part, f"fc_norm.{i}") for i, part in enumerate(aux.chunk(count, dim=-1))], dim=-1)
        return aux @ self.tensor("fc.weight").T

    def _project(self, name: str, x: Tensor) -> Tensor:
        bias = self.tensor(f"midlayer.self_attn.{name}.bias") if self.config["attention_bias"] else None
        return F.linear(x, self.tensor(f"midlayer.self_attn.{name}.weight"), bias)

    def _layer(self, state: Tensor, embedded: Tensor, positions: Tensor, cache: tuple | None) -> tuple[tuple, Tensor]:
        """((keys, values, positions), output [n, D]) of rows that see the cache and one another, causally."""
        z = torch.cat([self._norm(embedded, "midlayer.input_layernorm"), self._norm(state, "midlayer.hidden_norm")], dim=-1)
        q, k, v = (self._project(f"{n}_proj", z).unflatten(-1, (-1, self.config["head_dim"])) for n in "qkv")
        q, k = (self._rotate(x, positions) for x in (q, k))
        if cache:
            k, v = torch.cat([cache[0], k]), torch.cat([cache[1], v])
        at = torch.cat([cache[2], positions]) if cache else positions
        distance = positions[:, None] - at[None]
        seen = (distance >= 0) & (distance < (self.config.get("sliding_window") or 1 << 40))
        group = self.heads // self.kv_heads
        wide_k, wide_v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, wide_k) * self.config["head_dim"] ** -0.5
        attended = torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), wide_v)
        state = state + self._project("o_proj", attended.flatten(1))
        y = self._norm(state, "midlayer.post_attention_layernorm")
        gate, up = (y @ self.tensor(f"midlayer.mlp.{n}_proj.weight").T for n in ("gate", "up"))
        return (k, v, at), state + (F.silu(gate) * up) @ self.tensor("midlayer.mlp.down_proj.weight").T

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        cos, sin = (part[0, :, None] for part in self.rotary(x[None], positions[None]))
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin


def _rotary(folder: Path) -> torch.nn.Module:
    """transformers' rotary embedding for this config.json, which also proves that transformers reads the file."""
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    return LlamaRotaryEmbedding(AutoConfig.from_pretrained(folder))
