"""The golden files: one EAGLE-3 training step each, computed by a peer's trainer (tests/golden/README.md)."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from eagle_ds.config.sections import RopeScaling
from eagle_ds.data.batch import TokenLabels
from eagle_ds.model.arch import DraftArch
from eagle_ds.model.draft import Eagle3Draft
from eagle_ds.sharding.sequence import Document

FOLDER = Path(os.environ.get("EAGLE_DS_GOLDEN_DIR", Path(__file__).parent / "golden"))
SERVED_NAMES = {"head.norm_weight": "norm.weight", "head.weight": "lm_head.weight"}


def case_names() -> list[str]:
    """Every case in the folder; EAGLE_DS_GOLDEN_DIR names another one."""
    return sorted(p.stem for p in FOLDER.glob("*.npz"))


@dataclass
class GoldenCase:
    """One case: arrays as tensors, and the architecture that its configuration describes."""

    arrays: dict[str, Tensor]
    config: dict
    arch: DraftArch

    @classmethod
    def load(cls, name: str) -> GoldenCase:
        raw = np.load(FOLDER / f"{name}.npz")
        arrays = {key: torch.from_numpy(np.array(raw[key])) for key in raw.files}
        c = json.loads((FOLDER / f"{name}.json").read_text())["config"]
        scaling = c["rope_scaling"]
        arch = DraftArch(
            hidden_size=c["hidden_size"],
            intermediate_size=c["intermediate_size"],
            num_attention_heads=c["num_attention_heads"],
            num_key_value_heads=c["num_key_value_heads"],
            head_dim=c["head_dim"],
            draft_vocab_size=c["draft_vocab_size"],
            target_hidden_size=c["target_hidden_size"],
            target_vocab_size=c["vocab_size"],
            trained_length=c["max_position_embeddings"],
            rope_theta=c["rope_theta"],
            rope_scaling=RopeScaling(**scaling) if scaling else None,
            rms_norm_eps=c["rms_norm_eps"],
        )
        return cls(arrays, c, arch)

    def draft(self, dtype: torch.dtype) -> Eagle3Draft:
        """The draft with the case's weights; a frozen embedding also where D != H, as the producer has it."""
        model = Eagle3Draft(self.arch).to(dtype)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(self.arrays["w." + SERVED_NAMES.get(name, name)])
            model.embed_tokens.weight.copy_(self.arrays["w.embed_tokens.weight"])
        return model

    def document(self) -> Document:
        mask = self.arrays["in.loss_mask"].numpy()
        edges = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]])))
        spans = zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
        return Document(len(mask), tuple(spans))

    def token_labels(self) -> TokenLabels:
        ids, mask = self.arrays["in.input_ids"].numpy(), self.arrays["in.loss_mask"].numpy()
        return TokenLabels(ids.astype(np.int32), mask.astype(np.uint8))
