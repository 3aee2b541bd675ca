"""Recipes and DeepSpeed JSONs: overrides, derived values, and errors that say what to write instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from eagle_ds.config.deepspeed import deepspeed_config, read_ds_json
from eagle_ds.config.recipe import Recipe, data_parallel_size, load_own_recipe, load_recipe
from eagle_ds.config.sections import ROPE_NEEDS, ROPE_OPTIONS, RopeScaling, keys_read_by
from eagle_ds.config.settings import apply_overrides, dotted_fields, join_or, parse_overrides

MINIMAL: dict[str, Any] = {
    "name": "tiny",
    "target": {"model": "m", "hidden_size": 64, "num_layers": 8, "vocab_size": 100},
    "draft": {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 4,
        "vocab_size": 50,
        "rope_theta": 1e4,
    },
    "data": {"store": "s", "max_length": 128},
    "deepspeed": "ds.json",
}

KINDS = join_or([repr(kind) for kind in ROPE_NEEDS])  # of rope scaling, as an error lists them


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(MINIMAL))
    return path


def recipe(**sections: dict[str, Any]) -> Recipe:
    return Recipe.model_validate(
        {**MINIMAL, **{name: {**MINIMAL.get(name, {}), **values} for name, values in sections.items()}}
    )


def test_overrides_reach_nested_and_absent_sections(minimal: Path) -> None:
    tokens = [
        "--training.max_steps",
        "10",
        "--parallel.ring=2",
        "--draft.rope_scaling.rope_type",
        "linear",
        "--draft.rope_scaling.factor",
        "4",
        "--data.store",
        "elsewhere",
    ]
    loaded = load_recipe(minimal, tokens)
    assert (loaded.training.max_steps, loaded.parallel.ring, loaded.data.store) == (10, 2, "elsewhere")
    assert loaded.draft.rope_scaling is not None
    assert (loaded.draft.rope_scaling.rope_type, loaded.draft.rope_scaling.factor) == ("linear", 4.0)


def test_values_are_json_unless_the_setting_takes_text() -> None:
    tokens = [
        *("--target.revision", "1e5"),
        *("--training.max_steps", "null"),
        *("--parallel.trained_rows_only", "false"),
    ]
    assert parse_overrides(Recipe, tokens) == {
        "target.revision": "1e5",
        "training.max_steps": None,
        "parallel.trained_rows_only": False,
    }
    assert parse_overrides(Recipe, ["--training.betas", "[0.8, 0.9]"]) == {"training.betas": [0.8, 0.9]}


def test_head_dim_defaults_to_hidden_size_divided_by_heads() -> None:
    assert recipe(draft={"head_dim": None}).draft.head_dim == 64 // 32
    without = {name: value for name, value in MINIMAL["draft"].items() if name != "head_dim"}
    assert Recipe.model_validate({**MINIMAL, "draft": without}).draft.head_dim == 2


def test_recipes_that_not_every_engine_serves_have_caveats() -> None:
    assert recipe().caveats == ()
    assert (
        recipe(training={"loss": "lambda"}).caveats
        == recipe(training={"gradient_accumulation": 2}).caveats
        == ()
    )
    assert (
        "each of the 2 micro-batches"
        in recipe(training={"loss": "lambda", "gradient_accumulation": 2}).caveats[0]
    )
    assert "SGLang drops these biases" in recipe(draft={"attention_bias": True}).caveats[0]
    assert "draft.qk_norm: SGLang ignores" in recipe(draft={"qk_norm": True}).caveats[0]
    assert "SGLang ignores" in recipe(draft={"norm_before_residual": True}).caveats[0]
    layers = recipe().target.num_layers
    assert "names the last layer" in recipe(target={"aux_layer_ids": [0, layers - 1]}).caveats[0]
    assert "hidden_size=72 is no multiple of 32 heads" in recipe(draft={"hidden_size": 72}).caveats[0]


def test_a_saved_recipe_loads_to_the_same_recipe(tmp_path: Path) -> None:
    first = recipe(
        training={"betas": [0.8, 0.99]}, draft={"rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    )
    path = tmp_path / "saved.json"
    path.write_text(first.model_dump_json())
    assert load_recipe(path) == first


def test_every_kind_of_rope_scaling_says_which_keys_it_needs_and_which_it_may_have() -> None:
    assert get_args(RopeScaling.model_fields["rope_type"].annotation) == tuple(ROPE_NEEDS)
    assert ROPE_OPTIONS.keys() <= ROPE_NEEDS.keys()
    assert set().union(*map(keys_read_by, ROPE_NEEDS)) == RopeScaling.model_fields.keys()


def test_the_scaling_of_a_model_may_have_keys_of_other_kinds_and_unknown_ones_are_refused() -> None:
    found = RopeScaling.of_model({"rope_type": "linear", "factor": 4, "beta_fast": 16, "low_freq_factor": 1})
    assert found == RopeScaling(rope_type="linear", factor=4)
    for keys in ({"rope_type": "linear", "factor": 4, "bogus": 1}, {"rope_type": "linear"}):
        with pytest.raises(ValueError, match=r"bogus|needs factor"):
            RopeScaling.of_model(keys)
    for kind in ("unheard_of", ["linear"]):
        with pytest.raises(ValueError, match=f"be {KINDS}"):
            RopeScaling.of_model({"rope_type": kind, "factor": 4})
def test_a_recipe_without_a_name_takes_that_of_its_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({name: value for name, value in MINIMAL.items() if name != "name"}))
    assert load_own_recipe(path).run_dir == Path("runs/mine")
    assert load_own_recipe(path, ["--name", "second"]).name == "second"


def test_a_copied_recipe_never_writes_into_the_originals_run_folder(minimal: Path) -> None:
    copied = minimal.with_name("mine.json")
    copied.write_text(minimal.read_text())
    assert load_own_recipe(minimal).name == "tiny"
    with pytest.raises(ValueError, match=r"mine\.json has name = tiny, .* runs/tiny; delete that line"):
        load_own_recipe(copied)
    assert load_own_recipe(copied, ["--name", "tiny"]).name == "tiny", "asked for by name"
    saved = minimal.with_name("recipe.json")
    saved.write_text(minimal.read_text())
    assert load_own_recipe(saved).name == "tiny", "recipe.json of a run folder keeps the run's name"


def test_apply_overrides_does_not_change_its_argument() -> None:
    tree = {"training": {"seed": 1}}
    apply_overrides(tree, {"training.seed": 2})
    assert tree == {"training": {"seed": 1}}


def test_every_setting_has_a_description() -> None:
    assert [name for name, field in dotted_fields(Recipe) if not field.description] == []


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (
            ["--training.max_step", "3"],
            "training.max_step is not a setting; did you mean training.max_steps?",
        ),
        (["--ring", "2"], "ring is not a setting; did you mean parallel.ring?"),
        (["--training.ulysses", "2"], "did you mean parallel.ulysses?"),
        (
            ["--parallel.ulysses", "6"],
            "ulysses=6 does not divide 32 query heads; use 1, 2, 4, 8, 16 or 32, or raise ring",
        ),
        (
            ["--draft.num_key_value_heads", "5"],
            "num_key_value_heads=5 does not divide 32 query heads; use 1, 2, 4, 8, 16 or 32",
        ),
        (["--draft.head_dim", "5"], "head_dim=5 is odd"),
        (
            ["--draft.hidden_size", "72", "--draft.head_dim", "null"],
            "no multiple of 32 query heads; use 18, 24 or 36 heads, or give",
        ),
        (
            ["--draft.num_attention_heads", "0"],
            "draft.num_attention_heads = 0: input should be greater than 0",
        ),
        (
            ["--training.offload_activations", "true", "--training.recompute", "selective"],
            "use recompute none, mlp or full",
        ),
        (["--draft.vocab_size", "101"], "draft.vocab_size=101 is above target.vocab_size=100"),
        (["--target.num_layers", "3"], "aux_layer_ids=[1, 0, -1] must lie in 0..2"),
        (["--target.aux_layer_ids", "[1]"], "target.aux_layer_ids"),
        (["--draft.qk_norm", "true", "--draft.attention_bias", "true"], "no engine serves qk_norm with"),
        (["--draft.rope_scaling.rope_type", "llama3"], "rope_type llama3 needs factor, low_freq_factor"),
        (["--draft.rope_scaling.rope_type", "unheard_of"], f"input should be {KINDS}"),
        (
            ["--draft.rope_scaling.factor", "4"],
            "rope_type default does not use factor; remove what is not used, or set rope_type to linear",
        ),
        (
            [
                *("--draft.rope_scaling.rope_type", "linear", "--draft.rope_scaling.factor", "4"),
                *("--draft.rope_scaling.beta_fast", "16", "--draft.rope_scaling.truncate", "false"),
            ],
            "linear does not use beta_fast, truncate; remove what is not used, or set rope_type to yarn",
        ),
        (["--training.loss", "mse"], "training.loss = \"mse\": input should be 'kl', 'alpha' or 'lambda'"),
        (["--training.learning_rate", "fast"], 'training.learning_rate = "fast"'),
        (["--training.learning_rate", "NaN"], "finite number"),
        (["--training.min_learning_rate", "1"], "min_learning_rate=1.0 is above learning_rate"),
        (["--training.best_by", "acceptance"], "best_by=acceptance needs acceptance_interval > 0"),
        (["--training.eval_interval", "5"], "needs data.eval_store"),
        (["--name", "../up"], 'name = "../up"'),
        (["--training.seed"], "--training.seed needs a value"),
        (["7"], "overrides look like --training.max_steps 10"),
    ],
)
def test_a_wrong_setting_is_refused_with_advice(minimal: Path, tokens: list[str], message: str) -> None:
    with pytest.raises(ValueError) as refused:
        load_recipe(minimal, tokens)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"training": {"max_step": 3}}',
            "training.max_step is not a setting; did you mean training.max_steps?",
        ),
        ("{}", "target is missing (The model that is served)"),
        ('{"name": "a", "name": "b"}', "the key name appears more than once"),
        ("[1]", "a JSON object is expected"),
        ("{,}", "is not valid JSON"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "wrong.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"wrong\.json") as refused:
        load_recipe(path)
    assert message in str(refused.value)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "there.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"cannot read .*absent\.json: No such file.* in that folder are there\.json"
    ):
        load_recipe(tmp_path / "absent.json")


def test_a_world_size_that_the_layout_does_not_divide_is_refused_with_layouts_that_do() -> None:
    wanted = recipe(parallel={"ulysses": 4, "ring": 3})
    assert data_parallel_size(wanted, 24) == 2
    equation = r"world_size = dp \* ulysses \* ring does not hold: 8 ranks .* 4 \* ring 3 = 12"
    with pytest.raises(ValueError, match=equation + ".*ulysses 4 ring 2"):
        data_parallel_size(wanted, 8)


def test_kv_heads_need_not_divide_ulysses() -> None:
    assert recipe(parallel={"ulysses": 32}).parallel.ulysses == 32


def test_the_deepspeed_config_holds_what_the_recipe_decides() -> None:
    training = {"gradient_accumulation": 3, "learning_rate": 2e-4, "gradient_clipping": 1.5}
    own = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}, "tensorboard": {"enabled": True}}
    config = deepspeed_config(recipe(parallel={"ulysses": 2, "ring": 2}, training=training), own, 8)
    assert (
        config["train_batch_size"],
        config["train_micro_batch_size_per_gpu"],
        config["gradient_accumulation_steps"],
    ) == (6, 1, 3)
    assert (config["sequence_parallel_size"], config["gradient_clipping"]) == (4, 1.5)
    params = {"lr": 2e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.0, "torch_adam": True}
    assert config["optimizer"] == {"type": "AdamW", "params": params}
    assert config["bf16"] == {"enabled": True, "check_grad_overflow": True}
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert config["communication_data_type"] == "fp32"
    assert config["tensorboard"] == {"enabled": True, "output_path": "runs/tiny", "job_name": "tensorboard"}
    # It would wait for the GPU twice per micro-batch
    assert config["timers"] == {"throughput": {"enabled": False}}


def test_values_that_the_json_owns_are_kept() -> None:
    own = {
        "optimizer": {"params": {"torch_adam": False}},
        "communication_data_type": "bf16",
        "zero_optimization": {"stage": 2},
    }
    own["timers"] = {"throughput": {"enabled": True}}
    config = deepspeed_config(recipe(), own, 1)
    assert config["optimizer"]["params"]["torch_adam"] is False
    assert (config["communication_data_type"], config["zero_optimization"]) == ("bf16", {"stage": 2})
    assert config["timers"] == {"throughput": {"enabled": True}}
    assert own["optimizer"] == {"params": {"torch_adam": False}}


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (
            {"gradient_clipping": 1.0},
            r"ds\.json sets gradient_clipping = 1\.0, but the recipe decides it: 0\.5",
        ),
        ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu = 4"),
        ({"train_batch_size": 16}, r"train_batch_size = 16, .*: 1 \(dp \* training\.gradient_accumulation\)"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type = Lamb"),
        ({"optimizer": {"params": {"lr": 1e-3}}}, r"optimizer\.params\.lr = 0\.001.*training\.learning_rate"),
    ],
)
def test_a_contradiction_with_the_deepspeed_json_is_refused(own: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        deepspeed_config(recipe(), own, 1)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (
            {"zero_optimisation": {}},
            "zero_optimisation is not a key used here; did you mean zero_optimization?",
        ),
        ({"scheduler": {"type": "WarmupLR"}}, r"training\.schedule"),
        ({"fp16": {"enabled": True}}, "use bf16"),
        ({"zero_optimization": {"stage": 1, "compute_grad_norm": False}}, "every step logs and checks it"),
        (
            {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
            r"use zero_optimization\.stage 1",
        ),
    ],
)
def test_a_deepspeed_json_that_cannot_work_is_refused(
    tmp_path: Path, own: dict[str, Any], message: str
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(own))
    with pytest.raises(ValueError, match=message):
        read_ds_json(path)
