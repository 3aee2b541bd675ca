"""Build the dictionary for ``deepspeed.initialize``: the DeepSpeed JSON plus what the recipe decides.

The JSON owns ZeRO, precision, offload, communication and monitors. The recipe owns batch, layout, learning
rate and clipping. A value written in both must be equal (or ``"auto"`` in the JSON); otherwise it is an
error, so that nobody has to guess which of two numbers was used. Keys were checked against DeepSpeed 0.19.8,
which ignores an unknown top-level key without a warning.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eagle_ds.config.recipe import Recipe, data_parallel_size
from eagle_ds.config.settings import join_or, nearest, read_json

DS_CONFIGS = "ds_configs"  # folder of the DeepSpeed JSONs, relative to the repository

KNOWN_KEYS = {
    "activation_checkpointing", "aio", "bf16", "checkpoint", "comet", "comms_logger",
    "communication_data_type", "compile", "csv_monitor", "data_types", "disable_allgather",
    "disable_python_gc", "dump_state", "flops_profiler", "fp16", "gradient_accumulation_steps",
    "gradient_clipping", "gradient_predivide_factor", "log_level", "memory_breakdown", "optimizer",
    "prescale_gradients", "scheduler", "sequence_parallel_size", "steps_per_print", "tensorboard",
    "timers", "train_batch_size", "train_micro_batch_size_per_gpu", "wall_clock_breakdown", "wandb",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "zero_optimization",
}


def read_ds_json(path: str | Path) -> dict[str, Any]:
    """Read the DeepSpeed JSON at ``path``.

    Raises ValueError for a key that DeepSpeed would ignore or that cannot work here.
    """
    tree = read_json(path, usual_folder=DS_CONFIGS)
    for key in tree:
        if key not in KNOWN_KEYS:
            like = nearest(key, sorted(KNOWN_KEYS))
            hint = f"did you mean {join_or(like)}?" if like else "remove it"
            raise ValueError(f"{path}: {key} is not a key used here; {hint}")
    if "scheduler" in tree:
        owner = "the recipe owns it (training.schedule, warmup_ratio)"
        raise ValueError(f"{path} sets scheduler, but {owner}; remove it from the JSON")
    if tree.get("fp16", {}).get("enabled"):
        raise ValueError(f"{path} enables fp16, which is not supported; use bf16, or neither for float32")
    if tree.get("zero_optimization", {}).get("compute_grad_norm") is False:
        setting = "zero_optimization.compute_grad_norm = false"
        raise ValueError(f"{path} sets {setting}, but every step logs and checks it; remove it")
    sums_in_fp32 = tree.get("data_types", {}).get("grad_accum_dtype") == "fp32"
    if bf16_enabled(tree) and zero_stage(tree) == 0 and sums_in_fp32:
        wrong = "bf16 with ZeRO stage 0 cannot accumulate gradients in fp32"
        raise ValueError(f"{path}: {wrong}; use zero_optimization.stage 1")
    return tree


def deepspeed_config(recipe: Recipe, ds_json: dict[str, Any], world_size: int) -> dict[str, Any]:
    """Return the dictionary for ``deepspeed.initialize(config=...)`` on ``world_size`` ranks.

    Pass no mpu to DeepSpeed: without one every ZeRO stage divides gradients by world_size, and the loss is
    scaled for that.

    Raises:
        ValueError: ``ds_json`` contradicts the recipe.
    """
    config = copy.deepcopy(ds_json)
    for dotted, value, owner in derived_rows(recipe, world_size):
        _put(config, dotted, value, owner, recipe.deepspeed)
    # DeepSpeed's own Adam would be compiled on first use.
    config["optimizer"]["params"].setdefault("torch_adam", True)
    config.setdefault("communication_data_type", "fp32")
    config.setdefault("steps_per_print", None)  # our own log line says more
    # The throughput timer would wait for the GPU twice per micro-batch.
    config.setdefault("timers", {}).setdefault("throughput", {"enabled": False})
    if bf16_enabled(config):
        config["bf16"].setdefault("check_grad_overflow", True)  # the default differs between releases
        if zero_stage(config) >= 1:
            config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    for monitor in ("tensorboard", "csv_monitor"):
        if config.get(monitor, {}).get("enabled"):
            config[monitor].setdefault("output_path", str(recipe.run_dir))
            config[monitor].setdefault("job_name", monitor)
    return config


def zero_stage(ds_json: dict[str, Any]) -> int:
    """Return the ZeRO stage; 0 if none is set."""
    return int(ds_json.get("zero_optimization", {}).get("stage", 0))


def bf16_enabled(ds_json: dict[str, Any]) -> bool:
    """Whether weights and activations are bfloat16; otherwise they are float32."""
    return bool(ds_json.get("bf16", {}).get("enabled", False))


def element_bytes(ds_json: dict[str, Any]) -> int:
    """Return the bytes of one weight or activation: 2 in bfloat16, 4 in float32."""
    return 2 if bf16_enabled(ds_json) else 4


def offloads_optimizer(ds_json: dict[str, Any]) -> bool:
    """Whether optimizer state is kept in host memory or on NVMe."""
    offload = ds_json.get("zero_optimization", {}).get("offload_optimizer") or {}
    return offload.get("device", "none") != "none"


def derived_rows(recipe: Recipe, world_size: int) -> Iterator[tuple[str, Any, str]]:
    """Yield what the recipe decides: (dotted DeepSpeed key, value, its origin in the recipe)."""
    training, dp = recipe.training, data_parallel_size(recipe, world_size)
    steps = training.gradient_accumulation
    yield "train_micro_batch_size_per_gpu", 1, "one sequence; data.pack_tokens fills it"
    yield "gradient_accumulation_steps", steps, "training.gradient_accumulation"
    yield "train_batch_size", dp * steps, "dp * training.gradient_accumulation"
    yield "sequence_parallel_size", recipe.parallel.size, "parallel.ulysses * parallel.ring"
    yield "gradient_clipping", training.gradient_clipping, "training.gradient_clipping"
    yield "optimizer.type", "AdamW", "the only supported optimizer"
    yield "optimizer.params.lr", training.learning_rate, "training.learning_rate"
    yield "optimizer.params.betas", list(training.betas), "training.betas"
    yield "optimizer.params.eps", training.adam_eps, "training.adam_eps"
    yield "optimizer.params.weight_decay", training.weight_decay, "training.weight_decay"


def _put(config: dict[str, Any], dotted: str, value: Any, owner: str, path: str) -> None:
    """Set ``dotted`` in ``config``. Raises ValueError if another value is written there."""
    *sections, leaf = dotted.split(".")
    for name in sections:
        config = config.setdefault(name, {})
    written = config.get(leaf, "auto")
    if written not in ("auto", value):
        raise ValueError(
            f"{path} sets {dotted} = {written}, but the recipe decides it: {value} ({owner}); "
            "remove it from the JSON"
        )
    config[leaf] = value
