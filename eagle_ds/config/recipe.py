"""The recipe: one typed tree that mirrors ``recipes/NAME.json``, validated once at the edge.

Who owns which value: the recipe owns target, draft, data, layout, batch, schedule, learning rate and
clipping; the DeepSpeed JSON owns ZeRO, precision, offload, communication and monitors. What follows from both
is derived in ``eagle_ds/config/deepspeed.py``.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from eagle_ds.config.settings import apply_overrides, explain, join_or, parse_overrides, read_json

NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]

ROPE_NEEDS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}


class Section(BaseModel):
    """A part of the recipe: immutable, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class RopeScaling(Section):
    """Rotary scaling as in a Hugging Face ``config.json``."""

    rope_type: Literal["default", "linear", "llama3", "yarn"] = Field("default", description="kind of scaling")
    factor: PositiveFloat = Field(1.0, description="how far positions are stretched")
    original_max_position_embeddings: PositiveInt | None = Field(None, description="llama3, yarn: length before stretching")
    low_freq_factor: PositiveFloat | None = Field(None, description="llama3: wavelengths above original/low are stretched")
    high_freq_factor: PositiveFloat | None = Field(None, description="llama3: wavelengths below original/high are left alone")
    beta_fast: PositiveFloat = Field(32.0, description="yarn: rotations above which a dimension is left alone")
    beta_slow: PositiveFloat = Field(1.0, description="yarn: rotations below which a dimension is stretched")
    mscale: float | None = Field(None, description="yarn: attention scale")
    mscale_all_dim: float | None = Field(None, description="yarn: attention scale of all dimensions")
    attention_factor: PositiveFloat | None = Field(None, description="yarn: attention scale given outright")
    truncate: bool = Field(True, description="yarn: round the correction range to whole dimensions")

    @model_validator(mode="after")
    def _complete(self) -> RopeScaling:
        given = {name for name in self.model_fields_set if getattr(self, name) is not None}
        lacking = [name for name in ROPE_NEEDS.get(self.rope_type, ()) if name not in given]
        if lacking:
            raise ValueError(f"rope_type {self.rope_type} needs {', '.join(lacking)}; copy rope_scaling whole from the model's config.json")
        return self


class TargetConfig(Section):
    """The target model: where it is, and the sizes that everything else is checked against."""

    model: str = Field(description="Hugging Face id or a local folder")
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("bfloat16", description="type the target runs in at capture")
    hidden_size: PositiveInt = Field(description="H, as in the target's config.json")
    num_layers: PositiveInt = Field(description="L, num_hidden_layers of the target's config.json")
    vocab_size: PositiveInt = Field(description="V, as in the target's config.json")
    aux_layer_ids: tuple[NonNegativeInt, NonNegativeInt, NonNegativeInt] | None = Field(
        None, description="layers whose outputs are captured, numbered from 0; null: [1, L//2-1, L-4]"
    )

    @property
    def aux_ids(self) -> tuple[int, int, int]:
        """Layer outputs captured, 0-based (SGLang's numbering)."""
        if self.aux_layer_ids is not None:
            return self.aux_layer_ids
        return (1, self.num_layers // 2 - 1, self.num_layers - 4)

    @model_validator(mode="after")
    def _layers_exist(self) -> TargetConfig:
        if any(not 0 <= layer < self.num_layers for layer in self.aux_ids):
            raise ValueError(f"aux_layer_ids={list(self.aux_ids)} must lie in 0..{self.num_layers - 1} (num_layers={self.num_layers})")
        return self


class DraftConfig(Section):
    """Draft architecture: one decoder layer over fused target states (EAGLE-3, arXiv:2503.01840)."""

    hidden_size: PositiveInt = Field(description="D; equal to the target's H it shares the target's frozen embedding")
    intermediate_size: PositiveInt = Field(description="width of the SwiGLU MLP")
    num_attention_heads: PositiveInt = Field(description="query heads Hq")
    num_key_value_heads: PositiveInt = Field(description="key/value heads Hkv, a divisor of Hq")
    head_dim: PositiveInt = Field(description="d; it need not be D / Hq, which is taken where none is given")
    vocab_size: PositiveInt = Field(description="draft vocabulary Vd, at most the target's")
    rms_norm_eps: PositiveFloat = Field(1e-5, description="epsilon of every RMSNorm")
    rope_theta: PositiveFloat = Field(description="rotary base; always written, a missing key means 10000 to a server")
    rope_scaling: RopeScaling | None = Field(None, description="rotary scaling; null: none")
    sliding_window: PositiveInt | None = Field(None, description="keys a row sees back from itself; null: all")
    attention_bias: bool = Field(False, description="biases in q, k, v and o projections")
    fc_norm: bool = Field(False, description="norm each aux state before fusing (EAGLE-3.1)")
    norm_output: bool = Field(False, description="feed the normed state to the next step (EAGLE-3.1)")
    norm_before_fc: bool = Field(False, description="norm the three aux states together before fusing")
    init_from: str | None = Field(None, description="folder of a draft to start from, ours or a published EAGLE-3 one")
    override_rope: bool = Field(False, description="with init_from: use this recipe's rope instead of the draft's own")

    @model_validator(mode="before")
    @classmethod
    def _default_head_dim(cls, values: Any) -> Any:
        """D / Hq where no head_dim is given; what else is wrong with D and Hq is found later."""
        if not isinstance(values, dict) or values.get("head_dim") is not None:
            return values
        hidden, heads = (values.get(name) for name in ("hidden_size", "num_attention_heads"))
        if not all(isinstance(size, int) and size > 0 for size in (hidden, heads)):
            return values
        if hidden % heads:
            near = sorted(sorted(divisors(hidden), key=lambda number: abs(number - heads))[:3])
            raise ValueError(f"hidden_size={hidden} is no multiple of {heads} query heads; use {join_or(near)} heads, or give head_dim")
        return values | {"head_dim": hidden // heads}

    @model_validator(mode="after")
    def _heads_divide(self) -> DraftConfig:
        if self.num_attention_heads % self.num_key_value_heads:
            fits = join_or(divisors(self.num_attention_heads))
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} does not divide {self.num_attention_heads} query heads; use {fits}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary embedding turns pairs of dimensions, so use an even one")
        return self


class DataConfig(Section):
    """Stored hidden states and how samples become sequences. Relative paths start at the repository."""

    conversations: str | None = Field(None, description="JSONL of conversations that the store is captured from")
    eval_conversations: str | None = Field(None, description="JSONL of held-out conversations")
    store: str = Field(description="folder of captured hidden states to train on")
    eval_store: str | None = Field(None, description="folder of held-out hidden states")
    max_length: PositiveInt = Field(description="longest sample in tokens")
    overlong: Literal["truncate", "skip"] = Field("truncate", description="what happens to a longer one; either way it is counted")
    pack_tokens: PositiveInt | None = Field(None, description="pack short samples up to this many tokens; null: one sample a sequence")
    prefetch: PositiveInt = Field(2, description="sequences read ahead of the one that trains")
    read_processes: NonNegativeInt | None = Field(
        None, description="processes a rank reads and inflates with; 0: a thread of the trainer; null: 4 for a GPU, 0 on CPU"
    )


class ParallelConfig(Section):
    """Layout: world_size = dp * ulysses * ring, dp is what is left over."""

    ulysses: PositiveInt = Field(1, description="ranks that split the heads of one sequence; must divide Hq (KV heads are replicated)")
    ring: PositiveInt = Field(1, description="ranks that split the context of one sequence")
    ring_mode: Literal["auto", "gather", "p2p"] = Field("auto", description="keep K_0/V_0 of all ranks, or rotate them; auto: by memory")
    trained_rows_only: bool = Field(True, description="compute queries for trained rows only (exact); false is for comparison")

    @property
    def size(self) -> int:
        """Ranks that share one sequence, P."""
        return self.ulysses * self.ring


class TrainingConfig(Section):
    """Test-time-training objective and schedule."""

    ttt_steps: PositiveInt = Field(7, description="T, draft tokens unrolled in training")
    loss: Literal["kl", "alpha", "lambda"] = Field("kl", description="soft cross-entropy, or one of the acceptance losses")
    step_decay: PositiveFloat = Field(0.8, description="weight of step k is step_decay ** k")
    kl_scale: PositiveFloat = Field(1.0, description="loss lambda: w = kl_scale * exp(-kl_decay * mean alpha of a micro-batch)")
    kl_decay: PositiveFloat = Field(3.0, description="loss lambda: see kl_scale")
    mask_alignment: Literal["serving", "feature"] = Field("serving", description="which rows count at step k; feature is the golden files'")
    loss_normalization: Literal["tokens", "positions"] = Field("tokens", description="divide by the global batch's counted rows, or by all")
    learning_rate: PositiveFloat = Field(1e-4, description="peak learning rate of AdamW")
    min_learning_rate: NonNegativeFloat = Field(0.0, description="where the schedule ends")
    warmup_ratio: Fraction = Field(0.03, description="share of all steps spent rising to learning_rate")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="shape after the warm-up")
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="AdamW betas")
    adam_eps: PositiveFloat = Field(1e-8, description="AdamW epsilon")
    weight_decay: NonNegativeFloat = Field(0.0, description="AdamW decoupled weight decay")
    gradient_clipping: NonNegativeFloat = Field(0.5, description="largest gradient norm; 0: no clipping")
    gradient_accumulation: PositiveInt = Field(1, description="sequences per optimizer step and data-parallel rank")
    epochs: PositiveInt = Field(1, description="passes over the store")
    max_steps: PositiveInt | None = Field(None, description="stop after this many optimizer steps; null: epochs decide")
    seed: int = Field(0, description="of initialisation and sampling order")
    recompute: Literal["none", "selective", "mlp", "full"] = Field(
        "none", description="what is computed again to save memory: nothing, all but matmuls, MLP and output projection, also K_0/V_0"
    )
    offload_activations: bool = Field(False, description="keep what the TTT steps leave for the backward in pinned host memory")
    check_memory: bool = Field(True, description="refuse, before training, what is predicted not to fit the GPU; false: try it")
    non_finite: Literal["stop", "skip"] = Field("stop", description="on a NaN or Inf loss or gradient: all ranks stop or skip the step")
    log_interval: PositiveInt = Field(1, description="optimizer steps between log lines")
    eval_interval: NonNegativeInt = Field(0, description="optimizer steps between evaluations on eval_store; 0: never")
    save_interval: NonNegativeInt = Field(0, description="optimizer steps between checkpoints; 0: only at the end")
    keep_checkpoints: PositiveInt = Field(2, description="checkpoints kept besides the best")
    best_by: Literal["simulated", "acceptance"] = Field("simulated", description="best checkpoint by simulated or real acceptance length")
    acceptance_interval: NonNegativeInt = Field(0, description="real speculative decoding every so many steps; 0: never")
    acceptance_prompts: PositiveInt = Field(4, description="held-out prompts it decodes")

    @model_validator(mode="after")
    def _agree(self) -> TrainingConfig:
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(f"min_learning_rate={self.min_learning_rate} is above learning_rate={self.learning_rate}; lower it")
        if self.offload_activations and self.recompute == "selective":
            raise ValueError(
                "offload_activations moves what autograd keeps, and recompute=selective keeps its matmuls' results elsewhere, on the GPU; "
                "use recompute none, mlp or full"
            )
        if self.best_by == "acceptance" and not self.acceptance_interval:
            raise ValueError("best_by=acceptance needs acceptance_interval > 0; set it, or use best_by=simulated")
        return self


class Recipe(Section):
    """One training run, readable as data."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="letters, digits, dot, dash, underscore; names the run folder")
    target: TargetConfig = Field(description="the model that is served")
    draft: DraftConfig = Field(description="the model that is trained")
    data: DataConfig = Field(description="stored hidden states")
    parallel: ParallelConfig = Field(ParallelConfig(), description="how one sequence is spread over GPUs")
    training: TrainingConfig = Field(TrainingConfig(), description="objective and schedule")
    deepspeed: str = Field(description="path of the DeepSpeed JSON, relative to the repository")
    output_dir: str | None = Field(None, description="run folder; null: runs/NAME")

    @property
    def caveats(self) -> tuple[str, ...]:
        """What this recipe trains otherwise than its user may think, or not every engine serves, a sentence each."""
        draft, training, said = self.draft, self.training, []
        if training.loss == "lambda" and training.gradient_accumulation > 1:
            said.append(
                "training.loss lambda: w follows the mean alpha of the rows that all ranks count in one micro-batch, so each of the "
                f"{training.gradient_accumulation} micro-batches of a step has its own; that of the whole step would take a forward over "
                "all of them before the first backward"
            )
        if draft.attention_bias:
            said.append("draft.attention_bias: SGLang drops these biases without a word, so only export_draft --vllm writes such a draft")
        if draft.hidden_size % draft.num_attention_heads:
            said.append(
                f"draft.hidden_size={draft.hidden_size} is no multiple of {draft.num_attention_heads} heads: engines read config.json with "
                "transformers, which refuses that whatever head_dim is, so such a draft cannot be exported"
            )
        return tuple(said)

    @property
    def run_dir(self) -> Path:
        """Folder of this run's log, checkpoints and report."""
        return Path(self.output_dir) if self.output_dir else Path("runs") / self.name

    @model_validator(mode="after")
    def _parts_fit(self) -> Recipe:
        if self.draft.vocab_size > self.target.vocab_size:
            raise ValueError(f"draft.vocab_size={self.draft.vocab_size} is above target.vocab_size={self.target.vocab_size}; at most equal")
        if self.training.eval_interval and self.data.eval_store is None:
            raise ValueError(f"training.eval_interval={self.training.eval_interval} needs data.eval_store; set it, or eval_interval to 0")
        if self.training.acceptance_interval and self.data.eval_conversations is None:
            raise ValueError("training.acceptance_interval needs data.eval_conversations; set it, or acceptance_interval to 0")
        check_heads(self.parallel, self.draft)
        return self


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in the JSON file ``path`` with dotted ``overrides`` (``--training.max_steps 10``) applied.

    Raises ValueError, one sentence, for a file that cannot be read, an unknown key (with the nearest valid name),
    a wrong value, or an equation that does not hold.
    """
    values = parse_overrides(Recipe, overrides)
    tree = apply_overrides(read_json(path), values)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise ValueError(f"{path}{' with overrides' if values else ''}: {explain(error, Recipe)}") from None


def check_heads(parallel: ParallelConfig, draft: DraftConfig) -> None:
    """Ulysses splits the query heads evenly. Raises ValueError with the degrees that do."""
    heads = draft.num_attention_heads
    if heads % parallel.ulysses:
        raise ValueError(f"ulysses={parallel.ulysses} does not divide {heads} query heads; use {join_or(divisors(heads))}, or raise ring")


def data_parallel_size(recipe: Recipe, world_size: int) -> int:
    """dp = world_size / (ulysses * ring). Raises ValueError with the layouts that fit ``world_size``."""
    parallel = recipe.parallel
    if world_size % parallel.size == 0:
        return world_size // parallel.size
    fits = [
        f"ulysses {u} ring {p // u}"
        for p in divisors(world_size)
        for u in divisors(recipe.draft.num_attention_heads)
        if p % u == 0
    ]
    raise ValueError(
        f"world_size = dp * ulysses * ring does not hold: {world_size} ranks are no multiple of "
        f"ulysses {parallel.ulysses} * ring {parallel.ring} = {parallel.size}; with {world_size} ranks use {join_or(fits)}"
    )


def divisors(number: int) -> list[int]:
    """Every positive divisor, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def capture_command(recipe_json: Path, overrides: Sequence[str] = ()) -> str:
    """What makes the stores of a recipe; of the overrides it repeats those that a capture reads."""
    read = {name: value for name, value in parse_overrides(Recipe, overrides).items() if name.startswith(("target.", "data."))}
    again = [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in read.items()]
    return shlex.join(["python", "tools/prepare_hidden_states.py", "--recipe", str(recipe_json), *again])
