"""The target model as a folder: where it is, its sizes, its identity, and the few tensors that a draft shares with it.

Nothing here loads the model. Everything is read from ``config.json``, the tokenizer files and the safetensors headers, so
that training and planning can check a target of any size in a moment.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import torch

    from eagle_ds.config.recipe import TargetConfig

log = logging.getLogger(__name__)

SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.py"]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")
FINGERPRINT_BLOCK_BYTES = 4096
FINGERPRINT_BLOCKS = 64

# Whole names only: DeepSeek's multi-token layer holds a second embedding and head, under names that end alike.
TENSOR_NAMES = {
    "embed_tokens": ("model.embed_tokens.weight", "model.language_model.embed_tokens.weight", "language_model.model.embed_tokens.weight"),
    "lm_head": ("lm_head.weight", "language_model.lm_head.weight"),
    "norm": ("model.norm.weight", "model.language_model.norm.weight", "language_model.model.norm.weight"),
}


def resolve_target(model: str, revision: str | None = None, weights: bool = True) -> Path:
    """Folder of ``model``: itself where it is one, else a snapshot from the Hugging Face hub (cached there).

    ``weights=False`` fetches configuration and tokenizer only. Raises ValueError if the target is missing, unreachable,
    or (with ``weights``) has no readable safetensors.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if folder.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) or model.startswith((".", "models/")):
            mend = "; make it with tools/fetch_embedded_target.py" if folder.name.startswith("SmolLM2-135M") else ""
            raise ValueError(f"target {model} is not a folder here{mend or ', nor a Hugging Face id such as org/name'}")
        folder = _snapshot(model, revision, weights)
    if not (folder / "config.json").is_file():
        raise ValueError(f"target {model} has no config.json in {folder}; give the folder of a Hugging Face model, or its id")
    if weights:
        for _ in weight_headers(folder):
            pass
    return folder


def _snapshot(model: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [*SMALL_FILES, "*.safetensors"] if weights else SMALL_FILES
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns, etag_timeout=10))
    except (LocalEntryNotFoundError, HfHubHTTPError, ValueError, OSError) as error:
        reason = type(error).__name__.removesuffix("Error")
        wanted = f"{model}@{revision}" if revision else model
        raise ValueError(
            f"target {wanted} is neither a folder here nor reachable on the Hugging Face hub ({reason}); "
            "check the name, log in if it is gated, or give a local folder"
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """config.json; the text part of a multimodal one."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder / 'config.json'} cannot be read: {error}") from error
    nested = config.get("text_config")
    return {**config, **nested} if isinstance(nested, dict) else config


@dataclass(frozen=True)
class TargetInfo:
    """Sizes and settings of a target, from its config.json (written by transformers 4 or 5)."""

    model_type: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_folder(cls, folder: str | Path) -> TargetInfo:
        config = read_config(Path(folder))
        try:
            return cls._from_config(config)
        except KeyError as error:
            raise ValueError(f"{folder}/config.json has no {error}; only decoder language models can be targets") from error

    @classmethod
    def _from_config(cls, config: dict[str, Any]) -> TargetInfo:
        heads = config["num_attention_heads"]
        theta, scaling = rope_of(config)
        return cls(
            model_type=config["model_type"],
            hidden_size=config["hidden_size"],
            num_layers=config["num_hidden_layers"],
            vocab_size=config["vocab_size"],
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            intermediate_size=config.get("intermediate_size") or 4 * config["hidden_size"],
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            max_position_embeddings=config.get("max_position_embeddings", 0),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            bos_token_id=config.get("bos_token_id"),
            eos_token_ids=_as_ids(config.get("eos_token_id")),
        )

    @property
    def aux_ids(self) -> tuple[int, int, int]:
        """Default layers whose outputs are captured, 0-based (SGLang's numbering)."""
        return (1, self.num_layers // 2 - 1, self.num_layers - 4)

    def check_against(self, target: TargetConfig) -> None:
        """Raise ValueError unless the recipe states this target's sizes and layers it has."""
        for name in ("hidden_size", "num_layers", "vocab_size"):
            found, stated = getattr(self, name), getattr(target, name)
            if found != stated:
                raise ValueError(f"target.{name}={stated} in the recipe but {target.model} has {found}; write {found}")
        check_aux_ids(target.aux_ids, self.num_layers)


def check_aux_ids(aux_ids: Sequence[int], num_layers: int) -> None:
    """Raise ValueError unless the ids are ascending layers of the target."""
    if list(aux_ids) != sorted(set(aux_ids)) or min(aux_ids) < 0 or max(aux_ids) >= num_layers:
        raise ValueError(
            f"aux_layer_ids={list(aux_ids)} must be ascending layer outputs within 0..{num_layers - 1}; "
            f"the usual choice is {[1, num_layers // 2 - 1, num_layers - 4]} from 8 layers up"
        )


def rope_of(config: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling without theta or None), from ``rope_parameters`` (transformers 5) or ``rope_theta``/``rope_scaling``."""
    parameters = config.get("rope_parameters")
    if isinstance(parameters, dict) and isinstance(parameters.get("full_attention"), dict):  # one set a layer type: Gemma 3
        parameters = parameters["full_attention"]
    scaling = dict(parameters or config.get("rope_scaling") or {})
    theta = scaling.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    if "type" in scaling:  # the key's name before rope_type
        scaling.setdefault("rope_type", scaling.pop("type"))
    return float(theta), scaling if scaling.get("rope_type", "default") != "default" else None


def _as_ids(value: int | Sequence[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def stop_token_ids(folder: str | Path) -> tuple[int, ...]:
    """Tokens that end a generation: those of generation_config.json, which often has more, and of config.json."""
    path = Path(folder) / "generation_config.json"
    generation = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return tuple(sorted({*_as_ids(generation.get("eos_token_id")), *TargetInfo.from_folder(folder).eos_token_ids}))


def weight_headers(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(file, its safetensors header) for every weight file; ValueError where one is missing or damaged."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names: Iterable[str] = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        raise ValueError(f"target {folder} holds no safetensors weights; convert it with save_pretrained, or check the folder")
    for name in names:
        with _open_weights(folder / name) as stream:
            yield folder / name, _read_header(stream)


def _open_weights(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise ValueError(f"target weights {path} cannot be read ({error.strerror}); fetch the target again") from error


def _read_header(stream: BinaryIO) -> dict[str, Any]:
    """Header of an open safetensors file, checked against the file's size; leaves the stream at the first data byte."""
    length = int.from_bytes(stream.read(8), "little")
    size = stream.seek(0, 2)
    stream.seek(8)
    try:
        if not 2 <= length <= min(size - 8, 200_000_000):
            raise ValueError("no header")
        header = json.loads(stream.read(length))
        end = max((item["data_offsets"][1] for name, item in header.items() if name != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"target weights {stream.name} are not a readable safetensors file; fetch the target again") from error
    if 8 + length + end != size:
        raise ValueError(f"target weights {stream.name} hold {size} bytes where {8 + length + end} are due; fetch the target again")
    return header


def target_hash(folder: str | Path) -> str:
    """Identity of what the target computes: rope, norm eps, weight headers in full, and 64 blocks of 4 KiB of each file.

    Reading all of a 140 GB target takes minutes; fine-tuned siblings, which share every header, differ in almost every
    block. Re-sharding the same weights changes the hash.
    """
    info = TargetInfo.from_folder(folder)
    digest = hashlib.sha256(json.dumps([info.rope_theta, info.rope_scaling, info.rms_norm_eps], sort_keys=True).encode())
    for path, header in weight_headers(Path(folder)):
        digest.update(json.dumps({name: item for name, item in header.items() if name != "__metadata__"}, sort_keys=True).encode())
        with _open_weights(path) as stream:
            _read_header(stream)
            start, size = stream.tell(), path.stat().st_size
            for block in range(FINGERPRINT_BLOCKS):
                stream.seek(start + (size - start) * block // FINGERPRINT_BLOCKS)
                digest.update(stream.read(FINGERPRINT_BLOCK_BYTES))
    return digest.hexdigest()[:32]


def tokenizer_hash(folder: str | Path) -> str:
    """Identity of the tokenizer and its chat template."""
    folder = Path(folder)
    paths = [folder / name for name in TOKENIZER_FILES] + sorted(folder.glob("*.tiktoken")) + sorted(folder.glob("chat_template*"))
    digest = hashlib.sha256()
    for path in paths:
        if path.is_file():
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        template = json.loads(settings.read_text(encoding="utf-8")).get("chat_template")
        digest.update(json.dumps(template, sort_keys=True).encode())
    return digest.hexdigest()[:32]


def load_target_weights(
    folder: str | Path, names: Sequence[str] = ("embed_tokens", "lm_head", "norm"), dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """The named tensors alone, on the CPU: ``embed_tokens`` [V, H], ``lm_head`` [V, H], ``norm`` [H].

    With tied embeddings ``lm_head`` is the embedding itself (the same tensor if both are asked for). ``dtype`` None keeps
    the stored one.
    """
    folder = Path(folder)
    where = {tensor: path for path, header in weight_headers(folder) for tensor in header}
    loaded: dict[str, torch.Tensor] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        full_name = _find_tensor(name, where, folder)
        if full_name not in loaded:
            loaded[full_name] = _load_tensor(where[full_name], full_name, dtype)
        tensors[name] = loaded[full_name]
    return tensors


def _find_tensor(name: str, where: dict[str, Path], folder: Path) -> str:
    tied = name == "lm_head" and TargetInfo.from_folder(folder).tie_word_embeddings
    candidates = [*TENSOR_NAMES[name], *(TENSOR_NAMES["embed_tokens"] if tied else ())]
    for candidate in candidates:
        if candidate in where:
            return candidate
    raise ValueError(f"target {folder} has no {name} under any of {', '.join(candidates)}")


def _load_tensor(path: Path, name: str, dtype: torch.dtype | None) -> torch.Tensor:
    import torch
    from safetensors import safe_open

    with safe_open(path, framework="pt") as archive:
        tensor = archive.get_tensor(name)
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{path}: {name} is stored as {tensor.dtype}, expected float32, bfloat16 or float16")
    return tensor if dtype is None else tensor.to(dtype)
