"""The recipe: one typed tree that mirrors ``recipes/NAME.json``, validated once at the edge.

Who owns which value: the recipe owns target, draft, data, layout, batch, schedule, learning rate and
clipping; the DeepSpeed JSON owns ZeRO, precision, offload, communication and monitors.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

NonNegativeInt = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """A part of the recipe: immutable, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class RopeScaling(Section):
    """Rotary scaling as in a Hugging Face ``config.json`` (``rope_type`` default, linear, llama3 or yarn)."""

    rope_type: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: PositiveFloat = 1.0
    original_max_position_embeddings: PositiveInt | None = None
    low_freq_factor: PositiveFloat | None = None
    high_freq_factor: PositiveFloat | None = None
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: PositiveFloat | None = None
    truncate: bool = True


class TargetConfig(Section):
    """The target model: where it is, and the sizes that everything else is checked against."""

    model: str = Field(description="Hugging Face id or a local folder")
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    hidden_size: PositiveInt
    num_layers: PositiveInt
    vocab_size: PositiveInt
    aux_layer_ids: tuple[int, int, int] | None = Field(
        None, description="layers whose outputs are captured; default [1, L//2-1, L-4]"
    )

    @property
    def aux_ids(self) -> tuple[int, int, int]:
        """Layer outputs captured, 0-based (SGLang's numbering)."""
        if self.aux_layer_ids is not None:
            return self.aux_layer_ids
        return (1, self.num_layers // 2 - 1, self.num_layers - 4)


class DraftConfig(Section):
    """Draft architecture: one decoder layer over fused target states (EAGLE-3, arXiv:2503.01840)."""

    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    head_dim: PositiveInt
    vocab_size: PositiveInt = Field(description="draft vocabulary Vd, at most the target's")
    rms_norm_eps: PositiveFloat = 1e-5
    rope_theta: PositiveFloat
    rope_scaling: RopeScaling | None = None
    sliding_window: PositiveInt | None = None
    attention_bias: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    norm_before_fc: bool = False
    init_from: str | None = Field(None, description="folder of a draft to start from, ours or a published EAGLE-3 one")
    override_rope: bool = Field(False, description="with init_from: use this recipe's rope instead of the draft's own")


class DataConfig(Section):
    """Stored hidden states and how samples become sequences."""

    conversations: str | None = Field(None, description="JSONL of conversations that the store is captured from")
    eval_conversations: str | None = None
    store: str
    eval_store: str | None = None
    max_length: PositiveInt
    overlong: Literal["truncate", "skip"] = "truncate"
    pack_tokens: PositiveInt | None = Field(None, description="pack short samples up to this many tokens; null: one sample a sequence")
    prefetch: PositiveInt = 2
    read_threads: PositiveInt = 4


class ParallelConfig(Section):
    """Layout: world_size = dp * ulysses * ring, dp is what is left over."""

    ulysses: PositiveInt = 1
    ring: PositiveInt = 1
    ring_mode: Literal["auto", "gather", "p2p"] = "auto"
    trained_rows_only: bool = True


class TrainingConfig(Section):
    """Test-time-training objective and schedule."""

    ttt_steps: PositiveInt = 7
    loss: Literal["kl", "alpha", "lambda"] = "kl"
    step_decay: PositiveFloat = 0.8
    kl_scale: PositiveFloat = 1.0
    kl_decay: PositiveFloat = 3.0
    mask_alignment: Literal["serving", "feature"] = "serving"
    loss_normalization: Literal["tokens", "positions"] = "tokens"
    learning_rate: PositiveFloat = 1e-4
    min_learning_rate: Annotated[float, Field(ge=0)] = 0.0
    warmup_ratio: Fraction = 0.03
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    betas: tuple[float, float] = (0.9, 0.95)
    adam_eps: PositiveFloat = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    gradient_clipping: Annotated[float, Field(ge=0)] = 0.5
    gradient_accumulation: PositiveInt = 1
    epochs: PositiveInt = 1
    max_steps: PositiveInt | None = None
    seed: int = 0
    recompute: Literal["none", "mlp", "full"] = "none"
    non_finite: Literal["stop", "skip"] = "stop"
    log_interval: PositiveInt = 1
    eval_interval: NonNegativeInt = 0
    save_interval: NonNegativeInt = 0
    keep_checkpoints: PositiveInt = 2
    best_by: Literal["simulated", "acceptance"] = "simulated"
    acceptance_interval: NonNegativeInt = Field(0, description="real speculative decoding every so many steps; 0: never")
    acceptance_prompts: PositiveInt = 4


class Recipe(Section):
    """One training run, readable as data."""

    name: str
    target: TargetConfig
    draft: DraftConfig
    data: DataConfig
    parallel: ParallelConfig = ParallelConfig()
    training: TrainingConfig = TrainingConfig()
    deepspeed: str = Field(description="path of the DeepSpeed JSON, relative to the repository")
    output_dir: str | None = Field(None, description="default runs/NAME")
