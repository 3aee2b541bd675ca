"""Hashes that identify a target and its tokenizer: data from one target must not train a draft of another."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from eagle_ds.target.files import open_weights, read_header, weight_headers
from eagle_ds.target.info import TargetInfo

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")
SAMPLED_BLOCKS = 64  # of each weight file
BLOCK_BYTES = 4096
HEX_DIGITS = 32


def target_hash(folder: str | Path) -> str:
    """Identify what the target computes.

    Hashed are RoPE, the norm's eps, all weight headers, and 64 blocks of 4 KiB of each weight file.
    Reading all of a 140 GB target would take minutes. Fine-tuned models of one family have equal headers, but
    their weights differ in almost every block. Weights that are split into other files get another hash.
    """
    info = TargetInfo.from_folder(folder)
    settings = [info.rope_theta, info.rope_scaling, info.rms_norm_eps]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path, header in weight_headers(Path(folder)):
        tensors = {name: item for name, item in header.items() if name != "__metadata__"}
        digest.update(json.dumps(tensors, sort_keys=True).encode())
        with open_weights(path) as stream:
            read_header(stream)
            start, size = stream.tell(), path.stat().st_size
            for block in range(SAMPLED_BLOCKS):
                stream.seek(start + (size - start) * block // SAMPLED_BLOCKS)
                digest.update(stream.read(BLOCK_BYTES))
    return digest.hexdigest()[:HEX_DIGITS]


def tokenizer_hash(folder: str | Path) -> str:
    """Identify the tokenizer and its chat template, wherever the folder keeps them."""
    folder = Path(folder)
    paths = [folder / name for name in TOKENIZER_FILES]
    paths += sorted(folder.glob("*.tiktoken")) + sorted(folder.glob("chat_template*"))
    digest = hashlib.sha256()
    for path in paths:
        if path.is_file():
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        template = json.loads(settings.read_text(encoding="utf-8")).get("chat_template")
        digest.update(json.dumps(template, sort_keys=True).encode())
    return digest.hexdigest()[:HEX_DIGITS]
