"""Write hidden-state files in the formats of other projects (described in eagle_ds/convert/formats.py)."""

from __future__ import annotations

import gzip
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from safetensors.torch import save_file

HIDDEN = 32
VOCAB = 280
AUX_IDS = (1, 3, 4)
FLAGS = ["--target-name", "tiny", "--aux-layer-ids", "1,3,4", "--vocab-size", str(VOCAB)]


@dataclass
class Features:
    """The hidden states of one conversation, before they are written in some format."""

    input_ids: torch.Tensor  # int64 [S]
    loss_mask: torch.Tensor  # int64 [S]
    aux: torch.Tensor  # [S, 3H]
    last: torch.Tensor  # [S, H]


def features(
    num_tokens: int, seed: int = 0, hidden: int = HIDDEN, dtype: torch.dtype = torch.bfloat16
) -> Features:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (num_tokens,), generator=generator)
    mask = (torch.arange(num_tokens) % 16 >= 8).to(torch.int64)
    aux = torch.randn(num_tokens, 3 * hidden, generator=generator).to(dtype)
    return Features(ids, mask, aux, torch.randn(num_tokens, hidden, generator=generator).to(dtype))


def specforge_dict(made: Features) -> dict[str, Any]:
    return {
        "input_ids": made.input_ids,
        "loss_mask": made.loss_mask,
        "hidden_state": made.last[None],
        "aux_hidden_state": made.aux[None],
    }


def write_specforge(
    root: Path, number: int, made: Features, gzipped: bool = False, level: int = 6, **save: Any
) -> Path:
    """``rows_0-5000/data_N.ckpt``, or ``.ckpt.gz``."""
    start = number // 5000 * 5000
    path = root / f"rows_{start}-{start + 5000}" / f"data_{number}.ckpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not gzipped:
        torch.save(specforge_dict(made), path, **save)
        return path
    buffer = io.BytesIO()
    torch.save(specforge_dict(made), buffer, **save)
    path = path.with_suffix(".ckpt.gz")
    path.write_bytes(gzip.compress(buffer.getvalue(), level))
    return path


def write_modelopt(root: Path, name: str, made: Features) -> Path:
    """``NAME.pt``."""
    path = root / f"{name}.pt"
    states = {"hidden_states": made.last, "aux_hidden_states": made.aux}
    ids = {"input_ids": made.input_ids, "loss_mask": made.loss_mask}
    torch.save({**ids, **states, "conversation_id": name}, path)
    return path


def write_speculators(root: Path, number: int, token_ids: torch.Tensor, states: torch.Tensor) -> Path:
    """``hs_N.safetensors`` with states [S, 4, H], the last before the final norm."""
    path = root / f"hs_{number}.safetensors"
    save_file({"hidden_states": states.contiguous(), "token_ids": token_ids}, path)
    return path


def write_grouped_hdf5(path: Path, samples: list[Features]) -> Path:
    """Write another schema: one group for each sample, one dataset for each layer, bfloat16 as integers."""
    with h5py.File(path, "w") as file:
        for number, made in enumerate(samples):
            group = file.create_group(f"data/s{number}")
            group["tokens"], group["mask"] = made.input_ids.numpy(), made.loss_mask.numpy().astype(bool)
            layers = (*made.aux.split(made.last.shape[1], 1), made.last)
            for name, states in zip(("low", "mid", "high", "final"), layers, strict=True):
                bits = states.contiguous().view(torch.int16).numpy().view(np.uint16)
                group.create_dataset(name, data=bits, compression="gzip")
    return path


GROUPED_MAP = (
    "input_ids=data/*/tokens,loss_mask=data/*/mask,"
    "aux_hidden_state=data/*/low+data/*/mid+data/*/high@bf16,hidden_state=data/*/final@bf16"
)


def write_conversations(path: Path, texts: list[tuple[str, str]]) -> Path:
    """Write JSONL with one question and its answer on each line."""
    lines = []
    for number, (question, answer) in enumerate(texts):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append({"id": f"chat-{number}", "messages": messages})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path
