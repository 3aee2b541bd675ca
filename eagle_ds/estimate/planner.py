"""What fits and how fast it can be, before it runs: what tunes ``ds_configs/*.json`` and a recipe's layout.

Memory is ``memory.py``'s, for the busiest rank of a sharding plan. Time is a floor: floating-point operations of the
busiest rank at the fastest rates measured, nothing for communication, elementwise work or the optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from eagle_ds.config.deepspeed import bf16_enabled
from eagle_ds.config.recipe import Recipe
from eagle_ds.estimate.memory import GIB, Rows, draft_parameters, host_bytes, predict_memory, prefix_bytes
from eagle_ds.sharding.sequence import Document, SequenceSharding, shard_sequence

USABLE = 0.95  # of a device's memory: the allocator's fragmentation takes the rest
RECOMPUTE = ("none", "selective", "mlp", "full")  # training.recompute, the fastest first
GATHER_SHARE = 0.15  # K_0/V_0 of all ranks are kept while they and their gradients take less of the memory than this


@dataclass(frozen=True)
class Device:
    """An accelerator's memory and rates. One H200 was measured; the others are scaled by their data sheets' dense BF16."""

    name: str
    memory_gib: float
    matmul_tflops: float = 0.0
    attention_forward_tflops: float = 0.0
    attention_backward_tflops: float = 0.0
    source: str = "no measured rate"

    @property
    def usable_bytes(self) -> int:
        """Bytes that a plan may fill."""
        return int(self.memory_gib * GIB * USABLE)


def _scaled(name: str, memory_gib: float, dense_bf16_tflops: float) -> Device:
    factor = dense_bf16_tflops / 989
    return Device(name, memory_gib, 738 * factor, 561 * factor, 537 * factor, "H200's measured rates scaled by data sheet")


DEVICES = {
    "h200": Device("h200", 139.8, 738, 561, 537, "measured: 8192^3 matmul; cuDNN attention, 128K, causal"),
    "h100": _scaled("h100", 79.6, 989),
    "a100": _scaled("a100", 79.3, 312),
    "b200": _scaled("b200", 178.4, 2250),
    "cpu": Device("cpu", math.inf),
}


def sharding_for(recipe: Recipe, documents: list[Document], ring_mode: Literal["gather", "p2p"] = "gather") -> SequenceSharding:
    """The sharding plan of ``documents`` under the recipe's layout."""
    return shard_sequence(
        documents,
        ulysses=recipe.parallel.ulysses,
        ring=recipe.parallel.ring,
        ring_mode=ring_mode,
        ttt_steps=recipe.training.ttt_steps,
        alignment=recipe.training.mask_alignment,
        trained_rows_only=recipe.parallel.trained_rows_only,
    )


def in_turns(num_tokens: int, fraction: float, turn: int = 512) -> Document:
    """A synthetic sample whose trained tokens come in turns of ``turn``, evenly spread, ``fraction`` of all.

    Raises ValueError for a fraction that is not above 0 and at most 1, and for turns of no token.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"a fraction of {fraction:g} trained tokens was asked for; give one above 0 and at most 1, such as 0.1")
    if turn < 1:
        raise ValueError(f"turns of {turn} trained tokens were asked for; give 1 or more, such as 512")
    if fraction == 1:
        return Document(num_tokens, ((0, num_tokens),))
    period = max(int(turn / fraction), turn + 1)
    ends = range(period, num_tokens + 1, period) or (num_tokens,)
    return Document(num_tokens, tuple((max(end - turn, 0), end) for end in ends))


def exactly_in_turns(num_tokens: int, fraction: float, turn: int) -> Document:
    """``in_turns``, or ValueError where the tokens do not suffice for one turn and what is untrained beside it: another fraction would
    be measured than was asked for."""
    document = in_turns(num_tokens, fraction, turn)
    if fraction < 1 and turn / fraction > num_tokens:
        raise ValueError(
            f"a turn of {turn} tokens is more than {fraction:g} of {num_tokens}; give --turn {max(int(num_tokens * fraction), 1)} or less"
        )
    return document


def choose_ring_mode(recipe: Recipe, num_tokens: int, element: int, memory_bytes: float) -> Literal["gather", "p2p"]:
    """``parallel.ring_mode``, with ``auto`` decided by memory: K_0/V_0 of all ranks are kept (sent once) where they fit."""
    if recipe.parallel.ring_mode != "auto":
        return recipe.parallel.ring_mode
    return "gather" if prefix_bytes(recipe, num_tokens, element) <= GATHER_SHARE * memory_bytes else "p2p"


def projection_macs(recipe: Recipe, context: int, queries: int, tokens: int) -> int:
    """Multiplications of q, k and v: K_0/V_0 of ``context`` rows; the token's half of each, once for each of ``tokens``; the state's
    half at every step of ``queries`` rows, whose first keys are among K_0."""
    draft, steps = recipe.draft, recipe.training.ttt_steps
    q, kv = draft.num_attention_heads * draft.head_dim, 2 * draft.num_key_value_heads * draft.head_dim
    later = kv if steps > 1 else 0
    return draft.hidden_size * (2 * kv * context + (q + later) * tokens + (steps * q + (steps - 1) * kv) * queries)


def floor_seconds(recipe: Recipe, sharding: SequenceSharding, device: Device, rows: Rows | None = None) -> dict[str, float]:
    """Least time of the busiest rank, or of one with ``rows``, for one sequence, forward and backward: {"attention", "matmuls"};
    empty without rates."""
    if not device.matmul_tflops:
        return {}
    rows, draft, steps = rows or Rows.of(sharding), recipe.draft, recipe.training.ttt_steps
    parts = draft_parameters(recipe)
    queries = draft.num_attention_heads * draft.head_dim
    macs = rows.aux * parts["fc"] + projection_macs(recipe, rows.context, rows.query, rows.target)
    macs += rows.query * steps * (queries * draft.hidden_size + parts["mlp"] + parts["lm_head"])
    label_macs = rows.target * draft.vocab_size * recipe.target.hidden_size  # frozen: no backward
    pairs = rows.attended_keys / sharding.ulysses * queries * steps
    forward, backward = device.attention_forward_tflops * 1e12, device.attention_backward_tflops * 1e12
    return {
        "attention": 4 * pairs / forward + 10 * pairs / backward,
        "matmuls": (6 * macs + 2 * label_macs) / (device.matmul_tflops * 1e12),
    }


def largest_length(recipe: Recipe, ds_json: Mapping[str, Any], world_size: int, device: Device, fraction: float = 1.0) -> int:
    """Longest sequence, in steps of 1024 tokens, whose predicted memory fits ``device``; 0 if none does."""
    element = 2 if bf16_enabled(dict(ds_json)) else 4

    def fits(length: int) -> bool:
        mode = choose_ring_mode(recipe, length, element, device.usable_bytes)
        sharding = sharding_for(recipe, [in_turns(length, fraction)], mode)
        return sum(predict_memory(recipe, ds_json, world_size, sharding).values()) <= device.usable_bytes

    return _last_true(lambda n: fits(1024 * n), 1 << 14) * 1024


def check_fits(recipe: Recipe, ds_json: Mapping[str, Any], world_size: int, sharding: SequenceSharding, device: Device) -> None:
    """Raise ValueError, before any training, if ``plan`` is predicted not to fit: with the length and the setting that would."""
    needed = sum(predict_memory(recipe, ds_json, world_size, sharding).values())
    if needed > device.usable_bytes:
        raise ValueError(
            f"{describe_need(sharding, needed)}, and {device.usable_bytes / GIB:.1f} GiB are usable; "
            f"{advice(recipe, ds_json, world_size, sharding, device)}; --training.check_memory false tries it all the same"
        )


def describe_need(sharding: SequenceSharding, needed_bytes: int) -> str:
    """A clause: the sequence, its layout, and what it is predicted to take."""
    return (
        f"a sequence of {sharding.num_tokens} tokens with {sharding.num_queries} trained rows needs about {needed_bytes / GIB:.1f} GiB a GPU on "
        f"ulysses {sharding.ulysses} * ring {sharding.ring}"
    )


def advice(recipe: Recipe, ds_json: Mapping[str, Any], world_size: int, sharding: SequenceSharding, device: Device) -> str:
    """Two clauses: the longest sequence of this kind that fits, and the mildest setting that makes this one fit."""
    length = largest_length(recipe, ds_json, world_size, device, sharding.num_queries / sharding.num_tokens)
    return f"{length} tokens would fit; {what_would_fit(recipe, ds_json, world_size, sharding, device)}"


def what_would_fit(recipe: Recipe, ds_json: Mapping[str, Any], world_size: int, sharding: SequenceSharding, device: Device) -> str:
    """The mildest change that makes ``plan``'s sequence fit, as a clause."""
    documents = list(sharding.documents)

    def replanned(changed: Recipe) -> SequenceSharding:
        wider = changed.parallel.ring > sharding.ring
        element = 2 if bf16_enabled(dict(ds_json)) else 4
        mode = choose_ring_mode(changed, sharding.num_tokens, element, device.usable_bytes) if wider else sharding.ring_mode
        return sharding_for(changed, documents, mode)

    def fits(changed: Recipe, ranks: int) -> bool:
        return sum(predict_memory(changed, ds_json, ranks, replanned(changed)).values()) <= device.usable_bytes

    for changes in _milder(recipe):
        changed = _with(recipe, "training", **changes)
        if fits(changed, world_size):
            host = host_bytes(changed, ds_json, replanned(changed))
            return f"{_flags(changes)} makes it fit" + (f", with {host / GIB:.0f} GiB of host memory a GPU" if host else "")
    full = _with(recipe, "training", recompute="full")
    also = "" if recipe.training.recompute == "full" else " and --training.recompute full"
    for more in (2, 4, 8, 16, 32, 64):
        wider = _with(full, "parallel", ring=recipe.parallel.ring * more)
        if fits(wider, world_size * more):
            return f"{more} times as many GPUs (--parallel.ring {wider.parallel.ring}){also} makes it fit"
    return "no setting here makes it fit; shorten data.max_length"


def _milder(recipe: Recipe) -> list[dict[str, Any]]:
    """Changes of ``training`` that take memory off the GPU, the cheapest in time first."""
    further = RECOMPUTE[RECOMPUTE.index(recipe.training.recompute) + 1 :]
    changes: list[dict[str, Any]] = [{"recompute": mode} for mode in further]
    if not recipe.training.offload_activations:
        changes.append({**(changes[-1] if changes else {}), "offload_activations": True})
    return changes


def recompute_bytes(
    recipe: Recipe, ds_json: Mapping[str, Any], world_size: int, sharding: SequenceSharding, *, cpu: bool = False
) -> dict[str, int]:
    """Predicted bytes of the busiest rank by ``training.recompute``, the fastest first."""
    changed = {mode: _with(recipe, "training", recompute=mode) for mode in RECOMPUTE}
    return {mode: sum(predict_memory(one, ds_json, world_size, sharding, cpu=cpu).values()) for mode, one in changed.items()}


def faster_recompute(recipe: Recipe, ds_json: Mapping[str, Any], world_size: int, sharding: SequenceSharding, device: Device) -> str:
    """A sentence that names the fastest ``training.recompute`` that is predicted to fit ``device``, or nothing where the recipe's
    own is that."""
    for mode, needed in recompute_bytes(recipe, ds_json, world_size, sharding, cpu=device.name == "cpu").items():
        if mode == recipe.training.recompute:
            break
        if needed <= device.usable_bytes:
            room = f"about {needed / GIB:.1f} of {device.usable_bytes / GIB:.1f} usable GiB"
            return f"--training.recompute {mode} would fit too ({room}) and computes less again than {recipe.training.recompute}"
    return ""


def _flags(changes: Mapping[str, Any]) -> str:
    return " ".join(f"--training.{name} {str(value).lower()}" for name, value in changes.items())


def _with(recipe: Recipe, section: str, **changes: Any) -> Recipe:
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=changes)})


def _last_true(holds: Callable[[int], bool], limit: int) -> int:
    """Largest n in 0..limit for which ``holds``, which is true up to some n and false after."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low
