"""A target is read, identified and refused without loading it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eagle_ds.config.sections import TargetConfig
from eagle_ds.target.files import load_target_weights, resolve_target
from eagle_ds.target.identity import target_hash, tokenizer_hash
from eagle_ds.target.info import TargetInfo, rope_of, stop_token_ids
from tests.tiny_targets import save_tiny_llama


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("untied"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tied"), tie=True)


@pytest.fixture
def copy(untied, tmp_path) -> Path:
    return Path(shutil.copytree(untied, tmp_path / "copy"))


def test_sizes_are_read_from_a_config_of_transformers_5(untied):
    info = TargetInfo.from_folder(untied)
    assert (info.hidden_size, info.num_layers, info.vocab_size, info.head_dim) == (32, 8, 280, 8)
    assert info.rope_theta == 10000.0 and info.rope_scaling is None and info.aux_ids == (1, 3, 4)
    assert info.eos_token_ids == (1,)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"rope_theta": 5e5}, (5e5, None)),
        ({}, (1e4, None)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, (1e6, None)),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            (5e5, {"rope_type": "linear", "factor": 2.0}),
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4, "rope_theta": 1e6}},
            (1e6, {"rope_type": "yarn", "factor": 4}),
        ),
    ],
)
def test_rope_is_read_under_the_old_and_the_new_key(config, expected):
    assert rope_of(config) == expected


def test_stop_tokens_join_both_configs(copy):
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    assert stop_token_ids(copy) == (1, 7)


def test_only_the_shared_tensors_are_loaded(untied):
    weights = load_target_weights(untied, dtype=torch.float64)
    whole = load_file(untied / "model.safetensors")
    for name, full in {
        "embed_tokens": "model.embed_tokens.weight", "lm_head": "lm_head.weight", "norm": "model.norm.weight"
    }.items():
        assert torch.equal(weights[name], whole[full].double())


def test_a_tied_head_is_the_embedding(tied):
    weights = load_target_weights(tied, ("embed_tokens", "lm_head"))
    assert weights["lm_head"] is weights["embed_tokens"]
    assert torch.equal(load_target_weights(tied, ("lm_head",))["lm_head"], weights["embed_tokens"])


def test_tensors_with_similar_names_are_not_loaded(copy):
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.61.shared_head.head.weight"] = tensors.pop("lm_head.weight")
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(ValueError, match="has no lm_head under any of"):
        load_target_weights(copy)


def test_quantized_shared_tensors_are_refused(copy):
    tensors = load_file(copy / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(ValueError, match=r"stored as torch\.float8_e4m3fn, expected float32"):
        load_target_weights(copy)


def test_the_hash_tells_targets_apart(untied, copy, tmp_path):
    assert target_hash(untied) == target_hash(copy)
    assert target_hash(untied) != target_hash(save_tiny_llama(tmp_path / "seed", seed=1))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert target_hash(untied) != target_hash(copy)


def test_the_tokenizer_hash_follows_the_chat_template(untied, copy, tmp_path):
    assert tokenizer_hash(untied) == tokenizer_hash(copy)
    assert tokenizer_hash(untied) != tokenizer_hash(save_tiny_llama(tmp_path / "llama3", kind="llama3"))
    for path in copy.glob("chat_template*"):
        path.write_text(path.read_text() + " ")
    assert tokenizer_hash(untied) != tokenizer_hash(copy)


def test_a_recipe_that_states_other_sizes_is_refused(untied):
    right = {"model": str(untied), "hidden_size": 32, "num_layers": 8, "vocab_size": 280}
    TargetInfo.from_folder(untied).check_against(TargetConfig(**right))
    with pytest.raises(ValueError, match=r"target\.hidden_size=64 in the recipe but .* has 32; write 32"):
        TargetInfo.from_folder(untied).check_against(TargetConfig(**{**right, "hidden_size": 64}))


def test_the_error_for_a_missing_target_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"tools/fetch_embedded_target\.py"):
        resolve_target(str(tmp_path / "SmolLM2-135M-Instruct"))
    with pytest.raises(ValueError, match=r"no config\.json"):
        resolve_target(str(tmp_path))
    with pytest.raises(ValueError, match="neither a folder here nor reachable"):
        resolve_target("nobody/no-such-model")


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def garble(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"<!DOCTYPE html>" * 10)


def remove(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def point_nowhere(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}})
    )


@pytest.mark.parametrize("damage", [cut_short, garble, remove, point_nowhere])
def test_damaged_weights_are_found_before_loading(copy, damage):
    damage(copy)
    with pytest.raises(ValueError, match="target"):
        resolve_target(str(copy))
    assert resolve_target(str(copy), weights=False) == copy


def test_an_unreadable_config_is_named(copy):
    (copy / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        TargetInfo.from_folder(copy)
