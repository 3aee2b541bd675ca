"""Define the sections of a recipe: every setting of target, draft, data, parallel and training.

The text below each field is its documentation. ``recipes/NAME.sh --help`` and error messages print it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from eagle_ds.config.settings import join_or

NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]

# Every kind of rope scaling, with the keys that it cannot do without
ROPE_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
# Keys that a kind reads if they are there; other kinds have none
ROPE_OPTIONS: dict[str, tuple[str, ...]] = {
    "yarn": ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate"),
}


def divisors(number: int) -> list[int]:
    """List every positive divisor, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def default_aux_ids(num_layers: int) -> tuple[int, int, int]:
    """Return an early, a middle and a late layer, as EAGLE-3 chooses them."""
    return (1, num_layers // 2 - 1, num_layers - 4)


class Section(BaseModel):
    """A section of the recipe.

    It is immutable, refuses unknown keys, and takes field descriptions from docstrings.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        # A description is printed on one line, whatever the docstring's line breaks are.
        for field in cls.model_fields.values():
            field.description = " ".join((field.description or "").split()) or None


def keys_read_by(rope_type: str) -> set[str]:
    """Return the fields of ``RopeScaling`` that this kind reads."""
    return {"rope_type", *ROPE_NEEDS[rope_type], *ROPE_OPTIONS.get(rope_type, ())}


class RopeScaling(Section):
    """Rotary scaling with the keys of a Hugging Face ``config.json``."""

    rope_type: Literal["default", "linear", "llama3", "yarn"] = "default"
    """Kind of scaling. Copy the whole section from the target's config.json."""
    factor: PositiveFloat = 1.0
    """linear, llama3, yarn: how many times longer contexts become."""
    original_max_position_embeddings: PositiveInt | None = None
    """llama3, yarn: context length in tokens before scaling."""
    low_freq_factor: PositiveFloat | None = None
    """llama3: wavelengths above original length / this value are scaled by the full factor."""
    high_freq_factor: PositiveFloat | None = None
    """llama3: wavelengths below original length / this value are not scaled."""
    beta_fast: PositiveFloat = 32.0
    """yarn: dimensions that turn more often than this within the original length are not scaled."""
    beta_slow: PositiveFloat = 1.0
    """yarn: dimensions that turn less often than this within the original length are scaled by the full
    factor."""
    mscale: float | None = None
    """yarn: attention scale, numerator; set it only if the target's config.json does."""
    mscale_all_dim: float | None = None
    """yarn: attention scale, denominator; set it only if the target's config.json does."""
    attention_factor: PositiveFloat | None = None
    """yarn: attention scale itself; null derives it from factor and mscale."""
    truncate: bool = True
    """yarn: round the range of partly scaled dimensions to whole dimensions."""

    @classmethod
    def of_model(cls, keys: Mapping[str, Any]) -> RopeScaling:
        """Read the scaling of an existing model. Ignore keys of other kinds, as engines do.

        Raises:
            ValueError: the kind or a key is unknown, or a key that the kind needs is missing.
        """
        kind = keys.get("rope_type", "default")
        if kind not in list(ROPE_NEEDS):  # a list: a damaged file may hold a value that has no hash
            return cls(**keys)  # raises, and names the kinds that exist
        foreign = cls.model_fields.keys() - keys_read_by(kind)
        return cls(**{name: value for name, value in keys.items() if name not in foreign})

    @model_validator(mode="after")
    def _has_the_keys_of_its_kind(self) -> RopeScaling:
        given = {name for name in self.model_fields_set if getattr(self, name) is not None}
        lacking = [name for name in ROPE_NEEDS[self.rope_type] if name not in given]
        if lacking:
            advice = "copy the whole rope_scaling section from the model's config.json"
            raise ValueError(f"rope_type {self.rope_type} needs {', '.join(lacking)}; {advice}")
        # A saved recipe holds every key. Defaults of keys that the kind does not read are harmless.
        fields, read = type(self).model_fields, keys_read_by(self.rope_type)
        unread = [name for name, value in self if name not in read and value != fields[name].default]
        if unread:
            readers = [kind for kind in ROPE_NEEDS if keys_read_by(kind).issuperset(unread)]
            other = f", or set rope_type to {join_or(readers)}" if readers else ""
            wrong = f"rope_type {self.rope_type} does not use {', '.join(unread)}"
            raise ValueError(f"{wrong}; remove what is not used{other}")
        return self


class TargetConfig(Section):
    """The target model: where it is, and the sizes that stores and drafts are checked against."""

    model: str
    """Hugging Face id or local folder of the target."""
    revision: str | None = None
    """Branch, tag or commit on the Hugging Face hub; null: the default branch. Give a commit to pin the
    weights."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Type in which the target runs at capture. Use the type in which it will be served."""
    hidden_size: PositiveInt
    """Hidden size H, as in the target's config.json."""
    num_layers: PositiveInt
    """Number of layers L: num_hidden_layers of the target's config.json."""
    vocab_size: PositiveInt
    """Vocabulary size V, as in the target's config.json."""
    aux_layer_ids: Annotated[tuple[NonNegativeInt, ...], Field(min_length=2)] | None = None
    """The layers, numbered from 0, whose outputs the draft reads; null: [1, L//2-1, L-4], as in EAGLE-3. Two
    or more; SGLang cannot capture the last one of most targets."""
    template_kwargs: dict[str, Any] = {}
    """Variables of the chat template, such as {"enable_thinking": false}. Use those with which the target is
    served."""

    @property
    def aux_ids(self) -> tuple[int, ...]:
        """Layers whose outputs are captured, numbered from 0 as SGLang does."""
        return self.aux_layer_ids or default_aux_ids(self.num_layers)

    @model_validator(mode="after")
    def _layers_exist(self) -> TargetConfig:
        last = self.num_layers - 1
        if any(not 0 <= layer <= last for layer in self.aux_ids):
            given = f"aux_layer_ids={list(self.aux_ids)}"
            raise ValueError(f"{given} must lie in 0..{last} (num_layers={self.num_layers}); set others")
        return self


class DraftConfig(Section):
    """Draft architecture: one decoder layer over fused target states (EAGLE-3, arXiv:2503.01840)."""

    hidden_size: PositiveInt
    """Hidden size D. If D = H the draft shares the target's frozen embedding; otherwise it trains its own."""
    intermediate_size: PositiveInt
    """Inner width of the SwiGLU MLP."""
    num_attention_heads: PositiveInt
    """Number of query heads Hq."""
    num_key_value_heads: PositiveInt
    """Number of key/value heads Hkv; must divide Hq."""
    head_dim: PositiveInt
    """Head dimension d, an even number; null: D / Hq."""
    vocab_size: PositiveInt
    """Draft vocabulary Vd: the most frequent target tokens of the store. Smaller is faster; at most V."""
    rms_norm_eps: PositiveFloat = 1e-5
    """Epsilon of every RMSNorm. Use the target's value."""
    rope_theta: PositiveFloat
    """Rotary base. Use the target's value."""
    rope_scaling: RopeScaling | None = None
    """Rotary scaling; null: none. Use the target's."""
    sliding_window: PositiveInt | None = None
    """Number of keys that a row sees, itself included; null: all. A window keeps acceptance on longer
    contexts than trained."""
    attention_bias: bool = False
    """Add biases to the q, k, v and o projections. SGLang ignores them, so only vLLM can serve such a
    draft."""
    fc_norm: bool = False
    """Normalize each of the three target states before fusing them (EAGLE-3.1)."""
    norm_output: bool = False
    """Pass the normalized state, not the raw one, to the next TTT step (EAGLE-3.1)."""
    norm_before_fc: bool = False
    """Normalize the concatenated target states, 3H wide, before fusing them."""
    norm_before_residual: bool = False
    """Start the layer's residual from the normalized state, as drafts of speculators do. SGLang ignores it,
    so only vLLM can serve such a draft."""
    qk_norm: bool = False
    """Normalize each head of q and k before rotating it, as Qwen3 does. SGLang ignores it, so only vLLM can
    serve such a draft."""
    init_from: str | None = None
    """Folder of a draft to start from: a run, a checkpoint, an export, or a published EAGLE-3 draft; null:
    random weights."""
    override_rope: bool = False
    """With init_from: use this recipe's rotary settings instead of that draft's, for example to extend its
    context."""

    @model_validator(mode="before")
    @classmethod
    def _default_head_dim(cls, values: Any) -> Any:
        """Set head_dim to D / Hq if it is missing. Other errors in D and Hq are reported by later checks."""
        if not isinstance(values, dict) or values.get("head_dim") is not None:
            return values
        hidden, heads = (values.get(name) for name in ("hidden_size", "num_attention_heads"))
        if not all(isinstance(size, int) and size > 0 for size in (hidden, heads)):
            return values
        if hidden % heads:
            near = sorted(sorted(divisors(hidden), key=lambda number: abs(number - heads))[:3])
            wrong = f"hidden_size={hidden} is no multiple of {heads} query heads"
            raise ValueError(f"{wrong}; use {join_or(near)} heads, or give head_dim")
        return values | {"head_dim": hidden // heads}

    @model_validator(mode="after")
    def _heads_divide(self) -> DraftConfig:
        heads = self.num_attention_heads
        if heads % self.num_key_value_heads:
            wrong = f"num_key_value_heads={self.num_key_value_heads} does not divide {heads} query heads"
            raise ValueError(f"{wrong}; use {join_or(divisors(heads))}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; use an even one, rotary embedding needs it")
        if self.qk_norm and self.attention_bias:
            raise ValueError("no engine serves qk_norm with attention_bias; set one of them to false")
        return self


class DataConfig(Section):
    """Stored hidden states, and how samples become sequences. Relative paths start at the repository."""

    conversations: str | None = None
    """JSONL file of the conversations that the store is captured from."""
    eval_conversations: str | None = None
    """JSONL file of held-out conversations: captured for evaluation, and prompts for measuring acceptance."""
    store: str
    """Folder of captured hidden states to train on."""
    eval_store: str | None = None
    """Folder of captured hidden states of held-out conversations."""
    max_length: PositiveInt
    """Longest sample, in tokens. Train as long as you serve: acceptance falls beyond the trained length."""
    overlong: Literal["truncate", "skip"] = "truncate"
    """What to do with longer samples; the log counts them either way."""
    duplicates: Literal["reject", "suffix"] = "reject"
    """What to do with a conversation whose id an earlier, other one has: reject it, or append a suffix to its
    id."""
    pack_tokens: PositiveInt | None = None
    """Pack short samples into sequences of up to this many tokens; null: one sample per sequence. Set it if
    most are short."""
    prefetch: PositiveInt = 2
    """Sequences read ahead of the one that trains. Raise it if the log shows waiting for data; each takes
    host memory."""
    read_processes: NonNegativeInt | None = None
    """Processes per rank that read and decompress; null: 4 with a GPU, 0 on a CPU. 0 reads in a thread of the
    trainer."""


class ParallelConfig(Section):
    """Layout of the ranks: world_size = dp * ulysses * ring, where dp follows from the other three."""

    ulysses: PositiveInt = 1
    """Ranks that split the attention heads of one sequence; must divide Hq. Raise it first, within one
    node."""
    ring: PositiveInt = 1
    """Ranks that split the keys of one sequence. Raise it when Ulysses is at its limit, or across nodes."""
    ring_mode: Literal["auto", "gather", "p2p"] = "auto"
    """gather: fetch all ranks' K_0/V_0 once per sequence; p2p: rotate them every TTT step; auto: gather while
    they fit."""
    trained_rows_only: bool = True
    """Compute queries for trained rows only. The result is exact; false is slower and serves for
    comparison."""

    @property
    def size(self) -> int:
        """Number of ranks that share one sequence, P."""
        return self.ulysses * self.ring


class TrainingConfig(Section):
    """Objective, optimizer, schedule, memory, and what is logged and saved."""

    ttt_steps: PositiveInt = 7
    """Number of TTT steps T, 7 as in EAGLE-3. Time and activations grow with it; use at least the draft
    tokens served."""
    loss: Literal["kl", "alpha", "lambda"] = "kl"
    """kl: soft cross-entropy; alpha: -log acceptance; lambda: a mixture that moves from kl to acceptance as
    it rises."""
    step_decay: PositiveFloat = 0.8
    """TTT step k is weighted with step_decay ** k, because later draft tokens are used less often."""
    kl_scale: PositiveFloat = 1.0
    """Loss lambda: weight of kl is kl_scale * exp(-kl_decay * mean alpha), where alpha is that of the
    micro-batch."""
    kl_decay: PositiveFloat = 3.0
    """Loss lambda: see kl_scale. A larger value moves to acceptance sooner."""
    mask_alignment: Literal["serving", "feature"] = "serving"
    """Which rows count at TTT step k. serving: as at inference; feature: as in SpecForge and the golden
    files."""
    loss_normalization: Literal["tokens", "positions"] = "tokens"
    """Divide the loss by the counted rows of the global batch (tokens) or by all its rows (positions, as in
    SpecForge)."""
    learning_rate: PositiveFloat = 1e-4
    """Peak learning rate of AdamW. Lower it to train an existing draft further."""
    min_learning_rate: NonNegativeFloat = 0.0
    """Learning rate at the end of the schedule."""
    warmup_ratio: Fraction = 0.03
    """Fraction of all optimizer steps in which the learning rate rises from 0 to its peak."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """AdamW betas: two numbers, as in [0.9, 0.95]."""
    adam_eps: PositiveFloat = 1e-8
    """AdamW epsilon."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW decoupled weight decay."""
    gradient_clipping: NonNegativeFloat = 0.5
    """Largest gradient norm; 0: no clipping."""
    gradient_accumulation: PositiveInt = 1
    """Sequences per optimizer step and data-parallel rank. Raise it for a larger batch without more GPUs."""
    epochs: PositiveInt = 1
    """Passes over the store."""
    max_steps: PositiveInt | None = None
    """Stop after this many optimizer steps; null: after all epochs. Set a small number to try a recipe."""
    seed: int = 0
    """Seed of the random weights and of the sampling order."""
    recompute: Literal["none", "selective", "mlp", "full"] = "none"
    """What the backward recomputes to save memory. none: nothing; selective: all but matmuls; mlp: MLP and
    output projection; full: K_0/V_0 as well. Take the first that fits; --plan predicts the memory of each."""
    offload_activations: bool = False
    """Move what the backward will need to pinned host memory. For contexts that do not fit with recompute
    full."""
    check_memory: bool = True
    """Refuse to start if the prediction exceeds the GPU's memory; false: warn and try."""
    non_finite: Literal["stop", "skip"] = "stop"
    """After a NaN or Inf in loss or gradient, all ranks stop the run or skip the optimizer step."""
    log_interval: PositiveInt = 1
    """Optimizer steps between log lines."""
    eval_interval: NonNegativeInt = 0
    """Optimizer steps between evaluations on eval_store; 0: never."""
    save_interval: NonNegativeInt = 0
    """Optimizer steps between checkpoints; 0: only at the end. An interrupted run loses at most this many
    steps."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints to keep; the best one is kept in addition."""
    best_by: Literal["simulated", "acceptance"] = "simulated"
    """Choose the best checkpoint by simulated acceptance length (cheap) or by that of real speculative
    decoding."""
    acceptance_interval: NonNegativeInt = 0
    """Optimizer steps between measurements by real speculative decoding, which loads the target; 0: never."""
    acceptance_prompts: PositiveInt = 4
    """Held-out prompts that each measurement decodes. More make it slower and less noisy."""

    @model_validator(mode="after")
    def _agree(self) -> TrainingConfig:
        low, high = self.min_learning_rate, self.learning_rate
        if low > high:
            raise ValueError(f"min_learning_rate={low} is above learning_rate={high}; lower it")
        if self.offload_activations and self.recompute == "selective":
            raise ValueError(
                "offload_activations cannot move what recompute=selective keeps on the GPU; "
                "use recompute none, mlp or full"
            )
        if self.best_by == "acceptance" and not self.acceptance_interval:
            needs = "best_by=acceptance needs acceptance_interval > 0"
            raise ValueError(f"{needs}; set it, or use best_by=simulated")
        return self
