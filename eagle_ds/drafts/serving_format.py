"""The format in which engines serve a draft: tensor names and keys of config.json.

An engine silently drops a tensor that it does not know, and silently uses a default for a key that it does
not find. The draft then proposes noise. So this module writes every value to the place where each engine
looks for it, and refuses to read a draft that has settings it does not understand.

Where engines look:

    layer ids   SGLang: ``eagle_config``, and adds 1 to each. vLLM: the top level, and adds nothing.
    rope        both: ``rope_parameters`` (transformers 5), or ``rope_theta`` and ``rope_scaling`` (4).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from eagle_ds.config.sections import ROPE_NEEDS, RopeScaling
from eagle_ds.model.arch import DraftArch
from eagle_ds.model.draft import Eagle3Draft
from eagle_ds.target.info import TargetInfo, rope_of

SGLANG_ARCHITECTURE = "LlamaForCausalLMEagle3"
VLLM_ARCHITECTURE = "Eagle3LlamaForCausalLM"
EMBEDDING = "embed_tokens.weight"
VOCABULARY = ("d2t", "t2d")
# Training name -> served name
HEAD_NAMES = {"head.norm_weight": "norm.weight", "head.weight": "lm_head.weight"}
ALIASES = {  # names in published drafts -> ours
    "layers.0.": "midlayer.",
    "aux_norm_low.": "fc_norm.0.", "aux_norm_mid.": "fc_norm.1.", "aux_norm_high.": "fc_norm.2.",
}

# Settings that have the same name in DraftArch and in config.json
SAME_NAMES = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "draft_vocab_size", "max_position_embeddings", "rms_norm_eps", "attention_bias", "fc_norm", "norm_output",
    "norm_before_fc",
)

# SGLang adds 1 to the ids, because it captures the inputs of layers: the output of layer i is the input of
# layer i + 1. Its DeepSeek class adds 1 only to lists that begin with 1, and uses any other list as it is.
DEEPSEEK_CLASS = {"deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "kimi_k25", "glm4_moe_lite"}
UNSUPPORTED = {  # key of config.json -> what it means if it is set
    "norm_before_residual": "the residual is normed", "mlp_bias": "the MLP has biases",
    "bias": "fc has a bias",
}


def served_name(name: str) -> str:
    """Return the name that engines know for a tensor's training name."""
    return HEAD_NAMES.get(name, name)


def training_name(name: str) -> str:
    """Return the training name of a tensor in a served or published draft.

    Unknown names are returned unchanged.
    """
    name = name.removeprefix("model.")
    for old, new in ALIASES.items():
        if name.startswith(old):
            name = new + name.removeprefix(old)
    return {served: training for training, served in HEAD_NAMES.items()}.get(name, name)


def tensor_shapes(arch: DraftArch) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of this architecture by training name, without a frozen embedding."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in Eagle3Draft(arch).named_parameters()}


def sglang_layer_ids(outputs: Sequence[int], target: TargetInfo | None) -> list[int]:
    """Return the ids from which SGLang's class for this target reads the layer outputs ``outputs``."""
    used_as_they_are = target and target.model_type in DEEPSEEK_CLASS and outputs[0] != 1
    return [layer + 1 for layer in outputs] if used_as_they_are else list(outputs)


def layer_outputs(ids: Sequence[int], target: TargetInfo | None) -> tuple[int, ...]:
    """Return the layer outputs that SGLang reads for ``ids``: the inverse of ``sglang_layer_ids``.

    Published drafts of gpt_oss may name inputs of layers instead; then their largest id is num_layers.
    """
    are_inputs = target and (
        (target.model_type in DEEPSEEK_CLASS and ids[0] != 1)
        or (target.model_type == "gpt_oss" and max(ids) == target.num_layers)
    )
    return tuple(layer - 1 for layer in ids) if are_inputs else tuple(ids)


def served_config(
    arch: DraftArch, outputs: Sequence[int], target: TargetInfo | None, dtype: str, vllm: bool
) -> dict[str, Any]:
    """Return the config.json of a draft that reads the target's layer outputs ``outputs``.

    Args:
        target: gives the token ids and the model class; None leaves the token ids out.
        dtype: type of the weights in the file.
        vllm: write vLLM's architecture name instead of SGLang's.
    """
    config: dict[str, Any] = {
        "architectures": [VLLM_ARCHITECTURE if vllm else SGLANG_ARCHITECTURE],
        "model_type": "llama", "hidden_act": "silu", "num_hidden_layers": 1, "mlp_bias": False,
        "tie_word_embeddings": False, "initializer_range": 0.02, "use_cache": True,
        **{name: getattr(arch, name) for name in SAME_NAMES},
        "vocab_size": arch.target_vocab_size,
        "torch_dtype": dtype, "dtype": dtype,  # the keys of transformers 4 and 5
        **rope_keys(arch),
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": sglang_layer_ids(outputs, target),
            "use_aux_hidden_state": True, "norm_before_fc": arch.norm_before_fc,
        },
        "eagle_aux_hidden_state_layer_ids": [layer + 1 for layer in outputs],
    }
    if arch.trains_embedding:
        config["target_hidden_size"] = arch.target_hidden_size
    if arch.sliding_window:
        config |= {"sliding_window": arch.sliding_window, "layer_types": ["sliding_attention"]}
    if target:
        config |= {"bos_token_id": target.bos_token_id, "eos_token_id": list(target.eos_token_ids) or None}
    return config


def rope_keys(arch: DraftArch) -> dict[str, Any]:
    """Return the rope settings under the keys of transformers 4 and of transformers 5."""
    scaling = None
    if arch.rope_scaling and arch.rope_scaling.rope_type != "default":
        scaling = _scaling_keys(arch.rope_scaling)
    parameters = {**(scaling or {"rope_type": "default"}), "rope_theta": arch.rope_theta}
    return {"rope_theta": arch.rope_theta, "rope_scaling": scaling, "rope_parameters": parameters}


def _scaling_keys(scaling: RopeScaling) -> dict[str, Any]:
    """Return the keys that this kind of scaling uses.

    Engines do not read ``attention_factor``; they multiply their own factor by ``attn_factor``.
    """
    # linear and llama3 have no optional keys; yarn has all keys but two that belong to llama3.
    yarn = RopeScaling.model_fields.keys() - {"low_freq_factor", "high_freq_factor"}
    used = yarn if scaling.rope_type == "yarn" else {"rope_type", *ROPE_NEEDS[scaling.rope_type]}
    keys = {name: value for name, value in scaling if name in used and value is not None}
    if scaling.rope_type == "yarn" and scaling.attention_factor is not None:
        keys["attn_factor"] = scaling.attention_factor / _engine_magnitude(keys)
    return keys


def _engine_magnitude(scaling: Mapping[str, Any]) -> float:
    """Return the factor on cos and sin that engines derive for YaRN, before ``attn_factor``."""

    def magnitude(mscale: float) -> float:
        return 0.1 * mscale * math.log(scaling["factor"]) + 1.0 if scaling["factor"] > 1 else 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return magnitude(scaling["mscale"]) / magnitude(scaling["mscale_all_dim"])
    return magnitude(1.0)


def rope_scaling_of(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Return (theta, scaling) of a draft's config.json; without a theta it is 10000.

    Raises ValueError for a kind of scaling that is not supported.
    """
    theta, scaling = rope_of(dict(config))
    if scaling is None:
        return theta, None
    attn_factor = scaling.pop("attn_factor", None)
    scaling.pop("rope_theta", None)
    if scaling.pop("partial_rotary_factor", 1.0) != 1.0 or config.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial rotary embedding is not supported; the draft must rotate whole heads")
    if attn_factor is not None and scaling.get("attention_factor") is None:
        scaling["attention_factor"] = attn_factor * _engine_magnitude(scaling)
    try:
        return theta, RopeScaling(**scaling)
    except ValueError as error:
        supported = f"linear, llama3 and yarn with the keys {', '.join(RopeScaling.model_fields)}"
        raise ValueError(f"its rope scaling {scaling} is not supported; supported are {supported}") from error


def arch_of_config(config: Mapping[str, Any]) -> DraftArch:
    """Return the architecture that a served config.json describes. Absent keys get the engines' defaults.

    Raises ValueError for a draft with another depth, activation, norm placement or container.
    """
    if "speculators_model_type" in config or "transformer_layer_config" in config:
        raise ValueError("it is in the speculators container; convert it to the plain EAGLE-3 layout first")
    if config.get("num_hidden_layers", 1) != 1:
        raise ValueError(f"it has {config['num_hidden_layers']} decoder layers; EAGLE-3 drafts here have one")
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"its activation is {config['hidden_act']}; only silu is supported")
    for key, meaning in UNSUPPORTED.items():
        if config.get(key):
            raise ValueError(f"{meaning} ({key} is set), which is not supported")
    needed = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    lacking = [key for key in needed if not config.get(key)]
    if lacking:
        raise ValueError(f"its config.json has no {', '.join(lacking)}")
    theta, scaling = rope_scaling_of(config)
    eagle = config.get("eagle_config") or {}
    heads, width = config["num_attention_heads"], config["hidden_size"]
    if not config.get("head_dim") and width % heads:
        wrong = f"its hidden_size {width} is no multiple of its {heads} heads"
        raise ValueError(f"{wrong}, and its config.json gives no head_dim")
    windowed = "sliding_attention" in (config.get("layer_types") or ())
    layer_ids = eagle.get("eagle_aux_hidden_state_layer_ids") or ()
    return DraftArch(
        hidden_size=width, intermediate_size=config["intermediate_size"], num_attention_heads=heads,
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or width // heads,
        draft_vocab_size=config.get("draft_vocab_size") or config["vocab_size"],
        target_hidden_size=config.get("target_hidden_size") or width, target_vocab_size=config["vocab_size"],
        max_position_embeddings=config.get("max_position_embeddings", 2048), rope_theta=theta,
        rope_scaling=scaling, rms_norm_eps=config.get("rms_norm_eps", 1e-6),
        num_aux=config.get("num_aux_hidden_states") or len(layer_ids) or 3,
        sliding_window=config.get("sliding_window") if windowed else None,
        attention_bias=bool(config.get("attention_bias", False)),
        fc_norm=bool(config.get("fc_norm") or config.get("use_aux_norm")),
        norm_output=bool(config.get("norm_output", False)),
        norm_before_fc=bool(eagle.get("norm_before_fc", config.get("norm_before_fc", False))),
    )
