"""Export and loading of drafts: engines find every value where they look, and a failed export leaves no
files.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from eagle_ds.config.sections import RopeScaling
from eagle_ds.drafts import export
from eagle_ds.drafts.export import export_draft, verify_export
from eagle_ds.drafts.loading import initial_draft, load_draft, load_served_draft
from eagle_ds.drafts.serve_commands import ServeCommands
from tests.draft_cases import (
    LAYERS,
    ONLY_VLLM,
    PLAIN,
    SETTINGS,
    VARIANTS,
    config_of,
    edit_config,
    edit_tensors,
    exported,
    random_draft,
    recipe_for,
    target_info,
    variant,
    write_run,
)

# -- what is written ------------------------------------------


@pytest.mark.parametrize("name", [*VARIANTS, *ONLY_VLLM])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_independent_reader_computes_the_training_logits(tmp_path: Path, name: str, dtype: str) -> None:
    draft = random_draft(variant(name))
    folder = exported(tmp_path, draft, dtype=dtype, vllm=name in ONLY_VLLM)
    assert verify_export(draft, folder, getattr(torch, dtype)) < 1e-5
    again = load_draft(folder)
    assert (again.arch, again.layer_outputs) == (draft.arch, draft.layer_outputs)
    assert torch.equal(again.vocab.d2t, draft.vocab.d2t) and torch.equal(again.vocab.t2d, draft.vocab.t2d)
    for key, tensor in draft.state.items():
        assert torch.equal(again.state[key], tensor.to(getattr(torch, dtype)).float()), key


def test_tensors_have_the_engines_names_and_types(tmp_path: Path) -> None:
    tensors = load_file(exported(tmp_path) / "model.safetensors")
    assert set(tensors) == {
        *("fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d"),
        *(
            f"midlayer.{name}.weight"
            for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm")
        ),
        *(f"midlayer.self_attn.{name}_proj.weight" for name in "qkvo"),
        *(f"midlayer.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    }
    assert (
        tensors["d2t"].dtype == torch.int64
        and tensors["t2d"].dtype == torch.bool
        and tensors["fc.weight"].dtype == torch.bfloat16
    )
    ids = tensors["d2t"] + torch.arange(PLAIN.draft_vocab_size)
    assert torch.equal(ids, tensors["t2d"].nonzero()[:, 0])


def test_the_embedding_is_exported_only_where_the_draft_has_its_own(tmp_path: Path) -> None:
    assert "target_hidden_size" not in config_of(exported(tmp_path / "shared"))
    folder = exported(tmp_path / "own", random_draft(variant("own embedding")))
    assert config_of(folder)["target_hidden_size"] == 48
    assert load_file(folder / "model.safetensors")["embed_tokens.weight"].shape == (280, 32)


def test_each_engine_finds_the_layers_in_its_own_place_and_numbering(tmp_path: Path) -> None:
    config = config_of(exported(tmp_path))
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 2, 5]  # SGLang adds 1
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 3, 6]  # vLLM adds nothing
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config_of(exported(tmp_path / "v", vllm=True))["architectures"] == ["Eagle3LlamaForCausalLM"]


@pytest.mark.parametrize(("outputs", "sglang"), [((1, 29, 57), [1, 29, 57]), ((2, 30, 58), [3, 31, 59])])
@pytest.mark.parametrize(
    "target",
    [
        {"model_type": "deepseek_v3"},
        {"model_type": "glm_moe_dsa"},
        {"model_type": "mistral3", "architecture": "MistralLarge3ForCausalLM"},
    ],
)
def test_sglangs_deepseek_class_gets_ids_that_select_the_same_layers(
    tmp_path: Path, target: dict[str, Any], outputs: tuple[int, ...], sglang: list[int]
) -> None:
    info = target_info(num_layers=61, **target)
    folder = exported(tmp_path, random_draft(layers=outputs), layers=outputs, info=info)
    assert config_of(folder)["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == sglang
    recipe = recipe_for(PLAIN, tmp_path, init_from=str(folder))
    target = recipe.target.model_copy(update={"aux_layer_ids": outputs, "num_layers": 61})
    assert initial_draft(recipe.model_copy(update={"target": target}), info).layer_outputs == outputs


def test_layers_that_depend_on_the_targets_class_are_named_if_it_is_not_known(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    exported(tmp_path / "default")
    assert "DeepSeek" not in caplog.text
    exported(tmp_path / "own", random_draft(layers=(2, 3, 6)), layers=(2, 3, 6))
    assert "one off from [2, 3, 6]" in caplog.text


@pytest.mark.parametrize("name", [name for name in VARIANTS if "rope" in name or name == "plain"])
@pytest.mark.parametrize("absent", [(), ("rope_parameters",), ("rope_theta", "rope_scaling")])
def test_old_and_new_readers_of_the_rope_keys_agree(
    tmp_path: Path, name: str, absent: tuple[str, ...]
) -> None:
    from transformers import AutoConfig

    folder = exported(tmp_path, random_draft(variant(name)))
    whole = AutoConfig.from_pretrained(folder).rope_parameters
    edit_config(folder, **dict.fromkeys(absent, ...))
    assert AutoConfig.from_pretrained(folder).rope_parameters == whole
    assert load_served_draft(folder).arch == variant(name)


def test_config_holds_the_trained_length_and_the_targets_tokens(tmp_path: Path) -> None:
    config = config_of(exported(tmp_path, info=target_info()))
    assert config["eagle_ds"]["trained_length"] == config["max_position_embeddings"] == 4096
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    assert (config["bos_token_id"], config["eos_token_id"], config["tie_word_embeddings"]) == (
        None,
        [1, 2],
        False,
    )


YARN_TARGET = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("draft", "target", "written", "flag"),
    [
        ("plain", {"max_position_embeddings": 131072}, 131072, None),  # trained on 4096
        ("plain", {"max_position_embeddings": 2048}, 4096, None),  # longer than its target
        ("plain", {"max_position_embeddings": 32768, "rope_scaling": YARN_TARGET}, 131072, None),
        ("plain", {"max_position_embeddings": 8192, "rope_scaling": {"factor": 2.0}}, 16384, None),
        ("plain", {}, 4096, 4096),  # the target's context is not known
        ("plain", None, 4096, 4096),
        ("llama3 rope", {"max_position_embeddings": 131072}, 131072, None),
        ("linear rope", {"max_position_embeddings": 131072}, 131072, None),
        # Engines compute YaRN's angles up to 4 * 1024 only.
        ("yarn rope", {"max_position_embeddings": 131072}, 4096, 4096),
        ("yarn rope", {"max_position_embeddings": 4096}, 4096, None),
    ],
)
def test_engines_may_serve_the_targets_context_and_our_loader_reads_the_trained_length(
    tmp_path: Path, draft: str, target: dict[str, Any] | None, written: int, flag: int | None
) -> None:
    info = None if target is None else target_info(**target)
    folder = exported(tmp_path, random_draft(variant(draft)), info=info)
    assert config_of(folder)["max_position_embeddings"] == written
    assert load_draft(folder).arch == variant(draft)
    commands = ServeCommands.for_folder("org/target", folder)
    assert commands.context_length == flag
    text = (folder / "README.md").read_text()
    for words in (f"--context-length {flag}", f"--max-model-len {flag}"):
        assert (words in text) == (flag is not None)
    assert "up to 4096 tokens" in text and ("towards 1 beyond 4096" in text) == (written > 4096)
    again = export_draft(load_draft(folder), tmp_path / "again", dataclasses.replace(SETTINGS, info=info))
    assert config_of(again) == config_of(folder)


def test_the_keys_of_a_yarn_draft_are_as_trained_whatever_its_target_serves(tmp_path: Path) -> None:
    info = target_info(max_position_embeddings=131072)
    folder = exported(tmp_path, random_draft(variant("yarn rope")), info=info)
    assert config_of(folder)["rope_scaling"]["original_max_position_embeddings"] == 1024


def test_a_checkpoint_of_version_0_1_keeps_its_length(tmp_path: Path) -> None:
    checkpoint = write_run(tmp_path, random_draft(), recipe_for(PLAIN, tmp_path))
    tree = json.loads((checkpoint / "arch.json").read_text())
    tree["max_position_embeddings"] = tree.pop("trained_length")
    (checkpoint / "arch.json").write_text(json.dumps(tree))
    assert load_draft(checkpoint).arch == PLAIN


def test_a_whole_vocabulary_is_exported_without_a_map(tmp_path: Path) -> None:
    draft = random_draft(variant("whole vocabulary"))
    folder = exported(tmp_path, draft)
    assert not {"d2t", "t2d"} & load_file(folder / "model.safetensors").keys()
    assert torch.equal(load_draft(folder).vocab.d2t, draft.vocab.d2t)
    d2t = torch.zeros(280, dtype=torch.int64)
    d2t[0], d2t[1] = 1, -1
    swapped = dataclasses.replace(draft, vocab=dataclasses.replace(draft.vocab, d2t=d2t))
    with pytest.raises(ValueError, match="in another order"):
        exported(tmp_path / "swapped", swapped)


def test_serving_commands_count_as_the_engines_do(tmp_path: Path) -> None:
    commands = ServeCommands("org/target", "a draft", num_steps=4, sliding_window=512)
    assert (
        "--speculative-num-steps 4 --speculative-eagle-topk 1 --speculative-num-draft-tokens 5"
        in commands.sglang
    )
    assert "--speculative-draft-model-path 'a draft'" in commands.sglang
    # SGLang sees the row itself and keys up to that distance
    assert "--speculative-draft-window-size 511" in commands.sglang
    assert json.loads(commands.vllm.split("'")[1]) == {
        "method": "eagle3",
        "model": "a draft",
        "num_speculative_tokens": 4,
    }
    assert shlex.split(commands.sglang.replace("\\\n", "")) == commands.sglang_arguments
    assert shlex.split(commands.vllm.replace("\\\n", "")) == commands.vllm_arguments


# -- what verification detects ------------------------------------------


def swap(first: str, second: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[first], tensors[second] = tensors[second], tensors[first]

    return change


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: edit_config(
            folder, rope_theta=500000.0, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}
        ),
        lambda folder: edit_config(folder, rope_theta=..., rope_parameters=...),
        lambda folder: edit_config(folder, norm_output=False),
        lambda folder: edit_config(folder, fc_norm=False),
        lambda folder: edit_config(folder, rms_norm_eps=1e-2),
        lambda folder: edit_config(folder, num_attention_heads=2, head_dim=32, num_key_value_heads=1),
        lambda folder: edit_tensors(folder, lambda tensors: tensors["norm.weight"].mul_(1.1)),
        lambda folder: edit_tensors(
            folder, swap("midlayer.input_layernorm.weight", "midlayer.hidden_norm.weight")
        ),
        lambda folder: edit_tensors(
            folder, swap("midlayer.mlp.gate_proj.weight", "midlayer.mlp.up_proj.weight")
        ),
        lambda folder: edit_tensors(folder, lambda tensors: tensors.update(extra=torch.ones(1))),
        lambda folder: edit_tensors(folder, lambda tensors: tensors.pop("norm.weight")),
        lambda folder: edit_tensors(folder, lambda tensors: tensors["d2t"].add_(torch.arange(100))),
    ],
)
def test_verification_refuses_a_folder_that_describes_another_draft(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    arch = dataclasses.replace(PLAIN, norm_output=True, fc_norm=True, rope_theta=100000.0)
    draft = random_draft(arch)
    folder = exported(tmp_path, draft)
    damage(folder)
    with pytest.raises(ValueError):
        verify_export(draft, folder, torch.bfloat16)


# -- failed and repeated exports ------------------------------------------


def test_a_full_disk_leaves_the_earlier_export_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = exported(tmp_path)
    before = (folder / "model.safetensors").read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(export, "save_file", full)
    with pytest.raises(ValueError, match="is full"):
        exported(tmp_path, random_draft(seed=1))
    assert (folder / "model.safetensors").read_bytes() == before
    assert os.listdir(tmp_path) == ["draft"]


def test_a_failed_verification_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "TOLERANCE", 0.0)
    with pytest.raises(ValueError, match="differ by"):
        exported(tmp_path)
    assert os.listdir(tmp_path) == []


def test_an_earlier_export_is_replaced_and_other_folders_are_not(tmp_path: Path) -> None:
    exported(tmp_path)
    folder = exported(tmp_path, random_draft(seed=1))
    assert torch.equal(load_draft(folder).vocab.d2t, random_draft(seed=1).vocab.d2t)
    assert os.listdir(tmp_path) == ["draft"]
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "keep.txt").write_text("mine")
    with pytest.raises(ValueError, match="is no export of this tool"):
        export_draft(random_draft(), tmp_path / "notes", SETTINGS)
    assert (tmp_path / "notes" / "keep.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"draft": random_draft(dataclasses.replace(PLAIN, attention_bias=True))},
            "SGLang drops attention biases",
        ),
        (
            {"draft": random_draft(dataclasses.replace(PLAIN, num_attention_heads=6))},
            "32 is no multiple of its 6 heads",
        ),
        ({"layers": (1, 2)}, "reads 3 target layers"),
        ({"layers": (1, 2, 6)}, "was trained on layers"),
        (
            {"layers": (1, 2, 7), "draft": random_draft(layers=None), "info": target_info()},
            "cannot capture the output of the last layer",
        ),
        (
            {
                "layers": (0, 2, 5),
                "draft": random_draft(layers=None),
                "info": target_info(model_type="glm_moe_dsa"),
            },
            "DeepSeek class has no ids",
        ),
        ({"layers": (1, 2, 8), "draft": random_draft(layers=None), "info": target_info()}, "within 0..7"),
        (
            {"draft": random_draft(dataclasses.replace(PLAIN, hidden_size=96, head_dim=16))},
            "SGLang skips fc",
        ),
        ({"info": target_info(hidden_size=64)}, "for a target with hidden_size 32, but org/target has 64"),
        ({"dtype": "int8"}, "dtype int8"),
    ],
)
def test_a_draft_that_cannot_be_served_is_refused_before_writing(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        exported(tmp_path, **change)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("layers", "info"),
    [((1, 2, 7), {"model_type": "gpt_oss"}), ((1, 2, 7), {"model_type": "gemma3_text"}), ((0, 2, 5), {})],
)
def test_layers_that_sglangs_class_can_capture_are_exported(
    tmp_path: Path, layers: tuple[int, ...], info: dict[str, Any]
) -> None:
    folder = exported(tmp_path, random_draft(layers=None), layers=layers, info=target_info(**info))
    assert load_draft(folder, target_info(**info)).layer_outputs == layers


def test_the_last_layer_can_be_exported_for_vllm(tmp_path: Path) -> None:
    folder = exported(tmp_path, random_draft(layers=None), layers=(1, 2, 7), info=target_info(), vllm=True)
    assert config_of(folder)["eagle_aux_hidden_state_layer_ids"] == [2, 3, 8]
    text = (folder / "README.md").read_text()
    assert "vllm serve" in text and "sglang" not in text


@pytest.mark.parametrize("name", ONLY_VLLM)
def test_what_sglang_would_ignore_is_exported_for_vllm_alone(tmp_path: Path, name: str) -> None:
    draft = random_draft(variant(name))
    with pytest.raises(ValueError, match="export with --vllm"):
        exported(tmp_path, draft)
    folder = exported(tmp_path, draft, vllm=True)
    assert verify_export(draft, folder, torch.bfloat16) < 1e-5
    assert config_of(folder)["architectures"][0].startswith("Eagle3")  # a name that SGLang does not know


# -- checkpoints of a run ------------------------------------------


@pytest.mark.parametrize("name", ["plain", "yarn rope, attention factor given", "own embedding"])
def test_a_run_is_read_from_its_best_checkpoint_then_its_newest(tmp_path: Path, name: str) -> None:
    arch = variant(name)
    recipe = recipe_for(arch, tmp_path)
    newest, best = random_draft(arch, seed=1), random_draft(arch, seed=2)
    for step in (9, 10):
        write_run(
            tmp_path, newest if step == 10 else random_draft(arch, seed=3), recipe, f"checkpoints/step_{step}"
        )
    assert torch.equal(load_draft(tmp_path / "run").state["fc.weight"], newest.state["fc.weight"])
    write_run(tmp_path, best, recipe)
    found = load_draft(tmp_path / "run")
    assert torch.equal(found.state["fc.weight"], best.state["fc.weight"])
    assert (found.arch, found.layer_outputs) == (arch, LAYERS)
    export_draft(found, tmp_path / "draft", dataclasses.replace(SETTINGS, layers=found.layer_outputs))


def test_rope_without_scaling_and_rope_of_type_default_are_the_same(tmp_path: Path) -> None:
    draft = random_draft(dataclasses.replace(PLAIN, rope_scaling=RopeScaling(rope_type="default")))
    assert load_draft(exported(tmp_path, draft)).arch == PLAIN
