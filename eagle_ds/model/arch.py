"""The architecture of a draft in one frozen object: the sizes and switches of a checkpoint's config.json."""

from __future__ import annotations

from dataclasses import dataclass, fields

from eagle_ds.config.recipe import Recipe
from eagle_ds.config.sections import RopeScaling


@dataclass(frozen=True)
class DraftArch:
    """An EAGLE-3 draft: one decoder layer over fused target states (arXiv:2503.01840).

    Attributes:
        trained_length: longest sequence, in tokens, that the draft was trained on.
        norm_before_fc: one RMSNorm over the concatenated auxiliary states [A*H].
        fc_norm: one RMSNorm for each auxiliary state [H] (EAGLE-3.1).
        norm_before_residual: the layer's residual starts at the normed state (speculators).
        qk_norm: one RMSNorm over each head of q, one over each head of k, before RoPE (Qwen3).
        norm_output: the next TTT step starts from the normed state (EAGLE-3.1).
    """

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    draft_vocab_size: int
    target_hidden_size: int
    target_vocab_size: int
    trained_length: int
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    num_aux: int = 3
    sliding_window: int | None = None
    attention_bias: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    norm_before_fc: bool = False
    norm_before_residual: bool = False
    qk_norm: bool = False

    @property
    def trains_embedding(self) -> bool:
        """Whether the draft trains an embedding of its own (D != H). If not, it uses the target's, frozen."""
        return self.hidden_size != self.target_hidden_size

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> DraftArch:
        """Return the architecture that a recipe asks for."""
        draft, target = recipe.draft, recipe.target
        # Settings with the same name in the recipe's draft section; the others are given below.
        shared = {f.name: getattr(draft, f.name) for f in fields(cls) if f.name in type(draft).model_fields}
        return cls(
            **shared, draft_vocab_size=draft.vocab_size, target_hidden_size=target.hidden_size,
            target_vocab_size=target.vocab_size, trained_length=recipe.data.max_length,
            num_aux=len(target.aux_ids),
        )  # fmt: skip
