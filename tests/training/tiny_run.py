"""A run small enough for tests: a random target, stores and a recipe, all in the real formats."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from eagle_ds.config.recipe import Recipe
from eagle_ds.store.store import Sample, StoreInfo, StoreWriter
from eagle_ds.target.identity import target_hash
from eagle_ds.target.info import TargetInfo

H, V, VD, LAYERS = 24, 37, 19, 8
MASKS = (
    "0000111111100001111111111",
    "00000000000000000001111111",
    "0001111111111111111111111111110",
    "011111",
    "000000011111111110000000001111111110000011111",
    "0000000000111111111111",
    "0001111100011111000111110001111",
    "00000000000000000000000000000000001111111111",
    "0000000000000000",  # nothing to train: skipped and counted
    "01",  # two tokens: no row sees a label
)


@dataclass(frozen=True)
class Tiny:
    """The folder of a tiny run and the paths in it."""

    root: Path

    @property
    def target(self) -> Path:
        return self.root / "target"

    def recipe(self, name: str = "tiny", **overrides: Any) -> Recipe:
        """A recipe that runs on CPU; ``overrides`` by dotted name with ``__`` for the dot."""
        tree: dict[str, Any] = {
            "name": name,
            "target": {
                "model": str(self.target),
                "dtype": "float32",
                "hidden_size": H,
                "num_layers": LAYERS,
                "vocab_size": V,
            },
            "draft": {
                "hidden_size": H,
                "intermediate_size": 20,
                "num_attention_heads": 8,
                "num_key_value_heads": 2,
                "head_dim": 4,
                "vocab_size": VD,
                "rope_theta": 100.0,
            },
            "data": {
                "store": str(self.root / "train"),
                "eval_store": str(self.root / "held_out"),
                "max_length": 64,
            },
            "parallel": {},
            "training": {
                "ttt_steps": 3,
                "max_steps": 4,
                "epochs": 100,
                "learning_rate": 1e-3,
                "warmup_ratio": 0.0,
            },
            "deepspeed": str(self.root / "ds_stage1.json"),
            "output_dir": str(self.root / "runs" / name),
        }
        for dotted, value in overrides.items():
            *sections, leaf = dotted.split("__")
            section = tree
            for part in sections:
                section = section[part]
            section[leaf] = value
        return Recipe.model_validate(tree)


def make_tiny(root: Path, *, labels: bool = True, dtype: str = "float32") -> Tiny:
    """Write target, stores and DeepSpeed JSONs (stages 0 to 3 in float32, 0 and 1 in bfloat16) below
    ``root``.
    """
    tiny = Tiny(root)
    write_target(tiny.target)
    write_store(root / "train", tiny.target, MASKS, seed=1, labels=labels, dtype=dtype)
    write_store(root / "held_out", tiny.target, MASKS[:3], seed=2, labels=labels, dtype=dtype)
    for stage in range(4):
        zero: dict[str, Any] = {"stage": stage}
        if stage == 3:
            zero["stage3_param_persistence_threshold"] = 0  # partition even tiny parameters
        (root / f"ds_stage{stage}.json").write_text(json.dumps({"zero_optimization": zero}))
        if stage < 2:
            (root / f"ds_bf16_stage{stage}.json").write_text(
                json.dumps({"bf16": {"enabled": True}, "zero_optimization": zero})
            )
    return tiny


def write_target(folder: Path) -> None:
    """What training reads of a target: config.json, embedding, final norm and head."""
    folder.mkdir(parents=True)
    config = {
        "model_type": "llama",
        "hidden_size": H,
        "num_hidden_layers": LAYERS,
        "vocab_size": V,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100.0,
    }
    (folder / "config.json").write_text(json.dumps(config))
    rng = torch.Generator().manual_seed(0)
    tensors = {
        "model.embed_tokens.weight": torch.randn(V, H, generator=rng),
        "model.norm.weight": 1 + 0.1 * torch.randn(H, generator=rng),
        "lm_head.weight": torch.randn(V, H, generator=rng),
    }
    save_file(tensors, folder / "model.safetensors")


def target_head(folder: Path) -> torch.Tensor:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")["lm_head.weight"]


def write_store(
    root: Path,
    target: Path,
    masks: tuple[str, ...],
    *,
    seed: int,
    labels: bool = True,
    dtype: str = "float32",
) -> None:
    """One sample a mask of 0 and 1, random but for its labels, which are the target's."""
    head, rng, layers = (
        target_head(target),
        np.random.default_rng(seed),
        TargetInfo.from_folder(target).aux_ids,
    )
    vocab, width = head.shape
    info = StoreInfo("tiny", target_hash(target), "none", width, layers, vocab, dtype=dtype)
    with StoreWriter(root, info) as writer:
        for number, mask in enumerate(masks):
            size = len(mask)
            aux, hidden = (
                torch.from_numpy(rng.standard_normal((size, w))).to(getattr(torch, dtype))
                for w in (3 * width, width)
            )
            logits = hidden.float() @ head.t()
            writer.add(
                Sample(
                    id=f"sample-{number}",
                    input_ids=torch.from_numpy(rng.integers(0, vocab, size, dtype=np.int32)),
                    loss_mask=torch.tensor([int(c) for c in mask], dtype=torch.uint8),
                    aux_hidden_state=aux,
                    hidden_state=hidden,
                    target_token_id=logits.argmax(-1).to(torch.int32) if labels else None,
                    target_logsumexp=torch.logsumexp(logits, -1) if labels else None,
                )
            )
