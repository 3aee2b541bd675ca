"""The dictionary given to ``deepspeed.initialize``: the DeepSpeed JSON plus what the recipe decides.

The JSON owns ZeRO, precision, offload, communication and monitors; the recipe owns batch, layout, learning rate and
clipping. A value written in both must be the same (or ``"auto"``), else it is an error: nobody should have to guess
which of two numbers ran. Keys checked against DeepSpeed 0.19.8, which ignores an unknown top-level key in silence.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eagle_ds.config.recipe import Recipe, data_parallel_size
from eagle_ds.config.settings import join_or, nearest, read_json

KNOWN_KEYS = frozenset(
    {
        "activation_checkpointing",
        "aio",
        "bf16",
        "checkpoint",
        "comet",
        "comms_logger",
        "communication_data_type",
        "compile",
        "csv_monitor",
        "data_types",
        "disable_allgather",
        "disable_python_gc",
        "dump_state",
        "flops_profiler",
        "fp16",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "gradient_predivide_factor",
        "log_level",
        "memory_breakdown",
        "optimizer",
        "prescale_gradients",
        "scheduler",
        "sequence_parallel_size",
        "steps_per_print",
        "tensorboard",
        "timers",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "wall_clock_breakdown",
        "wandb",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "zero_optimization",
    }
)

RECIPE_OWNS = {
    "train_micro_batch_size_per_gpu": "one sequence; data.pack_tokens fills it",
    "gradient_accumulation_steps": "training.gradient_accumulation",
    "train_batch_size": "dp * training.gradient_accumulation",
    "sequence_parallel_size": "parallel.ulysses * parallel.ring",
    "gradient_clipping": "training.gradient_clipping",
    "optimizer.type": "AdamW",
    "optimizer.params.lr": "training.learning_rate",
    "optimizer.params.betas": "training.betas",
    "optimizer.params.eps": "training.adam_eps",
    "optimizer.params.weight_decay": "training.weight_decay",
}


def read_ds_json(path: str | Path) -> dict[str, Any]:
    """The DeepSpeed JSON at ``path``. Raises ValueError for a key that DeepSpeed would ignore or that cannot work here."""
    tree = read_json(path)
    for key in tree:
        if key not in KNOWN_KEYS:
            like = nearest(key, sorted(KNOWN_KEYS))
            raise ValueError(f"{path}: {key} is not a key used here" + (f"; did you mean {join_or(like)}?" if like else "; remove it"))
    if "scheduler" in tree:
        raise ValueError(f"{path} sets scheduler, but the recipe owns it (training.schedule, warmup_ratio); remove it from the JSON")
    if tree.get("fp16", {}).get("enabled"):
        raise ValueError(f"{path} enables fp16, which is not supported; use bf16, or neither for float32")
    if tree.get("zero_optimization", {}).get("compute_grad_norm") is False:
        raise ValueError(f"{path} sets zero_optimization.compute_grad_norm = false, but steps are logged and checked by it; remove it")
    if bf16_enabled(tree) and zero_stage(tree) == 0 and tree.get("data_types", {}).get("grad_accum_dtype") == "fp32":
        raise ValueError(f"{path}: bf16 with ZeRO stage 0 cannot accumulate gradients in fp32; use zero_optimization.stage 1")
    return tree


def deepspeed_config(recipe: Recipe, ds_json: dict[str, Any], world_size: int) -> dict[str, Any]:
    """What ``deepspeed.initialize(config=...)`` gets on ``world_size`` ranks.

    Give it no mpu: then every ZeRO stage divides gradients by world_size, and the loss is scaled for that.
    Raises ValueError where ``ds_json`` contradicts the recipe.
    """
    config = copy.deepcopy(ds_json)
    for dotted, value in _derived(recipe, world_size).items():
        _put(config, dotted, value, recipe.deepspeed)
    params = config["optimizer"]["params"]
    params.setdefault("torch_adam", True)  # DeepSpeed's own Adam would be compiled on first use
    config.setdefault("communication_data_type", "fp32")
    config.setdefault("steps_per_print", None)  # our log line says more
    config.setdefault("timers", {}).setdefault("throughput", {"enabled": False})  # it would wait for the device twice a micro-batch
    if bf16_enabled(config):
        config["bf16"].setdefault("check_grad_overflow", True)  # its default changed between releases
        if zero_stage(config) >= 1:
            config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    for monitor in ("tensorboard", "csv_monitor"):
        if config.get(monitor, {}).get("enabled"):
            config[monitor].setdefault("output_path", str(recipe.run_dir))
            config[monitor].setdefault("job_name", monitor)
    return config


def zero_stage(ds_json: dict[str, Any]) -> int:
    """ZeRO stage, 0 where none is set."""
    return int(ds_json.get("zero_optimization", {}).get("stage", 0))


def bf16_enabled(ds_json: dict[str, Any]) -> bool:
    """Whether weights and activations are bfloat16; else they are float32."""
    return bool(ds_json.get("bf16", {}).get("enabled", False))


def offloads_optimizer(ds_json: dict[str, Any]) -> bool:
    """Whether optimizer state lives in host memory or on NVMe."""
    offload = ds_json.get("zero_optimization", {}).get("offload_optimizer") or {}
    return offload.get("device", "none") != "none"


def derived_rows(recipe: Recipe, world_size: int) -> Iterator[tuple[str, Any, str]]:
    """(DeepSpeed key, value, where it comes from) for ``--plan``."""
    for dotted, value in _derived(recipe, world_size).items():
        yield dotted, value, RECIPE_OWNS[dotted]


def _derived(recipe: Recipe, world_size: int) -> dict[str, Any]:
    training = recipe.training
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": training.gradient_accumulation,
        "train_batch_size": data_parallel_size(recipe, world_size) * training.gradient_accumulation,
        "sequence_parallel_size": recipe.parallel.size,
        "gradient_clipping": training.gradient_clipping,
        "optimizer.type": "AdamW",
        "optimizer.params.lr": training.learning_rate,
        "optimizer.params.betas": list(training.betas),
        "optimizer.params.eps": training.adam_eps,
        "optimizer.params.weight_decay": training.weight_decay,
    }


def _put(config: dict[str, Any], dotted: str, value: Any, path: str) -> None:
    *sections, leaf = dotted.split(".")
    for name in sections:
        config = config.setdefault(name, {})
    written = config.get(leaf, "auto")
    if written not in ("auto", value):
        raise ValueError(
            f"{path} sets {dotted} = {written}, but the recipe decides it: {value} ({RECIPE_OWNS[dotted]}); remove it from the JSON"
        )
    config[leaf] = value
