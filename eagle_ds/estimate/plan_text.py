"""Write the text that ``recipes/NAME.sh --plan`` prints: resolved recipe, sharding, memory, time and files.

Planning does not start the run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eagle_ds.config.deepspeed import deepspeed_config, derived_rows, read_ds_json
from eagle_ds.config.recipe import Recipe, capture_command, data_parallel_size
from eagle_ds.estimate.devices import GIB, find_device
from eagle_ds.estimate.fit import Setup
from eagle_ds.estimate.plan_files import files_text, table
from eagle_ds.estimate.sequences import heaviest_sequence, sharding_for
from eagle_ds.estimate.step_time import floor_seconds
from eagle_ds.estimate.tensor_sizes import draft_parameters
from eagle_ds.sharding import ranges as rg
from eagle_ds.sharding.sequence import SequenceSharding

RANKS_SHOWN = 16


def describe_plan(
    recipe: Recipe, recipe_json: Path, world_size: int,
    device_name: str | None = None, overrides: Sequence[str] = (),
) -> str:
    """Return the whole text.

    Args:
        world_size: number of ranks to plan for.
        device_name: a GPU of ``estimate/devices.py``; None: the one in this machine, else an H200.
        overrides: the command-line overrides that ``recipe`` was loaded with.

    Raises:
        ValueError: the recipe, its layout or its DeepSpeed JSON is wrong.
    """
    ds_json = read_ds_json(recipe.deepspeed)
    config = deepspeed_config(recipe, ds_json, world_size)
    setup = Setup(recipe, ds_json, world_size, find_device(device_name))
    dp, parallel = data_parallel_size(recipe, world_size), recipe.parallel
    documents, origin = heaviest_sequence(recipe, dp)
    tokens = sum(document.num_tokens for document in documents)
    sharding = sharding_for(recipe, documents, setup.ring_mode(tokens))
    rows = f"{tokens} tokens, {sharding.num_queries} trained rows"
    layout = f"dp {dp} * ulysses {parallel.ulysses} * ring {parallel.ring}"
    memory_title = f"Predicted memory of the busiest process ({setup.device.name})"
    parts = [
        f"{recipe.name}: world_size {world_size} = {layout}\n",
        _title(f"Recipe with all defaults and overrides ({recipe_json})")
        + json.dumps(recipe.model_dump(), indent=2) + "\n",
        _title(f"DeepSpeed settings ({recipe.deepspeed}, completed from the recipe)")
        + _deepspeed_text(recipe, config, world_size),
        _title("Sharding of the heaviest sequence") + f"{origin}: {rows}\n" + sharding_table(sharding),
        _title(memory_title) + _memory_text(setup, sharding),
        _title("Time of this sequence, forward and backward") + _time_text(setup, sharding),
        *(f"NOTE: {caveat}\n" for caveat in recipe.caveats),
        _title("Files") + files_text(recipe, world_size, capture_command(recipe_json, overrides)),
    ]
    return "\n".join(parts)


def sharding_table(sharding: SequenceSharding) -> str:
    """Return a table with one line per rank: how many rows of each kind it has, and which context rows."""
    header = ("rank", "context rows", "query rows", "aux rows read", "target rows read", "context")
    rows: list[Sequence[object]] = [header]
    for rank in range(min(sharding.world, RANKS_SHOWN)):
        context, queries = sharding.context[rank], sharding.queries[rank]
        shares = (context, queries, sharding.aux_rows(rank), sharding.target_rows(rank))
        rows.append((rank, *map(rg.count, shares), " ".join(f"{a}-{b}" for a, b in context)))
    more = f"... and {sharding.world - RANKS_SHOWN} more ranks\n" if sharding.world > RANKS_SHOWN else ""
    balance = ", ".join(f"{name} {value:.3f}" for name, value in sharding.balance.items())
    exchange = f"; ring mode {sharding.ring_mode}" if sharding.ring > 1 else ""
    return f"{table(rows)}{more}balance (busiest rank / mean; 1 is perfect): {balance}{exchange}\n"


def _deepspeed_text(recipe: Recipe, config: dict[str, Any], world_size: int) -> str:
    rows = derived_rows(recipe, world_size)
    derived = [(key, json.dumps(value), f"from {origin}") for key, value, origin in rows]
    owned = {key for key, _, _ in derived} | {"optimizer"}
    rest = {key: value for key, value in config.items() if key not in owned}
    params = config["optimizer"]["params"]
    rest["optimizer.params"] = {k: v for k, v in params.items() if f"optimizer.params.{k}" not in owned}
    return table(derived) + "".join(f"{key}  {json.dumps(value)}\n" for key, value in rest.items())


def _memory_text(setup: Setup, sharding: SequenceSharding) -> str:
    device, on_cpu = setup.device, setup.device.name == "cpu"
    parts = setup.memory(sharding, cpu=on_cpu).peak()
    rows = [(name, f"{size / GIB:8.2f} GiB") for name, size in parts.items() if size]
    text = table([*rows, ("sum", f"{sum(parts.values()) / GIB:8.2f} GiB")])
    text += f"trained parameters: {sum(draft_parameters(setup.recipe).values()) / 1e6:.1f} million\n"
    if host := setup.memory(sharding).host_bytes:
        text += f"pinned host memory per process for offloaded activations: {host / GIB:.2f} GiB\n"
    needs = ", ".join(f"{mode} {size / GIB:.1f}" for mode, size in setup.recompute_bytes(sharding).items())
    text += f"sum for each value of training.recompute: {needs} GiB\n"
    if on_cpu:
        return text
    for fraction in (1.0, 0.1):
        length = setup.largest_length(fraction)
        memory = f"{device.usable_bytes / GIB:.1f} usable GiB"
        text += f"longest sequence in {memory} with {fraction:.0%} of rows trained: {length} tokens\n"
    try:
        setup.check_fits(sharding)
    except ValueError as error:
        return text + f"DOES NOT FIT: {error}\n"
    if faster := setup.faster_recompute(sharding):
        text += f"NOTE: {faster}\n"
    return text


def _time_text(setup: Setup, sharding: SequenceSharding) -> str:
    floor = floor_seconds(setup.recipe, sharding, setup.device)
    if not floor:
        return f"no estimate: no rates were measured for {setup.device.name}\n"
    parts = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in floor.items())
    return (
        f"at least {sum(floor.values()):.3f} s ({parts}); rates: {setup.device.source};\n"
        "communication, elementwise work and the optimizer are not counted\n"
    )


def _title(text: str) -> str:
    return f"{text}\n{'-' * len(text)}\n"
