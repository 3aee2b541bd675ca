"""What ``recipes/NAME.sh --plan`` prints: the resolved recipe, the sharding, memory, time and files. Starts nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from eagle_ds.config.deepspeed import bf16_enabled, deepspeed_config, derived_rows, read_ds_json
from eagle_ds.config.recipe import Recipe, capture_command, data_parallel_size
from eagle_ds.config.run_folder import BEST, CHECKPOINTS, EVAL_LOG, RECIPE_FILE, REPORT, STEP_LOG
from eagle_ds.config.settings import join_or
from eagle_ds.data.packing import screen
from eagle_ds.data.sampler import Sampler
from eagle_ds.estimate.memory import GIB, draft_parameters, host_bytes, predict_memory
from eagle_ds.estimate.planner import (
    DEVICES,
    Device,
    check_fits,
    choose_ring_mode,
    faster_recompute,
    floor_seconds,
    in_turns,
    largest_length,
    recompute_bytes,
    sharding_for,
)
from eagle_ds.sharding import ranges as rg
from eagle_ds.sharding.sequence import Document, SequenceSharding
from eagle_ds.store.manifest import STORE_JSON, read_manifest

RANKS_SHOWN = 16


def describe_plan(
    recipe: Recipe, recipe_json: Path, world_size: int, device_name: str | None = None, overrides: Sequence[str] = ()
) -> str:
    """The whole text; ``overrides`` are those that ``recipe`` was loaded with.

    Raises ValueError where the recipe, its layout or its DeepSpeed JSON is wrong.
    """
    ds_json = read_ds_json(recipe.deepspeed)
    config = deepspeed_config(recipe, ds_json, world_size)
    device = find_device(device_name)
    dp = data_parallel_size(recipe, world_size)
    documents, origin = heaviest_sequence(recipe, dp)
    tokens = sum(document.num_tokens for document in documents)
    mode = choose_ring_mode(recipe, tokens, 2 if bf16_enabled(ds_json) else 4, device.usable_bytes if device.memory_gib < 1e6 else 16 * GIB)
    sharding = sharding_for(recipe, documents, mode)
    parallel = recipe.parallel
    parts = [
        f"{recipe.name}: world_size {world_size} = dp {dp} * ulysses {parallel.ulysses} * ring {parallel.ring}\n",
        _title(f"Recipe, resolved ({recipe_json})") + json.dumps(recipe.model_dump(), indent=2) + "\n",
        _title(f"DeepSpeed ({recipe.deepspeed} and what follows from the recipe)") + _deepspeed_text(recipe, config, world_size),
        _title("Sharding") + f"{origin}: {tokens} tokens, {sharding.num_queries} trained rows\n" + sharding_table(sharding),
        _title(f"Memory a process, predicted ({device.name})") + _memory_text(recipe, ds_json, world_size, sharding, device),
        _title("Time of a sequence, forward and backward") + _time_text(recipe, sharding, device),
        *(f"NOTE: {caveat}\n" for caveat in recipe.caveats),
        _title("Files") + _files_text(recipe, capture_command(recipe_json, overrides)),
    ]
    return "\n".join(parts)


def find_device(name: str | None) -> Device:
    """The named device; else the GPU that ``nvidia-smi`` shows; else an H200. Raises ValueError for an unknown name."""
    if name is None:
        shown = ""
        if shutil.which("nvidia-smi"):
            query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
            shown = subprocess.run(query, capture_output=True, text=True, check=False).stdout.lower()
        name = next((known for known in DEVICES if known in shown), "h200")
    if name.lower() not in DEVICES:
        raise ValueError(f"--gpu {name} is not known to the planner; use {join_or(list(DEVICES))}")
    return DEVICES[name.lower()]


def heaviest_sequence(recipe: Recipe, dp: int) -> tuple[list[Document], str]:
    """The sequence of the first epoch that costs most; before there is a store, ``max_length`` tokens, all trained."""
    root, data, training = Path(recipe.data.store), recipe.data, recipe.training
    entries = read_manifest(root)[0] if (root / STORE_JSON).is_file() else []
    if not entries:
        return [in_turns(data.max_length, 1.0)], f"no samples in {root} yet: one sample of max_length, all trained"
    samples, screening = screen(
        entries, max_length=data.max_length, overlong=data.overlong, ttt_steps=training.ttt_steps, alignment=training.mask_alignment
    )
    sampler = Sampler(
        samples,
        dp=dp,
        accumulation=training.gradient_accumulation,
        pack_tokens=data.pack_tokens,
        seed=training.seed,
        ttt_steps=training.ttt_steps,
    )
    packs = sampler.epoch_packs(0)
    heaviest = max(packs, key=lambda pack: sum(sampler.costs[number] for number in pack))
    steps = sampler.count_steps(training.epochs, training.max_steps)
    epoch = f"{len(packs)} sequence{'s' if len(packs) > 1 else ''} an epoch, {steps} optimizer steps in all"
    origin = f"{root}: {screening}\n{epoch}; the heaviest sequence, {len(heaviest)} samples"
    return [samples[number].document for number in heaviest], origin


def sharding_table(sharding: SequenceSharding) -> str:
    """A line a rank: how many rows of each kind, and which context rows."""
    rows: list[Sequence[object]] = [("rank", "context rows", "query rows", "aux rows read", "target rows read", "context")]
    for rank in range(min(sharding.world, RANKS_SHOWN)):
        shares = (sharding.context[rank], sharding.queries[rank], sharding.aux_rows(rank), sharding.target_rows(rank))
        rows.append((rank, *map(rg.count, shares), " ".join(f"{a}-{b}" for a, b in sharding.context[rank])))
    more = f"... and {sharding.world - RANKS_SHOWN} more ranks\n" if sharding.world > RANKS_SHOWN else ""
    balance = ", ".join(f"{name} {value:.3f}" for name, value in sharding.balance.items())
    exchange = f"; ring mode {sharding.ring_mode}" if sharding.ring > 1 else ""
    return f"{_table(rows)}{more}busiest rank / mean: {balance}{exchange}\n"


def _deepspeed_text(recipe: Recipe, config: dict[str, Any], world_size: int) -> str:
    derived = [(key, json.dumps(value), f"from {origin}") for key, value, origin in derived_rows(recipe, world_size)]
    owned = {key for key, _, _ in derived} | {"optimizer"}
    rest = {key: value for key, value in config.items() if key not in owned}
    params = config["optimizer"]["params"]
    rest["optimizer.params"] = {key: value for key, value in params.items() if f"optimizer.params.{key}" not in owned}
    return _table(derived) + "".join(f"{key}  {json.dumps(value)}\n" for key, value in rest.items())


def _memory_text(recipe: Recipe, ds_json: dict[str, Any], world_size: int, sharding: SequenceSharding, device: Device) -> str:
    parts = predict_memory(recipe, ds_json, world_size, sharding, cpu=device.name == "cpu")
    rows = [(name, f"{size / GIB:8.2f} GiB") for name, size in parts.items() if size] + [("sum", f"{sum(parts.values()) / GIB:8.2f} GiB")]
    text = _table(rows) + f"trained parameters: {sum(draft_parameters(recipe).values()) / 1e6:.1f} million\n"
    if host := host_bytes(recipe, ds_json, sharding):
        text += f"pinned host memory a process, for offloaded activations: {host / GIB:.2f} GiB\n"
    needs = recompute_bytes(recipe, ds_json, world_size, sharding, cpu=device.name == "cpu")
    text += f"by training.recompute: {', '.join(f'{mode} {size / GIB:.1f}' for mode, size in needs.items())} GiB\n"
    if device.name == "cpu":
        return text
    for fraction in (1.0, 0.1):
        length = largest_length(recipe, ds_json, world_size, device, fraction)
        text += f"longest sequence in {device.usable_bytes / GIB:.1f} usable GiB, {fraction:.0%} of rows trained: {length} tokens\n"
    try:
        check_fits(recipe, ds_json, world_size, sharding, device)
    except ValueError as error:
        return text + f"DOES NOT FIT: {error}\n"
    if faster := faster_recompute(recipe, ds_json, world_size, sharding, device):
        text += f"NOTE: {faster}\n"
    return text


def _time_text(recipe: Recipe, sharding: SequenceSharding, device: Device) -> str:
    floor = floor_seconds(recipe, sharding, device)
    if not floor:
        return f"no estimate: no rates were measured for {device.name}\n"
    parts = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in floor.items())
    return (
        f"at least {sum(floor.values()):.3f} s ({parts}); rates: {device.source};\n"
        "communication, elementwise work and the optimizer are not counted\n"
    )


def _files_text(recipe: Recipe, command: str) -> str:
    data, run = recipe.data, recipe.run_dir
    rows: list[Sequence[object]] = [("reads", recipe.target.model, "the target's embedding and head")]
    for store in filter(None, (data.store, data.eval_store)):
        state = "there" if (Path(store) / STORE_JSON).is_file() else f"MISSING, capture it: {command}"
        rows.append(("reads", store, state))
    if recipe.draft.init_from:
        rows.append(("reads", recipe.draft.init_from, "draft to start from"))
    rows.append(("writes", Path(data.store) / f"vocab_{recipe.draft.vocab_size}.safetensors", "draft vocabulary, if it is not there yet"))
    for name, what in (
        (RECIPE_FILE, "this recipe, resolved"),
        (STEP_LOG, "a line a step"),
        (EVAL_LOG, "a line an evaluation"),
        ("tensorboard/", "where the DeepSpeed JSON enables it"),
        (f"{CHECKPOINTS}/", f"newest {recipe.training.keep_checkpoints}; a run started again resumes from the newest"),
        (f"{BEST}/", f"by {recipe.training.best_by} acceptance length"),
        (REPORT, "curves, speed, memory, how to serve the result"),
    ):
        rows.append(("writes", run / name, what))
    return _table(rows)


def _title(text: str) -> str:
    return f"{text}\n{'-' * len(text)}\n"


def _table(rows: Iterable[Sequence[object]]) -> str:
    """Columns as wide as their widest cell, numbers to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = []
    for row in cells:
        padded = [cell.rjust(width) if cell.isdigit() else cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines) + "\n"
