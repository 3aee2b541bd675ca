"""The format in which engines serve a draft: tensor names and keys of config.json.

An engine silently drops a tensor that it does not know, and silently uses a default for a key that it does
not find. The draft then proposes noise. So this module writes every value to the place where each engine
looks for it, and refuses to read a draft that has settings it does not understand.

Where engines look:

    layer ids   SGLang: ``eagle_config``, and adds 1 to each. vLLM: the top level, and adds nothing.
    rope        both: ``rope_parameters`` (transformers 5), or ``rope_theta`` and ``rope_scaling`` (4).
    length      both: ``max_position_embeddings``. SGLang refuses a draft that is shorter than its target, so
                this key holds the target's context. The trained length is under ``eagle_ds``, for us alone.

``published_format.py`` reads this format and those of other projects.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from eagle_ds.config.sections import RopeScaling, keys_read_by
from eagle_ds.kernels.rope import yarn_magnitude
from eagle_ds.model.arch import DraftArch
from eagle_ds.model.draft import Eagle3Draft
from eagle_ds.target.info import TargetInfo

SGLANG_ARCHITECTURE = "LlamaForCausalLMEagle3"
VLLM_ARCHITECTURE = "Eagle3LlamaForCausalLM"
VLLM_ARCHITECTURE_QK_NORM = "Eagle3Qwen3ForCausalLM"
# Key of config.json that only this project reads. "trained_length": longest sequence trained on, in tokens.
# "context_length": what the engine must be told with a flag; null: it needs no flag. "tokenizer_hash": of the
# target's tokenizer and chat template; null: not known.
OWN_KEY = "eagle_ds"
EMBEDDING = "embed_tokens.weight"
VOCABULARY = ("d2t", "t2d")
# Training name -> served name
HEAD_NAMES = {"head.norm_weight": "norm.weight", "head.weight": "lm_head.weight"}
# Settings that have the same name in DraftArch and in config.json
SAME_NAMES = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "draft_vocab_size", "rms_norm_eps", "attention_bias", "fc_norm", "norm_output",
    "norm_before_fc", "norm_before_residual",
)

# SGLang adds 1 to the ids, because it captures the inputs of layers: the output of layer i is the input of
# layer i + 1. Its DeepSeek class adds 1 only to lists that begin with 1, and uses any other list as it is.
# These are the targets, by model_type or by class, that it serves with that class or a copy of it.
DEEPSEEK_CLASS = {
    "deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "kimi_k25", "glm4_moe_lite", "glm_moe_dsa",
    "MistralLarge3ForCausalLM",
}
# SGLang's classes that can capture the output of the last layer. Most others drop it without a word.
CAPTURES_LAST_LAYER = {"gpt_oss", "gemma3_text", "gemma4_text"}


def served_name(name: str) -> str:
    """Return the name that engines know for a tensor's training name."""
    return HEAD_NAMES.get(name, name)


def tensor_shapes(arch: DraftArch) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of this architecture by training name, without a frozen embedding."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in Eagle3Draft(arch).named_parameters()}


def is_deepseek_class(target: TargetInfo | None) -> bool:
    """Whether SGLang serves this target with its DeepSeek class, or with a copy of it."""
    return target is not None and bool({target.model_type, target.architecture} & DEEPSEEK_CLASS)


def sglang_layer_ids(outputs: Sequence[int], target: TargetInfo | None) -> list[int]:
    """Return the ids from which SGLang's class for this target reads the layer outputs ``outputs``."""
    used_as_they_are = is_deepseek_class(target) and outputs[0] != 1
    return [layer + 1 for layer in outputs] if used_as_they_are else list(outputs)


def layer_outputs(ids: Sequence[int], target: TargetInfo | None) -> tuple[int, ...]:
    """Return the layer outputs that SGLang reads for ``ids``: the inverse of ``sglang_layer_ids``.

    Published drafts of gpt_oss may name inputs of layers instead; then their largest id is num_layers.
    """
    are_inputs = target and (
        (is_deepseek_class(target) and ids[0] != 1)
        or (target.model_type == "gpt_oss" and max(ids) == target.num_layers)
    )
    return tuple(layer - 1 for layer in ids) if are_inputs else tuple(ids)


def sglang_obstacles(arch: DraftArch, outputs: Sequence[int], target: TargetInfo | None) -> list[str]:
    """Return the reasons for which SGLang cannot serve a draft that reads the layer outputs ``outputs``.

    SGLang reports none of them: the server starts, and the draft proposes noise.
    """
    reasons = []
    if arch.attention_bias:
        reasons.append("SGLang drops attention biases (draft.attention_bias)")
    if arch.norm_before_residual:
        reasons.append("SGLang starts the residual before its norm (draft.norm_before_residual)")
    if arch.qk_norm:
        reasons.append("SGLang has no EAGLE-3 class that norms q and k (draft.qk_norm)")
    if arch.num_aux * arch.target_hidden_size == arch.hidden_size:
        reasons.append("SGLang skips fc where its input is as wide as the draft")
    if target and max(outputs) == target.num_layers - 1 and target.model_type not in CAPTURES_LAST_LAYER:
        reasons.append(f"SGLang cannot capture the output of the last layer ({max(outputs)}) of this target")
    if is_deepseek_class(target) and outputs[0] == 0:
        reasons.append("SGLang's DeepSeek class has no ids that select the output of layer 0")
    return reasons


def served_config(
    arch: DraftArch, outputs: Sequence[int], target: TargetInfo | None, dtype: str, vllm: bool
) -> dict[str, Any]:
    """Return the config.json of a draft that reads the target's layer outputs ``outputs``.

    Args:
        target: gives the token ids and the model class; None leaves the token ids out.
        dtype: type of the weights in the file.
        vllm: write the name of vLLM's class, which SGLang does not know.
    """
    architecture = SGLANG_ARCHITECTURE
    if vllm:
        architecture = VLLM_ARCHITECTURE_QK_NORM if arch.qk_norm else VLLM_ARCHITECTURE
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": "qwen3" if arch.qk_norm else "llama",
        "hidden_act": "silu", "num_hidden_layers": 1, "mlp_bias": False,
        "tie_word_embeddings": False, "initializer_range": 0.02, "use_cache": True,
        **{name: getattr(arch, name) for name in SAME_NAMES},
        "vocab_size": arch.target_vocab_size,
        "torch_dtype": dtype, "dtype": dtype,  # the keys of transformers 4 and 5
        **rope_keys(arch),
        **length_keys(arch, target),
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
        if arch.qk_norm:
            config["use_sliding_window"] = True  # without it, Qwen3's configuration drops the window
    if target:
        config |= {"bos_token_id": target.bos_token_id, "eos_token_id": list(target.eos_token_ids) or None}
    return config


def length_keys(arch: DraftArch, target: TargetInfo | None) -> dict[str, Any]:
    """Return the context length that engines read, and under ``eagle_ds`` what they do not.

    An engine allows the draft as many positions as the target serves. YaRN is the exception: engines compute
    its angles only up to original length * factor, so such a draft cannot be served beyond.
    """
    context = target.longest_context if target else 0
    length = max(arch.trained_length, context)
    if arch.rope_scaling and arch.rope_scaling.rope_type == "yarn":
        original = arch.rope_scaling.original_max_position_embeddings
        assert original is not None, "RopeScaling requires it"
        length = min(length, int(original * arch.rope_scaling.factor))
    own = {
        "trained_length": arch.trained_length,
        "context_length": None if context and length >= context else length,
    }
    return {"max_position_embeddings": length, OWN_KEY: own}


def rope_keys(arch: DraftArch) -> dict[str, Any]:
    """Return the rope settings under the keys of transformers 4 and of transformers 5."""
    scaling = None
    if arch.rope_scaling and arch.rope_scaling.rope_type != "default":
        scaling = _scaling_keys(arch.rope_scaling)
    parameters = {**(scaling or {"rope_type": "default"}), "rope_theta": arch.rope_theta}
    return {"rope_theta": arch.rope_theta, "rope_scaling": scaling, "rope_parameters": parameters}


def _scaling_keys(scaling: RopeScaling) -> dict[str, Any]:
    """Return the keys that this kind of scaling uses.

    vLLM reads ``attention_factor``. SGLang does not; it multiplies its own factor by ``attn_factor``.
    """
    read = keys_read_by(scaling.rope_type)
    keys = {name: value for name, value in scaling if name in read and value is not None}
    if scaling.rope_type == "yarn" and scaling.attention_factor is not None:
        derived = yarn_magnitude(scaling.factor, scaling.mscale, scaling.mscale_all_dim)
        keys["attn_factor"] = scaling.attention_factor / derived
    return keys
