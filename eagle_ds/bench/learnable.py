"""A small made-up target with a store that a draft can learn from, for runs that are compared with one another.

Tokens mostly follow a fixed permutation, and the made-up target knows it: the state at a token points to the head's row of
the next one. So the loss falls within a few dozen steps, as in a real run, and a wrong gradient shows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from eagle_ds.estimate.planner import in_turns
from eagle_ds.sharding.ranges import rows
from eagle_ds.store.store import Sample, StoreInfo, StoreWriter
from eagle_ds.target.files import target_hash

LAYERS, AUX_LAYERS = 8, (1, 3, 4)
HEADS, KV_HEADS = 8, 4  # of the draft: Ulysses may be 1, 2, 4 or 8
THETA = 10000.0
FOLLOWS = 0.9  # share of tokens that the permutation decides
CONFIDENCE = 8.0  # logit of the target's choice
NOISE = 0.3


@dataclass(frozen=True)
class Sizes:
    """Of the made-up target (as wide as its draft) and the store."""

    hidden: int = 1024
    vocab: int = 4096
    tokens: int = 8192  # long enough for cuDNN's attention
    samples: int = 16
    ttt_steps: int = 7


@dataclass(frozen=True)
class Playground:
    """Target, store (states in bfloat16, whatever a run computes in), recipes and run folders below ``root``."""

    root: Path
    sizes: Sizes

    @property
    def target(self) -> Path:
        return self.root / f"target-{self.sizes.hidden}-{self.sizes.vocab}"

    @property
    def store(self) -> Path:
        return self.root / f"store-{self.sizes.hidden}-{self.sizes.vocab}-{self.sizes.samples}x{self.sizes.tokens}"

    def make_data(self, seed: int = 0) -> None:
        """Write target and store; what is there already is kept."""
        sizes, generator = self.sizes, torch.Generator().manual_seed(seed)
        embedding, head = (torch.randn(sizes.vocab, sizes.hidden, generator=generator) for _ in range(2))
        follower = torch.randperm(sizes.vocab, generator=generator)
        if not self.target.exists():
            _write_target(self.target, sizes, embedding, head)
        info = StoreInfo("made up", target_hash(self.target), "none", sizes.hidden, AUX_LAYERS, sizes.vocab)
        with StoreWriter(self.store, info) as writer:
            for number in range(sizes.samples):
                sample = _sample(number, sizes, embedding, head, follower)
                if sample.id not in writer.done_ids:
                    writer.add(sample)

    def write_recipe(self, name: str, layout: dict[str, Any], dtype: str, steps: int) -> Path:
        """Write ``root/NAME.json``, a recipe of so many steps with ``layout`` as its section "parallel", and return its path."""
        deepspeed: dict[str, Any] = {"zero_optimization": {"stage": 1}}
        if dtype == "bfloat16":
            deepspeed |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
        ds_json = self.root / f"ds_{dtype}.json"
        ds_json.write_text(json.dumps(deepspeed, indent=1))
        path = self.root / f"{name}.json"
        path.write_text(json.dumps(self._recipe(name, layout, steps, ds_json), indent=1))
        return path

    def _recipe(self, name: str, layout: dict[str, Any], steps: int, ds_json: Path) -> dict[str, Any]:
        sizes = self.sizes
        shared = {"hidden_size": sizes.hidden}
        heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": sizes.hidden // HEADS}
        rate = {"learning_rate": 1e-3, "warmup_ratio": 0.1}
        return {
            "name": name,
            "target": {"model": str(self.target), "dtype": "float32", "num_layers": LAYERS, "vocab_size": sizes.vocab, **shared},
            "draft": {"intermediate_size": 2 * sizes.hidden, "vocab_size": sizes.vocab // 2, "rope_theta": THETA, **heads, **shared},
            "data": {"store": str(self.store), "max_length": sizes.tokens},
            "parallel": layout,
            "training": {"ttt_steps": sizes.ttt_steps, "max_steps": steps, "epochs": steps, **rate},
            "deepspeed": str(ds_json),
            "output_dir": str(self.root / name),
        }


def _sample(number: int, sizes: Sizes, embedding: torch.Tensor, head: torch.Tensor, follower: torch.Tensor) -> Sample:
    """Every second sample is trained in all rows, the others in turns that are half of theirs."""
    rng, generator = np.random.default_rng([1, number]), torch.Generator().manual_seed(number)
    size = sizes.tokens
    ids, follows = rng.integers(0, sizes.vocab, size), rng.random(size) < FOLLOWS
    for at in range(1, size):
        if follows[at]:
            ids[at] = follower[ids[at - 1]]
    mask = np.zeros(size, dtype=np.uint8)
    mask[rows(in_turns(size, 1.0 if number % 2 else 0.5, max(size // 8, 4)).trained_spans)] = 1
    tokens = torch.from_numpy(ids)
    aim = head[follower[tokens]]
    hidden = CONFIDENCE * aim / (aim * aim).sum(-1, keepdim=True) + _noise(size, sizes.hidden, generator) / sizes.hidden
    aux = torch.cat([embedding[tokens] + NOISE * _noise(size, sizes.hidden, generator) for _ in range(3)], dim=-1)
    hidden = hidden.bfloat16()
    logits = hidden.float() @ head.t()
    return Sample(
        id=f"sample-{number}",
        input_ids=tokens.to(torch.int32),
        loss_mask=torch.from_numpy(mask),
        aux_hidden_state=aux.bfloat16(),
        hidden_state=hidden,
        target_token_id=logits.argmax(-1).to(torch.int32),
        target_logsumexp=torch.logsumexp(logits, -1),
    )


def _noise(size: int, width: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(size, width, generator=generator)


def _write_target(folder: Path, sizes: Sizes, embedding: torch.Tensor, head: torch.Tensor) -> None:
    """What training reads of a target."""
    folder.mkdir(parents=True)
    config = {
        "model_type": "llama",
        "hidden_size": sizes.hidden,
        "num_hidden_layers": LAYERS,
        "vocab_size": sizes.vocab,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "intermediate_size": 2 * sizes.hidden,
        "rms_norm_eps": 1e-5,
        "rope_theta": THETA,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    weights = {"model.embed_tokens.weight": embedding, "model.norm.weight": torch.ones(sizes.hidden), "lm_head.weight": head}
    save_file(weights, folder / "model.safetensors")
