"""The floating-point work that a step's model asks for, counted analytically, whatever is computed again or twice."""

from __future__ import annotations

from eagle_ds.config.recipe import Recipe
from eagle_ds.estimate.planner import draft_parameters, projection_macs
from eagle_ds.sharding import ranges as rg
from eagle_ds.sharding.sequence import SequenceSharding


def model_flops(recipe: Recipe, sharding: SequenceSharding) -> float:
    """Forward and backward of one sequence over all its ranks, for the rows that ``plan`` computes.

    A weight and row: 2 forward, 4 backward. A query-key pair of a head: 4 d forward (scores, values), 8 d backward; a flash
    kernel makes the scores again, 10 d in all, which the floor counts and this does not. The target's head: forward only,
    a row once.
    """
    draft, steps, parts = recipe.draft, sharding.ttt_steps, draft_parameters(recipe)
    queries, context, rows = draft.num_attention_heads * draft.head_dim, sharding.num_tokens, sharding.num_queries
    labels = rg.count(rg.normalize(r for rank in range(sharding.world) for r in sharding.target_rows(rank)))
    macs = context * parts["fc"] + projection_macs(recipe, context, rows, labels)
    macs += rows * steps * (queries * draft.hidden_size + parts["mlp"] + parts["lm_head"])
    pairs = steps * sum(sharding.attention_work(r) for r in range(sharding.ring)) + rows * steps * (steps - 1) // 2
    return 6.0 * macs + 12.0 * pairs * queries + 2.0 * labels * draft.vocab_size * recipe.target.hidden_size
