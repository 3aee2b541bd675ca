"""The serving contract: each engine's own rules load every exported draft as it was trained.

`tests/engine_contracts.py` has the rules. The real engines on a GPU: docs/serving.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eagle_ds.drafts.loading import DraftOnDisk
from eagle_ds.drafts.serve_commands import ServeCommands
from eagle_ds.kernels.rope import inverse_frequencies
from eagle_ds.model.arch import DraftArch
from tests.draft_cases import (
    LAYERS,
    ONLY_VLLM,
    PLAIN,
    VARIANTS,
    config_of,
    edit_config,
    edit_tensors,
    exported,
    random_draft,
    target_info,
    variant,
)
from tests.engine_contracts import NOT_READ_BY, Broken, Served, load_sglang, load_vllm, stated_keys

ENGINES = {"sglang": load_sglang, "vllm": load_vllm}
CASES = [("sglang", name) for name in VARIANTS] + [("vllm", name) for name in [*VARIANTS, *ONLY_VLLM]]
LLAMA = {"model_type": "llama", "architecture": "LlamaForCausalLM", "max_position_embeddings": 8192}


def serve(engine: str, folder: Path, **target: Any) -> Served:
    """Load the folder as ``engine`` does when it is started with the printed command."""
    info = target_info(**(LLAMA | target))
    commands = ServeCommands.for_folder("org/target", folder)
    arguments = commands.sglang_arguments if engine == "sglang" else commands.vllm_arguments
    return ENGINES[engine](folder, info, arguments)


def export(tmp_path: Path, draft: DraftOnDisk, **settings: Any) -> Path:
    arch = draft.arch
    target = LLAMA | {"hidden_size": arch.target_hidden_size, "vocab_size": arch.target_vocab_size}
    return exported(tmp_path, draft, **({"info": target_info(**target)} | settings))


def expected_settings(arch: DraftArch) -> dict[str, Any]:
    return {
        "width": arch.hidden_size, "inner": arch.intermediate_size, "eps": arch.rms_norm_eps,
        "target_width": arch.target_hidden_size, "num_aux": arch.num_aux,
        "heads": arch.num_attention_heads, "kv_heads": arch.num_key_value_heads, "head_dim": arch.head_dim,
        "vocab": arch.target_vocab_size, "draft_vocab": arch.draft_vocab_size,
        "norm_before_fc": arch.norm_before_fc, "fc_norm": arch.fc_norm, "norm_output": arch.norm_output,
        "norm_before_residual": arch.norm_before_residual, "qk_norm": arch.qk_norm,
        "window": arch.sliding_window,
    }  # fmt: skip


def engine_name(name: str) -> str:
    """Return the name that both engines' classes have for a tensor of the training model."""
    if name.startswith("head."):
        return {"head.norm_weight": "model.norm.weight", "head.weight": "lm_head.weight"}[name]
    return "model." + name.replace("midlayer.", "layers.0.")


@pytest.mark.parametrize(("engine", "name"), CASES)
def test_an_engine_has_every_tensor_and_setting_as_trained(tmp_path: Path, engine: str, name: str) -> None:
    draft = random_draft(variant(name))
    arch = draft.arch
    folder = export(tmp_path, draft, dtype="float32", vllm=name in ONLY_VLLM)
    served = serve(engine, folder, hidden_size=arch.target_hidden_size)
    assert served.settings == expected_settings(arch)
    assert served.tensors.keys() == {engine_name(key) for key in draft.state}
    for key, tensor in draft.state.items():
        assert torch.equal(served.tensors[engine_name(key)], tensor), key
    assert served.captured == draft.layer_outputs
    assert torch.equal(served.token_ids, draft.vocab.target_ids)
    frequencies, magnitude = inverse_frequencies(arch.head_dim, arch.rope_theta, arch.rope_scaling)
    torch.testing.assert_close(served.frequencies, frequencies, rtol=1e-12, atol=0)
    assert served.magnitude == pytest.approx(magnitude, rel=1e-12)
    assert served.context == (4096 if "yarn" in name else 8192)  # YaRN: factor 4, original length 1024
    assert served.positions >= served.context  # else an engine reads angles that it does not have


@pytest.mark.parametrize(("engine", "name"), CASES)
def test_every_key_of_an_export_is_read_or_known_not_to_be(tmp_path: Path, engine: str, name: str) -> None:
    folder = export(tmp_path, random_draft(variant(name)), vllm=name in ONLY_VLLM)
    read = serve(engine, folder, hidden_size=variant(name).target_hidden_size).keys
    assert stated_keys(folder) - read - NOT_READ_BY[engine].keys() == set()
    assert not read & NOT_READ_BY[engine].keys()


@pytest.mark.parametrize("engine", ENGINES)
def test_the_list_of_keys_that_are_not_read_has_no_stale_entry(tmp_path: Path, engine: str) -> None:
    names = [name for other, name in CASES if other == engine]
    stated = set()
    for index, name in enumerate(names):
        draft = random_draft(variant(name))
        stated |= stated_keys(export(tmp_path / str(index), draft, vllm=name in ONLY_VLLM))
    assert NOT_READ_BY[engine].keys() <= stated


@pytest.mark.parametrize("name", ONLY_VLLM)
def test_sglang_refuses_a_folder_that_only_vllm_can_serve(tmp_path: Path, name: str) -> None:
    folder = export(tmp_path, random_draft(variant(name)), vllm=True)
    with pytest.raises(Broken, match="SGLang has no class"):
        serve("sglang", folder)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("layers", "target"),
    [
        (LAYERS, {}),
        ((0, 3, 6), {}),
        ((0, 2, 7), {"model_type": "gpt_oss", "architecture": "GptOssForCausalLM"}),
        ((1, 2, 7), {"model_type": "gemma3_text", "architecture": "Gemma3ForCausalLM"}),
        ((1, 2, 5), {"model_type": "deepseek_v3", "architecture": "DeepseekV3ForCausalLM"}),
        ((2, 3, 6), {"model_type": "deepseek_v3", "architecture": "DeepseekV3ForCausalLM"}),
        ((2, 3, 6), {"model_type": "glm4_moe_lite", "architecture": "Glm4MoeLiteForCausalLM"}),
        ((2, 3, 6), {"model_type": "glm_moe_dsa", "architecture": "GlmMoeDsaForCausalLM"}),
        ((2, 3, 6), {"model_type": "mistral", "architecture": "MistralLarge3ForCausalLM"}),
    ],
)
def test_the_targets_class_captures_the_trained_layers(
    tmp_path: Path, engine: str, layers: tuple[int, ...], target: dict[str, Any]
) -> None:
    info = target_info(**(LLAMA | target))
    folder = exported(tmp_path, random_draft(layers=layers), layers=layers, info=info)
    assert serve(engine, folder, **target).captured == layers


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("trained", "known", "context"),
    [(512, True, 8192), (8192, True, 8192), (16384, True, 8192), (512, False, 512), (8192, False, 8192)],
)
def test_the_printed_command_starts_whatever_the_trained_length(
    tmp_path: Path, engine: str, trained: int, known: bool, context: int
) -> None:
    """``known``: whether the target's config.json was at hand at export. Its context is 8192."""
    draft = random_draft(dataclasses.replace(PLAIN, trained_length=trained))
    folder = export(tmp_path, draft, **({} if known else {"info": None}))
    assert serve(engine, folder).context == context


# -- what the loaders of this test detect ------------------------------------------


def rename(old: str, new: str) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, lambda tensors: tensors.update({new: tensors.pop(old)}))


DAMAGE = {
    "unknown tensor": (rename("fc.weight", "fusion.weight"), "dropped without a word"),
    "missing tensor": (
        lambda folder: edit_tensors(folder, lambda tensors: tensors.pop("norm.weight")),
        "left at random values",
    ),
    "other shape": (
        lambda folder: edit_tensors(folder, lambda t: t.update({"norm.weight": torch.ones(8)})),
        "has shape",
    ),
    "shorter than the target": (
        lambda folder: edit_config(folder, max_position_embeddings=2048),
        "greater than the derived|the draft serves 2048 tokens",
    ),
    "norm not stated": (lambda folder: edit_config(folder, fc_norm=False), "dropped without a word"),
    "another class": (lambda folder: edit_config(folder, architectures=["Eagle3Other"]), "has no class"),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_the_contract_notices_damage(tmp_path: Path, engine: str, damage: str) -> None:
    folder = export(tmp_path, random_draft(variant("fc_norm")))
    serve(engine, folder)
    change, message = DAMAGE[damage]
    change(folder)
    with pytest.raises(Broken, match=message):
        serve(engine, folder)


def test_the_contract_knows_what_the_first_version_wrote_wrongly(tmp_path: Path) -> None:
    folder = export(tmp_path, random_draft(variant("whole vocabulary")))
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"d2t": torch.zeros(280, dtype=torch.int64)}, folder / "model.safetensors")
    serve("sglang", folder)
    with pytest.raises(Broken, match="no place for d2t"):
        serve("vllm", folder)
    plain = export(tmp_path / "layers", random_draft())
    eagle = config_of(plain)["eagle_config"] | {"eagle_aux_hidden_state_layer_ids": [1, 2, 7]}
    edit_config(plain, eagle_config=eagle)
    with pytest.raises(Broken, match="captures the outputs of layers"):
        serve("sglang", plain)
