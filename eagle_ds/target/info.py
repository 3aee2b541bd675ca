"""Read a target's config.json: sizes, RoPE, stop tokens, and which layers can be captured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eagle_ds.config.sections import default_aux_ids
from eagle_ds.target.files import read_config

if TYPE_CHECKING:
    from eagle_ds.config.sections import TargetConfig


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
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    architecture: str = ""
    """Name of the class in ``architectures``; engines choose their own class by it."""

    @classmethod
    def from_folder(cls, folder: str | Path) -> TargetInfo:
        """Read the target's config; raise ValueError if it is not a decoder language model's."""
        config = read_config(Path(folder))
        try:
            return cls._from_config(config)
        except KeyError as error:
            raise ValueError(
                f"{folder}/config.json has no {error}; only decoder language models can be targets"
            ) from error

    @classmethod
    def _from_config(cls, config: dict[str, Any]) -> TargetInfo:
        heads = config["num_attention_heads"]
        theta, scaling = rope_of(config)
        return cls(
            model_type=config["model_type"], hidden_size=config["hidden_size"],
            num_layers=config["num_hidden_layers"], vocab_size=config["vocab_size"],
            num_attention_heads=heads, num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            intermediate_size=config.get("intermediate_size") or 4 * config["hidden_size"],
            rms_norm_eps=config.get("rms_norm_eps", 1e-6), rope_theta=theta, rope_scaling=scaling,
            max_position_embeddings=config.get("max_position_embeddings", 0),
            bos_token_id=config.get("bos_token_id"), eos_token_ids=_as_ids(config.get("eos_token_id")),
            architecture=next(iter(config.get("architectures") or ()), ""),
        )

    @property
    def longest_context(self) -> int:
        """Longest context, in tokens, that an engine may serve by default; 0 if config.json does not say.

        Engines multiply ``max_position_embeddings`` by the factor of a scaling that names no original length.
        With YaRN some versions take original length * factor.
        """
        scaling, stated = self.rope_scaling or {}, self.max_position_embeddings
        factor, original = scaling.get("factor") or 1.0, scaling.get("original_max_position_embeddings")
        if original is None:
            return stated if scaling.get("rope_type") == "llama3" else int(stated * factor)
        return max(stated, int(original * factor)) if scaling.get("rope_type") == "yarn" else stated

    @property
    def aux_ids(self) -> tuple[int, int, int]:
        """Layers whose outputs are captured by default, counted from 0 (SGLang's numbering)."""
        return default_aux_ids(self.num_layers)

    def check_against(self, target: TargetConfig) -> None:
        """Raise ValueError unless the recipe states this target's sizes, and layers that it has."""
        for name in ("hidden_size", "num_layers", "vocab_size"):
            found, stated = getattr(self, name), getattr(target, name)
            if found != stated:
                where = f"in the recipe but {target.model} has {found}"
                raise ValueError(f"target.{name}={stated} {where}; write {found}")
        check_aux_ids(target.aux_ids, self.num_layers)


def check_aux_ids(aux_ids: Sequence[int], num_layers: int) -> None:
    """Raise ValueError unless the ids are layers of the target in ascending order."""
    if list(aux_ids) != sorted(set(aux_ids)) or min(aux_ids) < 0 or max(aux_ids) >= num_layers:
        raise ValueError(
            f"aux_layer_ids={list(aux_ids)} must be ascending layer outputs within 0..{num_layers - 1}; "
            f"the usual choice is {list(default_aux_ids(num_layers))} from 8 layers up"
        )


def rope_of(config: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Return RoPE's theta, and its scaling (None where there is none).

    transformers 5 writes both into ``rope_parameters``; transformers 4 writes ``rope_theta`` and
    ``rope_scaling``.
    """
    parameters = config.get("rope_parameters")
    if isinstance(parameters, dict) and isinstance(parameters.get("full_attention"), dict):
        parameters = parameters["full_attention"]  # Gemma 3 has one set for each type of layer
    scaling = dict(parameters or config.get("rope_scaling") or {})
    theta = scaling.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    if "type" in scaling:  # the older name of rope_type
        scaling.setdefault("rope_type", scaling.pop("type"))
    return float(theta), scaling if scaling.get("rope_type", "default") != "default" else None


def _as_ids(value: int | Sequence[int] | None) -> tuple[int, ...]:
    """Return the ids of a setting that is an id, a list of ids, or null."""
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def stop_token_ids(folder: str | Path) -> tuple[int, ...]:
    """Return the tokens that end a generation, from config.json and generation_config.json together."""
    path = Path(folder) / "generation_config.json"
    generation = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    eos = _as_ids(generation.get("eos_token_id"))
    return tuple(sorted({*eos, *TargetInfo.from_folder(folder).eos_token_ids}))
