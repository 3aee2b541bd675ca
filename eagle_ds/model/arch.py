"""Every size of a draft model in one frozen object: what a checkpoint's config.json says, and nothing about training."""

from __future__ import annotations

from dataclasses import dataclass

from eagle_ds.config.recipe import Recipe
from eagle_ds.config.sections import RopeScaling


@dataclass(frozen=True)
class DraftArch:
    """An EAGLE-3 draft: one decoder layer over fused target states (arXiv:2503.01840).

    ``norm_before_fc``: one RMSNorm over the A*H wide concatenation; ``fc_norm``: one RMSNorm for each auxiliary state
    (EAGLE-3.1); ``norm_output``: the normed state, not the raw one, is handed to the next step (EAGLE-3.1).
    """

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    draft_vocab_size: int
    target_hidden_size: int
    target_vocab_size: int
    max_position_embeddings: int
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    num_aux: int = 3
    sliding_window: int | None = None
    attention_bias: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    norm_before_fc: bool = False

    @property
    def trains_embedding(self) -> bool:
        """With D != H the draft has an embedding of its own; otherwise it shares the target's, frozen."""
        return self.hidden_size != self.target_hidden_size

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> DraftArch:
        """The architecture that a recipe asks for."""
        draft = recipe.draft
        return cls(
            hidden_size=draft.hidden_size,
            intermediate_size=draft.intermediate_size,
            num_attention_heads=draft.num_attention_heads,
            num_key_value_heads=draft.num_key_value_heads,
            head_dim=draft.head_dim,
            draft_vocab_size=draft.vocab_size,
            target_hidden_size=recipe.target.hidden_size,
            target_vocab_size=recipe.target.vocab_size,
            max_position_embeddings=recipe.data.max_length,
            rope_theta=draft.rope_theta,
            rope_scaling=draft.rope_scaling,
            rms_norm_eps=draft.rms_norm_eps,
            num_aux=len(recipe.target.aux_ids),
            sliding_window=draft.sliding_window,
            attention_bias=draft.attention_bias,
            fc_norm=draft.fc_norm,
            norm_output=draft.norm_output,
            norm_before_fc=draft.norm_before_fc,
        )
