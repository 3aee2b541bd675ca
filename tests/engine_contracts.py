"""What SGLang and vLLM make of a draft folder, without either: their rules for names, keys and lengths.

Written from the sources of SGLang 0.5.17 (models/llama_eagle3.py, configs/model_config.py,
layers/rotary_embedding, the target classes' ``set_eagle3_layers_to_capture``) and vLLM 0.33.0
(models/llama_eagle3.py and qwen3_eagle3.py, config/speculative.py, config/model.py). SGLang 0.5.23 has the
same rules. Where an engine drops, ignores or guesses without a word, the loaders here raise `Broken`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from eagle_ds.target.info import TargetInfo


class Broken(AssertionError):
    """The engine would not serve the draft as it was trained."""


@dataclass
class Served:
    """A draft as an engine has it after loading.

    Attributes:
        tensors: by the engine's names; parts of a fused projection have their own names.
        settings: what the engine's class was built with.
        frequencies: RoPE's, float64 [d/2], and ``magnitude``, the factor on cos and sin.
        positions: number of positions for which the engine has angles.
        captured: outputs of target layers that the engine feeds to the draft.
        token_ids: target ids of the draft's tokens, int64 [Vd].
        context: longest context that the engine serves.
        keys: keys of config.json that the engine read.
    """

    tensors: dict[str, Tensor]
    settings: dict[str, Any]
    frequencies: Tensor
    magnitude: float
    positions: int
    captured: tuple[int, ...]
    token_ids: Tensor
    context: int
    keys: set[str]


class Config:
    """A config.json as transformers gives it to an engine. Records the keys that are read."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoConfig

        self._found = AutoConfig.from_pretrained(folder)
        self.keys: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value; ``a.b`` reads b of the nested object a, which the engine finds as a dictionary."""
        self.keys.add(key)
        outer, _, inner = key.partition(".")
        value = getattr(self._found, outer, None)
        if inner:
            value = (value or {}).get(inner)
        return default if value is None else value

    def __getitem__(self, key: str) -> Any:
        if (value := self.get(key)) is None:
            raise Broken(f"config.json has no {key}")
        return value


def stated_keys(folder: Path) -> set[str]:
    """Return every key of a config.json. Keys of nested objects are named ``outer.inner``.

    Keys inside ``rope_scaling`` are left out: they repeat ``rope_parameters`` for transformers 4.
    """
    config = json.loads((folder / "config.json").read_text())
    config["rope_scaling"] = None
    nested = {f"{a}.{b}" for a, value in config.items() if isinstance(value, dict) for b in value}
    return nested | {key for key, value in config.items() if not isinstance(value, dict)}


# Keys that no engine reads, each with the reason why it is written.
NOT_READ = {
    "torch_dtype": "transformers 4 writes it; engines use the target's type",
    "dtype": "engines use the target's type",
    "rope_theta": "for transformers 4; 5 gives rope_parameters to the engine",
    "rope_scaling": "for transformers 4; 5 gives rope_parameters to the engine",
    "initializer_range": "for training",
    "use_cache": "for transformers' generate",
    "bos_token_id": "engines use the target's",
    "eos_token_id": "engines use the target's",
    "eagle_ds.trained_length": "for our loaders and reports",
    "eagle_ds.context_length": "for the serving commands",
    "eagle_ds.tokenizer_hash": "for tools/serve_draft.py",
}
NOT_READ_BY = {
    "sglang": NOT_READ | {
        "mlp_bias": "its MLP has no biases",
        "norm_before_residual": "its residual is the state before the norm; refused at export unless false",
        "eagle_aux_hidden_state_layer_ids": "it reads eagle_config",
        "layer_types": "the window is a flag of the command",
        "sliding_window": "the window is a flag of the command",
        "rope_parameters.attention_factor": "it reads attn_factor",
    },
    "vllm": NOT_READ | {
        "tie_word_embeddings": "the draft has its own lm_head",
        "eagle_config.eagle_aux_hidden_state_layer_ids": "it reads the top level",
        "rope_parameters.attn_factor": "it reads attention_factor",
        "use_sliding_window": "read by transformers' Qwen3Config",
    },
}  # fmt: skip


def load_sglang(folder: Path, target: TargetInfo, flags: list[str]) -> Served:
    """Load a draft as SGLang does, started with ``flags``."""
    config = Config(folder)
    if config["architectures"] != ["LlamaForCausalLMEagle3"]:
        raise Broken(f"SGLang has no class {config['architectures']}")
    if config.get("attention_bias", False) or config.get("bias", False):
        raise Broken("SGLang drops the biases of q, k and v")
    ids = config["eagle_config.eagle_aux_hidden_state_layer_ids"]
    num_aux = config.get("num_aux_hidden_states") or len(ids)
    own_embedding = config.get("target_hidden_size", config["hidden_size"]) != config["hidden_size"]
    settings = _settings(config, num_aux) | {"norm_before_residual": False, "qk_norm": False}
    settings["window"] = _flag(flags, "--speculative-draft-window-size")
    if settings["window"] is not None:
        settings["window"] += 1  # a row sees itself and keys up to that distance
    if config["tie_word_embeddings"] is not False:
        raise Broken("SGLang would use the embedding as lm_head")
    if num_aux * settings["target_width"] == config["hidden_size"]:
        raise Broken("SGLang skips fc where its input is as wide as the draft")
    stored = load_file(folder / "model.safetensors")
    d2t = stored.pop("d2t", None)
    stored.pop("t2d", None)
    names = {name: _sglang_name(name) for name in stored}
    tensors = _place(stored, names, _expected(settings, bias=False), own_embedding)
    frequencies, magnitude, positions = _rope(config, settings["head_dim"], vllm=False)
    return Served(
        tensors, settings, frequencies, magnitude, positions, _captured_by_sglang(ids, target),
        _token_ids(d2t, settings["draft_vocab"]), _sglang_context(config, target, flags), config.keys,
    )  # fmt: skip


def load_vllm(folder: Path, target: TargetInfo, flags: list[str]) -> Served:
    """Load a draft as vLLM does, started with ``flags``."""
    config = Config(folder)
    (name,) = config["architectures"]
    if name not in ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "Eagle3Qwen3ForCausalLM"):
        raise Broken(f"vLLM has no class {name}")
    qk_norm = name == "Eagle3Qwen3ForCausalLM"
    if qk_norm != (config["model_type"] == "qwen3"):
        raise Broken(f"{name} with the configuration of {config['model_type']}")
    ids = config["eagle_aux_hidden_state_layer_ids"]
    # The Llama class counts the ids of the nested list. It takes the layers from the top level.
    nested = config._found.eagle_config["eagle_aux_hidden_state_layer_ids"]
    num_aux = config.get("num_aux_hidden_states") or len(ids if qk_norm else nested)
    bias = config.get("attention_bias", False)
    if bias and qk_norm:
        raise Broken("vLLM's Qwen3 class has no bias on o_proj")
    if config.get("mlp_bias", False):
        raise Broken("vLLM's MLP would have biases")
    own_embedding = config.get("target_hidden_size", config["hidden_size"]) != config["hidden_size"]
    settings = _settings(config, num_aux) | {"qk_norm": qk_norm}
    settings["norm_before_residual"] = config.get("norm_before_residual", False)
    windowed = "sliding_attention" in config.get("layer_types", ())
    settings["window"] = config["sliding_window"] if windowed else None
    stored = load_file(folder / "model.safetensors")
    stored.pop("t2d", None)
    d2t = stored.pop("d2t", None)
    if d2t is not None and settings["draft_vocab"] == target.vocab_size:
        raise Broken("vLLM has no place for d2t where the vocabularies have the same size")
    if d2t is None and settings["draft_vocab"] != target.vocab_size:
        raise Broken("vLLM would map draft tokens to themselves")
    renamed = {name: name.replace("midlayer.", "layers.0.") for name in stored}
    names = {name: new if "lm_head" in name else f"model.{new}" for name, new in renamed.items()}
    tensors = _place(stored, names, _expected(settings, bias=bias), own_embedding)
    frequencies, magnitude, positions = _rope(config, settings["head_dim"], vllm=True)
    captured = tuple(index - 1 for index in sorted(set(ids)) if 0 <= index <= target.num_layers)
    return Served(
        tensors, settings, frequencies, magnitude, positions, captured,
        _token_ids(d2t, settings["draft_vocab"]), _vllm_context(config, target, flags), config.keys,
    )  # fmt: skip


def _settings(config: Config, num_aux: int) -> dict[str, Any]:
    """Read what both engines read alike."""
    if config["num_hidden_layers"] != 1 or config["hidden_act"] != "silu":
        raise Broken("both engines would build another layer")
    if config.get("eagle_config.use_aux_hidden_state", True) is not True:
        raise Broken("both engines would give the draft one state of the target")
    if config["model_type"] not in ("llama", "qwen3"):
        raise Broken("SGLang reads another width of the MLP for llama4_text")
    width = config["hidden_size"]
    # The top level is the default of the nested key, so both are read.
    before, outer = config.get("eagle_config.norm_before_fc"), config.get("norm_before_fc", False)
    return {
        "width": width, "inner": config["intermediate_size"], "eps": config["rms_norm_eps"],
        "target_width": config.get("target_hidden_size", width), "num_aux": num_aux,
        "heads": config["num_attention_heads"], "kv_heads": config["num_key_value_heads"],
        "head_dim": config["head_dim"], "vocab": config["vocab_size"],
        "draft_vocab": config["draft_vocab_size"],
        "norm_before_fc": outer if before is None else before,
        "fc_norm": config.get("fc_norm", False), "norm_output": config.get("norm_output", False),
    }  # fmt: skip


def _expected(s: dict[str, Any], *, bias: bool) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every parameter of the engines' classes, with parts of fused ones apart."""
    layer, width = "model.layers.0", s["width"]
    q, kv = s["heads"] * s["head_dim"], s["kv_heads"] * s["head_dim"]
    fused = s["num_aux"] * s["target_width"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (s["vocab"], width), "model.fc.weight": (width, fused),
        "model.norm.weight": (width,), "lm_head.weight": (s["draft_vocab"], width),
    }  # fmt: skip
    for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm"):
        shapes[f"{layer}.{name}.weight"] = (width,)
    for name, rows in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
        shapes[f"{layer}.self_attn.{name}.weight"] = (rows, 2 * width)
        if bias:
            shapes[f"{layer}.self_attn.{name}.bias"] = (rows,)
    shapes[f"{layer}.self_attn.o_proj.weight"] = (width, q)
    if bias:
        shapes[f"{layer}.self_attn.o_proj.bias"] = (width,)
    for name in ("gate_proj", "up_proj"):
        shapes[f"{layer}.mlp.{name}.weight"] = (s["inner"], width)
    shapes[f"{layer}.mlp.down_proj.weight"] = (width, s["inner"])
    if s["qk_norm"]:
        shapes |= {f"{layer}.self_attn.{name}_norm.weight": (s["head_dim"],) for name in "qk"}
    if s["norm_before_fc"]:
        shapes["model.input_norm.weight"] = (fused,)
    if s["fc_norm"]:
        shapes |= {f"model.fc_norm.{i}.weight": (s["target_width"],) for i in range(s["num_aux"])}
    return shapes


def _sglang_name(name: str) -> str:
    """Rename as ``load_weights`` does: older names first, then ``model.`` in front where it is needed."""
    for old, new in (
        ("midlayer", "layers.0"), ("aux_norm_low", "fc_norm.0"), ("aux_norm_mid", "fc_norm.1"),
        ("aux_norm_high", "fc_norm.2"),
    ):  # fmt: skip
        name = name.replace(old, new)
    return name if name.startswith("lm_head.") else f"model.{name}"


def _place(
    stored: dict[str, Tensor], names: dict[str, str], shapes: dict[str, tuple[int, ...]], own_embedding: bool
) -> dict[str, Tensor]:
    """Return the tensors by the engine's names. Every one must have its place, and every place a tensor."""
    tensors = {names[name]: tensor for name, tensor in stored.items()}
    if unknown := tensors.keys() - shapes.keys():
        raise Broken(f"dropped without a word: {sorted(unknown)}")
    shared = set() if own_embedding else {"model.embed_tokens.weight"}
    if missing := shapes.keys() - tensors.keys() - shared:
        raise Broken(f"left at random values: {sorted(missing)}")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[name]:
            raise Broken(f"{name} has shape {tuple(tensor.shape)}, the engine has {shapes[name]}")
    return tensors


def _token_ids(d2t: Tensor | None, count: int) -> Tensor:
    """Return the target id of every draft token; without d2t draft ids are target ids."""
    return torch.arange(count) + (0 if d2t is None else d2t)


def _rope(config: Config, d: int, *, vllm: bool) -> tuple[Tensor, float, int]:
    """Return (frequencies, magnitude, positions with angles) of the engine's rotary embedding."""
    theta, kind = config["rope_parameters.rope_theta"], config["rope_parameters.rope_type"]
    length = config["max_position_embeddings"]
    plain = 1.0 / theta ** (torch.arange(0, d, 2, dtype=torch.float64) / d)
    if kind == "default":
        return plain, 1.0, length
    factor = config["rope_parameters.factor"]
    if kind == "linear":
        return plain / factor, 1.0, int(length * factor)
    original = config["rope_parameters.original_max_position_embeddings"]
    if kind == "llama3":
        low, high = (config[f"rope_parameters.{name}_freq_factor"] for name in ("low", "high"))
        waves = 2 * math.pi / plain
        smooth = (original / waves - low) / (high - low)
        mixed = (1 - smooth) * plain / factor + smooth * plain
        scaled = torch.where(waves > original / low, plain / factor, mixed)
        return torch.where(waves < original / high, plain, scaled), 1.0, length
    assert kind == "yarn", f"no engine's rule for RoPE of kind {kind} is here yet"
    fast, slow = config["rope_parameters.beta_fast"], config["rope_parameters.beta_slow"]
    ends = [d * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (fast, slow)]
    if config.get("rope_parameters.truncate", True):
        ends = [math.floor(ends[0]), math.ceil(ends[1])]
    first, last = max(ends[0], 0), min(ends[1], d - 1)
    ramp = ((torch.arange(d // 2, dtype=torch.float64) - first) / max(last - first, 0.001)).clamp(0, 1)
    frequencies = plain / factor * ramp + plain * (1 - ramp)
    return frequencies, _yarn_magnitude(config, factor, vllm=vllm), int(original * factor)


def _yarn_magnitude(config: Config, factor: float, *, vllm: bool) -> float:
    def of(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    given = config.get("rope_parameters.attention_factor") if vllm else None
    if given is not None:
        return given
    above, below = config.get("rope_parameters.mscale"), config.get("rope_parameters.mscale_all_dim")
    magnitude = of(above) / of(below) if above is not None and below is not None else of(1.0)
    return magnitude if vllm else magnitude * config.get("rope_parameters.attn_factor", 1.0)


def _captured_by_sglang(ids: list[int], target: TargetInfo) -> tuple[int, ...]:
    """Return the layer outputs that SGLang's class of the target captures for ``ids``."""
    deepseek = {
        "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "DeepseekV32ForCausalLM", "Glm4MoeLiteForCausalLM",
        "GlmMoeDsaForCausalLM", "MistralLarge3ForCausalLM",
    }  # fmt: skip
    inputs = [index + 1 for index in ids]
    if target.architecture in deepseek and ids[0] != 1:
        inputs = list(ids)
    after_the_last = target.architecture in {"GptOssForCausalLM", "Gemma3ForCausalLM", "Gemma4ForCausalLM"}
    if target.architecture == "GptOssForCausalLM" and max(ids) == target.num_layers:
        inputs = list(ids)
    reached = range(target.num_layers + 1 if after_the_last else target.num_layers)
    captured = tuple(index - 1 for index in reached if index in inputs)
    if len(captured) != len(ids):
        raise Broken(f"SGLang captures the outputs of layers {captured} for the ids {ids}")
    return captured


def _flag(flags: list[str], name: str) -> int | None:
    return int(flags[flags.index(name) + 1]) if name in flags else None


def _sglang_context(config: Config, target: TargetInfo, flags: list[str]) -> int:
    """Return the context that SGLang serves. It refuses a draft that is shorter."""
    asked = _flag(flags, "--context-length")
    if asked is not None and target.max_position_embeddings and asked > target.longest_context:
        raise Broken(f"User-specified context_length {asked} is greater than the derived one")
    context = asked or target.longest_context
    kind = config["rope_parameters.rope_type"]
    factor = config.get("rope_parameters.factor", 1)
    if kind == "llama3" or config.get("rope_parameters.original_max_position_embeddings") is not None:
        factor = 1
    derived = int(factor * config["max_position_embeddings"])
    if context > derived:
        raise Broken(f"Target model's context_length {context} is greater than the derived one {derived}")
    return context


def _vllm_context(config: Config, target: TargetInfo, flags: list[str]) -> int:
    """Return the context that vLLM serves, without silence or warnings for lack of the draft's positions."""
    context = _flag(flags, "--max-model-len") or target.longest_context
    kind, draft = config["rope_parameters.rope_type"], config["max_position_embeddings"]
    if kind == "linear":
        draft = int(draft * config["rope_parameters.factor"])
    if draft < context:
        runner = "V2 lowers the target's length" if kind == "yarn" else "V1 stops drafting"
        raise Broken(f"the draft serves {draft} tokens and the target {context}: {runner}")
    return context
