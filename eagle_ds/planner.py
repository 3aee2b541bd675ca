"""Memory and time of a training step before it runs: what tunes ``ds_configs/*.json`` and a recipe's layout.

Memory counts what autograd keeps, tensor by tensor, for the busiest rank of a sharding plan; the letters are the legend of
``eagle_ds/__init__.py``, ``e`` is bytes per element. Time is a floor: floating-point operations of the busiest rank at the
fastest rates measured, nothing for communication, elementwise work or the optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from eagle_ds import ranges as rg
from eagle_ds.config import DraftConfig, Recipe
from eagle_ds.ds_config import bf16_enabled, offloads_optimizer, zero_stage
from eagle_ds.layout import Document, SequencePlan, plan_sequence

GIB = 1 << 30
LOSS_CHUNK_BYTES = 1 << 30
USABLE = 0.95  # of a device's memory: the allocator's fragmentation takes the rest
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


@dataclass(frozen=True)
class Step:
    """Rows and attended keys of the busiest rank in one sequence, for which memory and time are computed."""

    context_rows: int
    query_rows: int
    aux_rows: int
    target_rows: int
    total_rows: int
    attended_keys: int  # query-key pairs of one TTT step, over the heads that one rank holds of its ring rank's rows

    @classmethod
    def of(cls, plan: SequencePlan) -> Step:
        """The busiest rank of ``plan`` in each respect."""
        ranks = range(plan.world)
        return cls(
            context_rows=max(rg.count(r) for r in plan.context),
            query_rows=max(rg.count(r) for r in plan.queries),
            aux_rows=max(rg.count(plan.aux_rows(r)) for r in ranks),
            target_rows=max(rg.count(plan.target_rows(r)) for r in ranks),
            total_rows=plan.num_tokens,
            attended_keys=max(plan.attention_work(r) for r in range(plan.ring)),
        )


def plan_for(recipe: Recipe, documents: list[Document], ring_mode: Literal["gather", "p2p"] = "gather") -> SequencePlan:
    """The sharding plan of ``documents`` under the recipe's layout."""
    return plan_sequence(
        documents,
        ulysses=recipe.parallel.ulysses,
        ring=recipe.parallel.ring,
        ring_mode=ring_mode,
        ttt_steps=recipe.training.ttt_steps,
        alignment=recipe.training.mask_alignment,
        trained_rows_only=recipe.parallel.trained_rows_only,
    )


def in_turns(num_tokens: int, fraction: float, turn: int = 512) -> Document:
    """A synthetic sample whose trained tokens come in turns of ``turn``, evenly spread, ``fraction`` of all."""
    if fraction >= 1:
        return Document(num_tokens, ((0, num_tokens),))
    period = max(int(turn / fraction), turn + 1)
    ends = range(period, num_tokens + 1, period) or (num_tokens,)
    return Document(num_tokens, tuple((max(end - turn, 0), end) for end in ends))


def draft_parameters(recipe: Recipe) -> dict[str, int]:
    """Trained parameters by part (biases and norms of the projections left out: thousands among hundreds of millions)."""
    draft, hidden = recipe.draft, recipe.draft.hidden_size
    queries, keys = draft.num_attention_heads * draft.head_dim, draft.num_key_value_heads * draft.head_dim
    return {
        "fc": len(recipe.target.aux_ids) * recipe.target.hidden_size * hidden,
        "attention": 2 * hidden * (queries + 2 * keys) + queries * hidden,
        "mlp": 3 * hidden * draft.intermediate_size,
        "lm_head": draft.vocab_size * hidden,
        "embed_tokens": recipe.target.vocab_size * hidden if hidden != recipe.target.hidden_size else 0,
    }


def kv_slots(draft: DraftConfig, ulysses: int) -> int:
    """KV heads that each Ulysses rank holds; those that U does not divide are replicated."""
    per_rank, per_kv = draft.num_attention_heads // ulysses, draft.num_attention_heads // draft.num_key_value_heads
    return per_rank // math.gcd(per_rank, per_kv)


def prefix_bytes(recipe: Recipe, rows: int, element: int) -> int:
    """K_0 and V_0 of one rank's head slots for ``rows`` rows, with their float32 gradients."""
    width = kv_slots(recipe.draft, recipe.parallel.ulysses) * recipe.draft.head_dim
    return 2 * rows * width * (element + 4)


def choose_ring_mode(recipe: Recipe, num_tokens: int, element: int, memory_bytes: float) -> Literal["gather", "p2p"]:
    """``parallel.ring_mode``, with ``auto`` decided by memory: K_0/V_0 of all ranks are kept (sent once) where they fit."""
    if recipe.parallel.ring_mode != "auto":
        return recipe.parallel.ring_mode
    return "gather" if prefix_bytes(recipe, num_tokens, element) <= GATHER_SHARE * memory_bytes else "p2p"


def predict_memory(recipe: Recipe, ds_json: Mapping[str, Any], world_size: int, plan: SequencePlan, *, cpu: bool = False) -> dict[str, int]:
    """Peak bytes of the busiest rank by component."""
    step, element = Step.of(plan), 2 if bf16_enabled(dict(ds_json)) else 4
    rotated = plan.ring > 1 and plan.ring_mode == "p2p"
    prefix_rows = 2 * step.total_rows // plan.ring if rotated else step.total_rows
    steps, rows = recipe.training.ttt_steps, step.query_rows
    kept = saved_per_query_row(recipe, element, eager=cpu)
    width = len(recipe.target.aux_ids) * recipe.target.hidden_size * step.aux_rows + recipe.target.hidden_size * step.target_rows
    draft = recipe.draft
    return {
        "process": GIB * 9 // 10 if cpu else GIB * 3 // 2,  # Python, PyTorch, DeepSpeed, allocator; CUDA context, NCCL
        **_model_bytes(recipe, ds_json, world_size, element),
        "hidden states (this sequence, next)": 2 * width * element,
        "K_0/V_0 and gradients": prefix_bytes(recipe, prefix_rows, element),
        "context rows": step.context_rows * (4 * draft.hidden_size + 2 * draft.num_key_value_heads * draft.head_dim) * element,
        **{f"query rows: {name}": rows * steps * size for name, size in kept.items()},
        "workspace": _workspace_bytes(recipe, rows, element),
    }


def saved_per_query_row(recipe: Recipe, element: int, *, eager: bool = False) -> dict[str, int]:
    """Bytes kept for the backward, per query row and TTT step. ``eager``: elementwise work is not fused (CPU)."""
    draft, recompute = recipe.draft, recipe.training.recompute
    hidden, inner = draft.hidden_size, draft.intermediate_size
    queries, keys = draft.num_attention_heads * draft.head_dim, draft.num_key_value_heads * draft.head_dim
    kept = {
        "states": 2 * hidden * element,  # g_{k+1}, and its gradient from the loss
        "attention": 2 * (queries + keys) * element + 4 * draft.num_attention_heads,  # q, out, lse, K_k, V_k
    }
    if recompute != "full":
        kept["projections"] = (4 if eager else 3) * hidden * element  # embedding, z
    if recompute == "none":
        kept["mlp"] = ((4 if eager else 2) * hidden + (4 if eager else 3) * inner) * element
    return kept


def _model_bytes(recipe: Recipe, ds_json: Mapping[str, Any], world_size: int, element: int) -> dict[str, int]:
    """Weights, gradients and optimizer state, as DeepSpeed's ZeRO stage spreads them over all ranks."""
    count, stage = sum(draft_parameters(recipe).values()), zero_stage(dict(ds_json))
    shards = {name: world_size if stage >= least else 1 for name, least in (("state", 1), ("gradient", 2), ("weight", 3))}
    frozen = recipe.draft.vocab_size * recipe.target.hidden_size  # the target's head, its draft rows
    if recipe.draft.hidden_size == recipe.target.hidden_size:
        frozen += recipe.target.vocab_size * recipe.draft.hidden_size
    master = 0 if element == 4 and stage == 0 else 4
    state = 0 if offloads_optimizer(dict(ds_json)) else count * (8 + master) // shards["state"]
    accumulated = 4 if element == 2 and stage else 0  # data_types.grad_accum_dtype fp32, beside the gradients autograd makes
    return {
        "weights": count * element // shards["weight"],
        "target's embedding and head": frozen * element,
        "gradients": count * element + count * accumulated // shards["gradient"],
        "optimizer state": state,
    }


def _workspace_bytes(recipe: Recipe, rows: int, element: int) -> int:
    """The larger of: one step's MLP backward, one step's attention backward, the loss over a chunk of rows."""
    draft = recipe.draft
    mlp = rows * 3 * draft.intermediate_size * element
    attention = rows * draft.num_attention_heads * draft.head_dim * (3 * element + 4)
    chunk = min(LOSS_CHUNK_BYTES, 20 * rows * draft.vocab_size)
    return max(mlp, attention, chunk + 4 * draft.vocab_size * draft.hidden_size)


def floor_seconds(recipe: Recipe, plan: SequencePlan, device: Device) -> dict[str, float]:
    """Least time of the busiest rank for one sequence, forward and backward: {"attention", "matmuls"}; empty without rates."""
    if not device.matmul_tflops:
        return {}
    step, draft, steps = Step.of(plan), recipe.draft, recipe.training.ttt_steps
    parts = draft_parameters(recipe)
    queries, keys = draft.num_attention_heads * draft.head_dim, draft.num_key_value_heads * draft.head_dim
    kv = 2 * draft.hidden_size * 2 * keys
    per_query_step = parts["attention"] - kv + parts["mlp"] + parts["lm_head"]
    macs = step.aux_rows * parts["fc"] + step.context_rows * kv + step.query_rows * (steps * per_query_step + (steps - 1) * kv)
    label_macs = step.target_rows * draft.vocab_size * recipe.target.hidden_size  # frozen: no backward
    pairs = step.attended_keys / plan.ulysses * queries * steps
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
        plan = plan_for(recipe, [in_turns(length, fraction)], mode)
        return sum(predict_memory(recipe, ds_json, world_size, plan).values()) <= device.usable_bytes

    return _last_true(lambda n: fits(1024 * n), 1 << 14) * 1024


def check_fits(recipe: Recipe, ds_json: Mapping[str, Any], world_size: int, plan: SequencePlan, device: Device) -> None:
    """Raise ValueError, before any training, if ``plan`` is predicted not to fit: with the length and the setting that would."""
    needed = sum(predict_memory(recipe, ds_json, world_size, plan).values())
    if needed <= device.usable_bytes:
        return
    fraction = plan.num_queries / plan.num_tokens
    length = largest_length(recipe, ds_json, world_size, device, fraction)
    raise ValueError(
        f"a sequence of {plan.num_tokens} tokens with {plan.num_queries} trained rows needs about {needed / GIB:.1f} GiB a GPU on "
        f"ulysses {plan.ulysses} * ring {plan.ring}, and {device.usable_bytes / GIB:.1f} GiB are usable; {length} tokens would fit; "
        f"{what_would_fit(recipe, ds_json, world_size, plan, device)}"
    )


def what_would_fit(recipe: Recipe, ds_json: Mapping[str, Any], world_size: int, plan: SequencePlan, device: Device) -> str:
    """The mildest change that makes ``plan``'s sequence fit, as a clause."""
    documents = list(plan.documents)

    def fits(changed: Recipe, ranks: int) -> bool:
        again = plan_for(changed, documents, plan.ring_mode)
        return sum(predict_memory(changed, ds_json, ranks, again).values()) <= device.usable_bytes

    for mode in ("mlp", "full"):
        changed = _with(recipe, "training", recompute=mode)
        if mode != recipe.training.recompute and fits(changed, world_size):
            return f"--training.recompute {mode} makes it fit"
    changed = _with(recipe, "training", recompute="full")
    for more in (2, 4, 8, 16, 32, 64):
        wider = _with(changed, "parallel", ring=recipe.parallel.ring * more)
        if fits(wider, world_size * more):
            return f"--training.recompute full with {more} times as many GPUs (--parallel.ring {wider.parallel.ring}) makes it fit"
    return "no setting here makes it fit; shorten data.max_length"


def _with(recipe: Recipe, section: str, **changes: Any) -> Recipe:
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=changes)})


def _last_true(holds: Callable[[int], bool], limit: int) -> int:
    """Largest n in 0..limit for which ``holds``, which is true up to some n and false after."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low
