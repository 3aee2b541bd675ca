"""The target model as a folder: where it is, its config.json, and the few tensors that a draft needs.

Nothing here loads the model. Only ``config.json``, the safetensors headers and single tensors are read, so a
target of any size is checked in a moment.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import torch

SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.py"]  # everything but the weights
HUB_ID = r"[\w.-]+(/[\w.-]+)?"
MAX_HEADER_BYTES = 200_000_000

# Each tensor's names in the checkpoints of different model classes. They are compared whole: DeepSeek's extra
# multi-token-prediction layer has an embedding and a head whose names end in the same words.
TENSOR_NAMES = {
    "embed_tokens": (
        "model.embed_tokens.weight", "model.language_model.embed_tokens.weight",
        "language_model.model.embed_tokens.weight",
    ),
    "lm_head": ("lm_head.weight", "language_model.lm_head.weight"),
    "norm": ("model.norm.weight", "model.language_model.norm.weight", "language_model.model.norm.weight"),
}


def is_hub_id(model: str) -> bool:
    """Whether this is the id of a model on the hub. What looks like a path, such as "models/x", is not."""
    return bool(re.fullmatch(HUB_ID, model)) and not model.startswith((".", "models/"))


def resolve_target(model: str, revision: str | None = None, weights: bool = True) -> Path:
    """Return the folder of ``model``, which is a local folder or the id of a model on the Hugging Face hub.

    A hub model is downloaded into the hub's cache; ``weights=False`` downloads its configuration and
    tokenizer only. Raises ValueError if the target is missing, unreachable, or (with ``weights``) has no
    readable safetensors.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if folder.exists() or not is_hub_id(model):
            fix = ", nor a Hugging Face id such as org/name"
            if folder.name.startswith("SmolLM2-135M"):
                fix = "; make it with tools/fetch_embedded_target.py"
            raise ValueError(f"target {model} is not a folder here{fix}")
        folder = _snapshot(model, revision, weights)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"target {model} has no config.json in {folder}; "
            "give the folder of a Hugging Face model, or its id"
        )
    if weights:
        list(weight_headers(folder))  # reading a header checks the file
    return folder


def _snapshot(model: str, revision: str | None, weights: bool) -> Path:
    """Download the model from the hub, or find it in the hub's cache."""
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
    """Read config.json. In a multimodal config, the text model's settings are moved to the top level."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder / 'config.json'} cannot be read: {error}") from error
    nested = config.get("text_config")
    return {**config, **nested} if isinstance(nested, dict) else config


def weight_headers(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield (file, its safetensors header) for every weight file.

    Raises ValueError if a file is missing or damaged.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names: Iterable[str] = sorted(set(weight_map.values()))
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        raise ValueError(
            f"target {folder} holds no safetensors weights; "
            "convert it with save_pretrained, or check the folder"
        )
    for name in names:
        with open_weights(folder / name) as stream:
            yield folder / name, read_header(stream)


def open_weights(path: Path) -> BinaryIO:
    """Open a weight file; raise ValueError if that fails."""
    try:
        return open(path, "rb")
    except OSError as error:
        problem = f"target weights {path} cannot be read ({error.strerror})"
        raise ValueError(f"{problem}; fetch the target again") from error


def read_header(stream: BinaryIO) -> dict[str, Any]:
    """Read the header of an open safetensors file and check it against the file's size.

    Leaves the stream at the first data byte. The format: 8 bytes with the header's length, the header as
    JSON, which gives the offsets of every tensor in the data, and the data.
    """
    length = int.from_bytes(stream.read(8), "little")
    size = stream.seek(0, 2)
    stream.seek(8)
    try:
        if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise ValueError("no header")
        header = json.loads(stream.read(length))
        tensors = [item for name, item in header.items() if name != "__metadata__"]
        end = max((item["data_offsets"][1] for item in tensors), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"target weights {stream.name} are not a readable safetensors file; fetch the target again"
        ) from error
    if 8 + length + end != size:
        raise ValueError(
            f"target weights {stream.name} have {size} bytes where their header says {8 + length + end}; "
            "fetch the target again"
        )
    return header


def load_target_weights(
    folder: str | Path, names: Sequence[str] = tuple(TENSOR_NAMES), dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """Load only the named tensors, on the CPU: ``embed_tokens`` [V, H], ``lm_head`` [V, H], ``norm`` [H].

    With tied embeddings ``lm_head`` is the embedding (the same tensor if both are named). ``dtype`` None
    keeps the stored type.
    """
    folder = Path(folder)
    where = {tensor: path for path, header in weight_headers(folder) for tensor in header}
    stored = {name: _find_tensor(name, where, folder) for name in names}
    loaded = {full: _load_tensor(where[full], full, dtype) for full in set(stored.values())}
    return {name: loaded[full] for name, full in stored.items()}


def _find_tensor(name: str, where: dict[str, Path], folder: Path) -> str:
    """Return the name under which this checkpoint stores ``name``."""
    tied = name == "lm_head" and read_config(folder).get("tie_word_embeddings", False)
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
