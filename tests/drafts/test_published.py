"""Drafts to start from: our exports and those of other projects are read as their engines read them."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eagle_ds.config.run_folder import ARCH_FILE
from eagle_ds.drafts.export import export_draft, verify_export
from eagle_ds.drafts.loading import DraftOnDisk, initial_draft, load_draft, load_served_draft
from eagle_ds.drafts.serve_commands import ServeCommands
from tests.draft_cases import (
    LLAMA3,
    PLAIN,
    SETTINGS,
    YARN,
    config_of,
    exported,
    random_draft,
    recipe_for,
    target_info,
    variant,
    write_run,
)


def test_training_starts_from_our_export_with_its_own_tensors_norms_and_rope(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    draft = random_draft(variant("llama3 rope"))
    folder = exported(tmp_path, draft, dtype="float32")
    recipe = recipe_for(PLAIN, tmp_path, init_from=str(folder))
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_length": 131072})})
    with caplog.at_level(logging.INFO):
        start = initial_draft(recipe)
    assert (start.arch.rope_theta, start.arch.rope_scaling) == (500000.0, LLAMA3)
    assert start.arch.trained_length == 131072
    assert "rope_theta is 500000.0" in caplog.text
    assert all(torch.equal(start.state[name], tensor) for name, tensor in draft.state.items())
    assert torch.equal(start.vocab.d2t, draft.vocab.d2t)


def test_rope_is_overridden_only_on_request_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = exported(tmp_path)
    recipe = recipe_for(variant("llama3 rope"), tmp_path, init_from=str(folder), override_rope=True)
    with caplog.at_level(logging.INFO):
        start = initial_draft(recipe)
    assert (start.arch.rope_theta, start.arch.rope_scaling) == (500000.0, LLAMA3)
    assert "in place of the draft's own (theta 10000" in caplog.text
    folder = export_draft(
        start, tmp_path / "again", dataclasses.replace(SETTINGS, layers=start.layer_outputs)
    )
    assert config_of(folder)["rope_parameters"]["rope_type"] == "llama3"


def published(folder: Path, draft: DraftOnDisk, **config: Any) -> Path:
    """Write a draft as other projects publish it: a pickle of tensors, older names, no rope base, no
    head_dim, an unused embedding.
    """
    folder.mkdir()
    tensors = load_file(exported(folder, draft, dtype="float16") / "model.safetensors")
    kept = {
        name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items() if name != "t2d"
    }
    torch.save(kept | {"embed_tokens.weight": torch.randn(280, 32)}, folder / "pytorch_model.bin")
    kept_keys = (
        "architectures",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    )
    kept_keys += ("draft_vocab_size", "rms_norm_eps", "num_hidden_layers", "hidden_act")
    stated = {key: config_of(folder / "draft")[key] for key in kept_keys} | {"max_position_embeddings": 2048}
    (folder / "config.json").write_text(json.dumps(stated | config))
    return folder


def test_a_published_draft_is_read_with_the_engines_defaults(tmp_path: Path) -> None:
    draft = random_draft(dataclasses.replace(PLAIN, head_dim=8))
    found = load_served_draft(published(tmp_path / "p", draft))
    arch = found.arch
    assert (arch.rope_theta, arch.rope_scaling, arch.head_dim, arch.trained_length) == (
        10000.0,
        None,
        8,
        2048,
    )
    assert torch.equal(found.vocab.t2d, draft.vocab.t2d)
    assert all(torch.equal(found.state[name], tensor.half().float()) for name, tensor in draft.state.items())
    start = initial_draft(recipe_for(draft.arch, tmp_path, init_from=str(tmp_path / "p")))
    assert start.arch.trained_length == 4096 and start.layer_outputs is None


def test_keys_of_other_kinds_of_rope_scaling_are_ignored_in_files_that_exist(tmp_path: Path) -> None:
    arch = dataclasses.replace(variant("linear rope"), head_dim=8, trained_length=2048)
    extra = {"beta_fast": 16.0, "original_max_position_embeddings": 1024, "low_freq_factor": 1.0}
    keys = {"rope_type": "linear", "factor": 4.0, **extra}
    assert load_draft(published(tmp_path / "p", random_draft(arch), rope_scaling=keys)).arch == arch
    run = write_run(tmp_path, random_draft(arch), recipe_for(arch, tmp_path))
    tree = json.loads((run / ARCH_FILE).read_text())
    (run / ARCH_FILE).write_text(json.dumps(tree | {"rope_scaling": tree["rope_scaling"] | extra}))
    assert load_draft(run).arch == arch


class Evil:
    """A pickle of this runs a command when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch harmed",)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_hidden_layers": 2}, "2 decoder layers"),
        ({"speculators_model_type": "eagle3"}, "describes no llama or qwen3 layer"),
        ({"speculators_model_type": "peagle"}, "a draft for peagle"),
        (
            {"speculators_model_type": "eagle3", "transformer_layer_config": {"model_type": "llama"}},
            "has no norm_before_residual",
        ),
        ({"embed_requires_grad": True}, "its embedding was trained"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state is false"),
        ({"truncated_vocab_size": 90}, "two draft vocabularies"),
        ({"architectures": ["Eagle3Qwen3ForCausalLM"]}, "lacks the tensors midlayer.self_attn.k_norm.weight"),
        ({"hidden_act": "gelu"}, "activation is gelu"),
        ({"rope_scaling": {"rope_type": "unheard_of", "factor": 4}}, "supported are linear, llama3, yarn"),
        ({"rope_scaling": {"rope_type": "unheard_of", "attn_factor": 2}}, "supported are linear, llama3"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4, "bogus": 1}}, "rope scaling .*bogus"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4, "attn_factor": 1.1}},
            "yarn rope scaling has no original_max_position_embeddings",
        ),
        (
            {"partial_rotary_factor": 0.5, "rope_scaling": {"rope_type": "linear", "factor": 2}},
            "partial rotary",
        ),
        ({"intermediate_size": 44}, "midlayer.mlp.gate_proj.weight has shape"),
        ({"draft_vocab_size": 90}, "d2t has shape"),
        ({"attention_bias": True}, "lacks the tensors midlayer.self_attn.k_proj.bias"),
        ({"hidden_size": None}, "no hidden_size"),
        (
            {"hidden_size": 30},
            "hidden_size 30 is no multiple of its 4 heads, and its config.json gives no head_dim",
        ),
    ],
)
def test_a_published_draft_of_another_architecture_is_refused(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    folder = published(tmp_path / "p", random_draft(dataclasses.replace(PLAIN, head_dim=8)), **config)
    with pytest.raises(ValueError, match=message):
        load_draft(folder)


def test_a_pickle_that_holds_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = published(tmp_path / "p", random_draft(dataclasses.replace(PLAIN, head_dim=8)))
    torch.save({"fc.weight": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="more than tensors"):
        load_draft(folder)
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    ("arch", "target", "message"),
    [
        ({"draft_vocab_size": 90}, {}, "draft_vocab_size 100 where the recipe says 90"),
        ({"intermediate_size": 44}, {}, "intermediate_size 40 where the recipe says 44"),
        ({"target_vocab_size": 300}, {}, "target_vocab_size 280 where the recipe says 300"),
        ({}, {"aux_layer_ids": (1, 2, 6)}, r"reads the outputs of target layers \[1, 2, 5\]"),
    ],
)
def test_a_recipe_that_contradicts_init_from_is_refused(
    tmp_path: Path, arch: dict[str, Any], target: dict[str, Any], message: str
) -> None:
    recipe = recipe_for(dataclasses.replace(PLAIN, **arch), tmp_path, init_from=str(exported(tmp_path)))
    recipe = recipe.model_copy(update={"target": recipe.target.model_copy(update=target)})
    with pytest.raises(ValueError, match=message):
        initial_draft(recipe)


@pytest.mark.parametrize("broken", ["missing", "empty", "no tensors", "torn"])
def test_a_folder_without_a_readable_draft_is_named(tmp_path: Path, broken: str) -> None:
    folder = tmp_path / "draft"
    if broken != "missing":
        folder.mkdir()
    if broken in ("no tensors", "torn"):
        folder = exported(tmp_path)
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100]) if broken == "torn" else weights.unlink()
    with pytest.raises(ValueError, match="draft"):
        load_draft(folder)


def test_a_published_draft_shorter_than_its_target_gets_a_flag(tmp_path: Path) -> None:
    folder = published(tmp_path / "p", random_draft(dataclasses.replace(PLAIN, head_dim=8)))  # states 2048
    for context, flag in ((131072, 2048), (2048, None), (0, 2048)):
        info = target_info(max_position_embeddings=context)
        assert ServeCommands.for_folder("org/target", folder, info=info).context_length == flag


# -- containers of other projects ------------------------------------------


def in_container(folder: Path, draft: DraftOnDisk, **config: Any) -> Path:
    """Write a draft as speculators saves it: the layer's settings apart, without transformers' defaults."""
    from transformers import AutoConfig

    plain = config_of(exported(folder / "ours", draft, dtype="float32", vllm=True))
    tensors = load_file(folder / "ours" / "draft" / "model.safetensors")
    made = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items()}
    made |= {"embed_tokens.weight": torch.randn(280, 32), "verifier_norm.weight": torch.ones(32)}
    save_file(made, folder / "model.safetensors")
    kind = plain["model_type"]
    layer = {key: plain[key] for key in AutoConfig.for_model(kind).to_dict() if key in plain}
    layer = AutoConfig.for_model(kind, **{k: v for k, v in layer.items() if k != "model_type"}).to_diff_dict()
    top = {
        "architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3",
        "draft_vocab_size": plain["draft_vocab_size"], "norm_before_residual": plain["norm_before_residual"],
        "norm_before_fc": plain["norm_before_fc"], "target_hidden_size": None, "embed_requires_grad": False,
        "eagle_aux_hidden_state_layer_ids": plain["eagle_aux_hidden_state_layer_ids"],
        "speculators_config": {"algorithm": "eagle3", "verifier": {"name_or_path": "org/target"}},
        "transformer_layer_config": layer | {"model_type": kind},
    }
    (folder / "config.json").write_text(json.dumps(top | config))
    return folder


IN_CONTAINER = {
    "plain": {},
    "norm_before_residual": {"norm_before_residual": True},
    "qk_norm": {"qk_norm": True, "norm_before_residual": True},
    "norm_before_fc": {"norm_before_fc": True, "norm_before_residual": True},
    "transformers' defaults": {"rms_norm_eps": 1e-6, "norm_before_residual": True},
    "yarn": {"rope_scaling": YARN, "norm_before_residual": True},
}


@pytest.mark.parametrize("name", IN_CONTAINER)
def test_a_draft_in_speculators_container_is_trained_further_and_exported(tmp_path: Path, name: str) -> None:
    arch = dataclasses.replace(PLAIN, **IN_CONTAINER[name])
    draft = random_draft(arch)
    folder = in_container(tmp_path, draft)
    found = load_draft(folder)
    assert (found.arch, found.layer_outputs) == (arch, draft.layer_outputs)
    assert all(torch.equal(found.state[key], tensor) for key, tensor in draft.state.items())
    start = initial_draft(recipe_for(PLAIN, tmp_path, init_from=str(folder)))
    assert start.arch == arch  # with the norms of the draft, not of the recipe
    only_vllm = arch.norm_before_residual or arch.qk_norm
    again = exported(tmp_path / "again", start, vllm=only_vllm)
    assert verify_export(start, again, torch.bfloat16) < 1e-5
    assert ServeCommands.for_folder("org/target", folder, info=target_info()).context_length == 4096


def test_a_draft_that_trained_its_embedding_in_the_container_is_refused(tmp_path: Path) -> None:
    folder = in_container(tmp_path, random_draft(), embed_requires_grad=True)
    with pytest.raises(ValueError, match="its embedding was trained"):
        load_draft(folder)


def test_a_config_that_vllm_saved_is_read(tmp_path: Path) -> None:
    draft = random_draft()
    folder = exported(tmp_path, draft, dtype="float32")
    config = config_of(folder)
    layer = {key: value for key, value in config.items() if key not in ("draft_vocab_size", "eagle_config")}
    saved = {
        "model_type": "eagle", "architectures": config["architectures"], "model": layer,
        "eagle_config": config["eagle_config"], "truncated_vocab_size": 100,
    }
    (folder / "config.json").write_text(json.dumps(saved))
    assert load_draft(folder).arch == draft.arch
