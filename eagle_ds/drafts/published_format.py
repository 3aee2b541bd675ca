"""Read the config.json and the tensor names of EAGLE-3 drafts: our own exports and those of other projects.

A setting that this project does not have is refused, with the reason. A draft that is read wrongly would
propose noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eagle_ds.config.sections import ROPE_NEEDS, RopeScaling
from eagle_ds.drafts.serving_format import (
    HEAD_NAMES,
    OWN_KEY,
    VLLM_ARCHITECTURE,
    VLLM_ARCHITECTURE_QK_NORM,
)
from eagle_ds.kernels.rope import yarn_magnitude
from eagle_ds.model.arch import DraftArch
from eagle_ds.target.info import rope_of

ALIASES = {  # names in published drafts -> ours
    "layers.0.": "midlayer.",
    "aux_norm_low.": "fc_norm.0.", "aux_norm_mid.": "fc_norm.1.", "aux_norm_high.": "fc_norm.2.",
}
UNSUPPORTED = {  # key of config.json -> what it means if it is set
    "mlp_bias": "the MLP has biases", "bias": "fc has a bias",
    "embed_requires_grad": "its embedding was trained, but engines share the target's",
}
# Layers in speculators' container -> the class of vLLM that serves such a draft; Qwen3's norms q and k
LAYER_KINDS = {"llama": VLLM_ARCHITECTURE, "qwen3": VLLM_ARCHITECTURE_QK_NORM}
# Settings that speculators' container has at its top level. The others describe the layer.
CONTAINER_KEYS = (
    "draft_vocab_size", "target_hidden_size", "norm_before_residual", "norm_before_fc", "fc_norm",
    "norm_output", "eagle_aux_hidden_state_layer_ids", "embed_requires_grad",
)
# Copies of the target's tensors that some drafts of speculators hold
COPIES = ("verifier_lm_head.weight", "verifier_norm.weight")


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json without its container: speculators', or the one that vLLM saves.

    Raises ValueError for a container of another method, or one that leaves open what it means.
    """
    if config.get("model_type") == "eagle" and isinstance(config.get("model"), Mapping):
        return {**config["model"], **{key: value for key, value in config.items() if key != "model"}}
    if "speculators_model_type" not in config and "transformer_layer_config" not in config:
        return dict(config)
    if (method := config.get("speculators_model_type")) != "eagle3":
        raise ValueError(f"it is a draft for {method} in speculators' container; only eagle3 is supported")
    layer = config.get("transformer_layer_config")
    if not isinstance(layer, Mapping) or (kind := layer.get("model_type", "llama")) not in LAYER_KINDS:
        known = " or ".join(LAYER_KINDS)
        raise ValueError(f"its transformer_layer_config describes no {known} layer")
    if "norm_before_residual" not in config:
        raise ValueError(
            "its config.json has no norm_before_residual, which speculators and vLLM read differently; write "
            "the trained value into it"
        )
    given = {key: config[key] for key in CONTAINER_KEYS if config.get(key) is not None}
    return {**_with_defaults(kind, layer), **given, "architectures": [LAYER_KINDS[kind]]}


def _with_defaults(kind: str, layer: Mapping[str, Any]) -> dict[str, Any]:
    """Add transformers' defaults to a layer's settings: speculators leaves them out of its config.json."""
    from transformers import AutoConfig

    settings = {key: value for key, value in layer.items() if key != "model_type"}
    return AutoConfig.for_model(kind, **settings).to_dict()


def training_name(name: str) -> str:
    """Return the training name of a tensor in a served or published draft.

    Unknown names are returned unchanged.
    """
    name = name.removeprefix("model.")
    for old, new in ALIASES.items():
        if name.startswith(old):
            name = new + name.removeprefix(old)
    return {served: training for training, served in HEAD_NAMES.items()}.get(name, name)


def rope_scaling_of(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Return (theta, scaling) of a draft's config.json; without a theta it is 10000.

    Keys that belong to other kinds of scaling are ignored, as engines ignore them.

    Raises ValueError for a kind of scaling, or a key, that is not supported.
    """
    theta, scaling = rope_of(dict(config))
    if scaling is None:
        return theta, None
    kind = scaling.get("rope_type", "default")
    if lacking := [key for key in ROPE_NEEDS.get(str(kind), ()) if scaling.get(key) is None]:
        wrong = f"its {kind} rope scaling has no {', '.join(lacking)}"
        raise ValueError(f"{wrong}; engines would guess it, so write the trained value into its config.json")
    attn_factor = scaling.pop("attn_factor", None)
    scaling.pop("rope_theta", None)
    if scaling.pop("partial_rotary_factor", 1.0) != 1.0 or config.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial rotary embedding is not supported; the draft must rotate whole heads")
    if attn_factor is not None and scaling.get("attention_factor") is None and "factor" in scaling:
        settings = (scaling.get(name) for name in ("factor", "mscale", "mscale_all_dim"))
        scaling["attention_factor"] = attn_factor * yarn_magnitude(*settings)
    try:
        return theta, RopeScaling.of_model(scaling)
    except ValueError as error:
        kinds = ", ".join(kind for kind in ROPE_NEEDS if kind != "default")
        supported = f"{kinds} with the keys {', '.join(RopeScaling.model_fields)}"
        raise ValueError(f"its rope scaling {scaling} is not supported; supported are {supported}") from error


def trained_length_of(config: Mapping[str, Any]) -> int:
    """Return the length that a draft was trained on: ours states it, others state it as their context."""
    own = config.get(OWN_KEY) or {}
    return own.get("trained_length") or config.get("max_position_embeddings", 2048)


def arch_of_config(config: Mapping[str, Any]) -> DraftArch:
    """Return the architecture that a config.json describes (see ``plain_config``).

    Absent keys get the engines' defaults.

    Raises ValueError for a draft with another depth, activation, norm placement or container.
    """
    eagle = config.get("eagle_config") or {}
    if not eagle.get("use_aux_hidden_state", config.get("use_aux_hidden_state", True)):
        raise ValueError(
            "it reads the target's last hidden state, not the outputs of several layers "
            "(use_aux_hidden_state is false); only drafts that read several are supported"
        )
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
    heads, width = config["num_attention_heads"], config["hidden_size"]
    if not config.get("head_dim") and width % heads:
        wrong = f"its hidden_size {width} is no multiple of its {heads} heads"
        raise ValueError(f"{wrong}, and its config.json gives no head_dim")
    windowed = "sliding_attention" in (config.get("layer_types") or ())
    ids = "eagle_aux_hidden_state_layer_ids"
    layer_ids = eagle.get(ids) or config.get(ids) or ()
    return DraftArch(
        hidden_size=width, intermediate_size=config["intermediate_size"], num_attention_heads=heads,
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or width // heads,
        draft_vocab_size=_draft_vocab_size(config),
        target_hidden_size=config.get("target_hidden_size") or width, target_vocab_size=config["vocab_size"],
        trained_length=trained_length_of(config), rope_theta=theta,
        rope_scaling=scaling, rms_norm_eps=config.get("rms_norm_eps", 1e-6),
        num_aux=config.get("num_aux_hidden_states") or len(layer_ids) or 3,
        sliding_window=config.get("sliding_window") if windowed else None,
        attention_bias=bool(config.get("attention_bias", False)),
        fc_norm=bool(config.get("fc_norm") or config.get("use_aux_norm")),
        norm_output=bool(config.get("norm_output", False)),
        norm_before_fc=bool(eagle.get("norm_before_fc", config.get("norm_before_fc", False))),
        norm_before_residual=bool(config.get("norm_before_residual", False)),
        qk_norm=any("Qwen3ForCausalLM" in name for name in config.get("architectures") or ()),
    )


def _draft_vocab_size(config: Mapping[str, Any]) -> int:
    """Return the size of the draft vocabulary. ``truncated_vocab_size`` is an older name of it."""
    size, older = config.get("draft_vocab_size"), config.get("truncated_vocab_size")
    if size and older and older not in (size, config["vocab_size"]):
        both = f"draft_vocab_size {size}, truncated_vocab_size {older}"
        raise ValueError(f"it states two draft vocabularies: {both}; remove the wrong one")
    return size or older or config["vocab_size"]
