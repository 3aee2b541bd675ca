"""Compute a lower bound on the time of a training step.

It is the matmul and attention work of the busiest rank, divided by the fastest measured rates. Communication,
elementwise kernels and the optimizer are not counted, so a real step is slower. Letters such as ``D`` and
``Hq`` are explained in ``eagle_ds/__init__.py``. One multiply-accumulate (MAC) is 2 FLOPs; the backward of a
matmul costs twice its forward.
"""

from __future__ import annotations

from eagle_ds.config.recipe import Recipe
from eagle_ds.estimate.devices import Device
from eagle_ds.estimate.tensor_sizes import Rows, draft_parameters
from eagle_ds.sharding.sequence import SequenceSharding


def projection_macs(recipe: Recipe, context: int, queries: int, tokens: int) -> int:
    """Count the multiply-accumulates of the q, k and v projections in one forward pass.

    Args:
        context: rows for which K_0/V_0 are computed.
        queries: query rows, which every TTT step projects again.
        tokens: tokens whose embedding is projected, once for all TTT steps.
    """
    draft, steps = recipe.draft, recipe.training.ttt_steps
    q, kv = draft.num_attention_heads * draft.head_dim, 2 * draft.num_key_value_heads * draft.head_dim
    # The input of a projection is [embedding ; state], 2D wide. The embedding half is multiplied once per
    # token and shared by all TTT steps; the state half is multiplied at every step. Step 0 needs no K or V of
    # its own: they are part of K_0/V_0, which use the full 2D width.
    later = kv if steps > 1 else 0
    per_hidden = 2 * kv * context + (q + later) * tokens + (steps * q + (steps - 1) * kv) * queries
    return draft.hidden_size * per_hidden


def floor_seconds(
    recipe: Recipe, sharding: SequenceSharding, device: Device, rows: Rows | None = None
) -> dict[str, float]:
    """Return the least time, in seconds, of one sequence's forward and backward on ``device``.

    Args:
        rows: row counts of one rank; by default those of the busiest rank.

    Returns:
        {"attention": s, "matmuls": s}, or {} for a device without rates.
    """
    if not device.matmul_tflops:
        return {}
    rows = rows or Rows.of(sharding)
    draft, steps = recipe.draft, recipe.training.ttt_steps
    parts, queries = draft_parameters(recipe), draft.num_attention_heads * draft.head_dim
    macs = rows.aux * parts["fc"] + projection_macs(recipe, rows.context, rows.query, rows.target)
    macs += rows.query * steps * (queries * draft.hidden_size + parts["mlp"] + parts["lm_head"])
    label_macs = rows.target * draft.vocab_size * recipe.target.hidden_size  # frozen: no backward
    # Per query-key pair and head: 2 matmuls of width d forward (4 FLOPs per number), 5 backward (10 FLOPs).
    pairs = rows.attended_keys / sharding.ulysses * queries * steps
    forward, backward = device.attention_forward_tflops * 1e12, device.attention_backward_tflops * 1e12
    return {
        "attention": 4 * pairs / forward + 10 * pairs / backward,
        "matmuls": (6 * macs + 2 * label_macs) / (device.matmul_tflops * 1e12),
    }
