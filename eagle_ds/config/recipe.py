"""The recipe: one typed tree that mirrors ``recipes/NAME.json``. It is validated once, when it is loaded.

The recipe owns target, draft, data, layout, batch, schedule, learning rate and clipping. The DeepSpeed JSON
owns ZeRO, precision, offload of the optimizer, communication and monitors. ``config/deepspeed.py`` joins the
two.

The sections and the meaning of every setting are in ``config/sections.py``.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator
from pydantic_core import ValidationError

from eagle_ds.config.run_folder import RECIPE_FILE
from eagle_ds.config.sections import (
    DataConfig,
    DraftConfig,
    ParallelConfig,
    Section,
    TargetConfig,
    TrainingConfig,
    divisors,
)
from eagle_ds.config.settings import apply_overrides, explain, join_or, parse_overrides, read_json

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Recipe(Section):
    """One training run, readable as data."""

    name: Name
    """Name of the run and its folder: letters, digits, dot, dash and underscore. Leave it out of the JSON: it
    is then the file's name."""
    target: TargetConfig
    """The model that is served."""
    draft: DraftConfig
    """The model that is trained."""
    data: DataConfig
    """Stored hidden states, and how samples become sequences."""
    parallel: ParallelConfig = ParallelConfig()
    """How one sequence is spread over GPUs."""
    training: TrainingConfig = TrainingConfig()
    """Objective, optimizer, schedule, memory, and what is logged and saved."""
    deepspeed: str
    """Path of the DeepSpeed JSON, relative to the repository; ds_configs/README.md says which to take."""
    output_dir: str | None = None
    """Run folder; null: runs/NAME."""

    @property
    def caveats(self) -> tuple[str, ...]:
        """Warnings for the user of this recipe, one sentence each. They do not prevent training."""
        draft, training, said = self.draft, self.training, []
        if training.loss == "lambda" and training.gradient_accumulation > 1:
            said.append(
                "training.loss lambda: the weight of kl follows the mean alpha of one micro-batch over all "
                f"ranks, so each of the {training.gradient_accumulation} micro-batches has its own; "
                "a common weight would need an extra forward over all of them"
            )
        only_vllm = "so such a draft can only be exported with export_draft --vllm"
        if draft.attention_bias:
            said.append(f"draft.attention_bias: SGLang drops these biases without a warning, {only_vllm}")
        for name in ("norm_before_residual", "qk_norm"):
            if getattr(draft, name):
                said.append(f"draft.{name}: SGLang ignores this norm without a warning, {only_vllm}")
        if max(self.target.aux_ids) == self.target.num_layers - 1:
            said.append(
                f"target.aux_layer_ids {list(self.target.aux_ids)} names the last layer, whose output SGLang "
                f"cannot capture for most targets, {only_vllm}"
            )
        if draft.hidden_size % draft.num_attention_heads:
            said.append(
                f"draft.hidden_size={draft.hidden_size} is no multiple of {draft.num_attention_heads} heads: "
                "such a draft cannot be exported, because engines read config.json with transformers, which "
                "refuses these sizes whatever head_dim is"
            )
        return tuple(said)

    @property
    def run_dir(self) -> Path:
        """Folder of this run's log, checkpoints and report."""
        return Path(self.output_dir) if self.output_dir else Path("runs") / self.name

    @model_validator(mode="after")
    def _sections_fit(self) -> Recipe:
        draft, target, every = self.draft, self.target, self.training.eval_interval
        if draft.vocab_size > target.vocab_size:
            sizes = f"draft.vocab_size={draft.vocab_size} is above target.vocab_size={target.vocab_size}"
            raise ValueError(f"{sizes}; use at most the target's")
        if every and self.data.eval_store is None:
            needs = f"training.eval_interval={every} needs data.eval_store"
            raise ValueError(f"{needs}; set it, or eval_interval to 0")
        if self.training.acceptance_interval and self.data.eval_conversations is None:
            needs = "training.acceptance_interval needs data.eval_conversations"
            raise ValueError(f"{needs}; set it, or acceptance_interval to 0")
        heads, ulysses = draft.num_attention_heads, self.parallel.ulysses
        if heads % ulysses:
            wrong = f"ulysses={ulysses} does not divide {heads} query heads"
            raise ValueError(f"{wrong}; use {join_or(divisors(heads))}, or raise ring")
        return self


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load the recipe in the JSON file ``path`` and apply dotted ``overrides`` such as ``--training.max_steps
    10``.

    Without a ``name``, the recipe takes the name of its file.

    Raises:
        ValueError: one sentence, for a file that cannot be read, an unknown key (with the nearest valid
            name), a wrong value, or values that contradict each other.
    """
    values = parse_overrides(Recipe, overrides)
    tree = {"name": Path(path).stem} | apply_overrides(read_json(path), values)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        source = f"{path}{' with overrides' if values else ''}"
        raise ValueError(f"{source}: {explain(error, Recipe)}") from None


def load_own_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe that a user runs, as `load_recipe` does, and refuse one that has another recipe's name.

    A copied JSON that kept its ``name`` would write into the run folder of the original. ``--name`` among the
    overrides is accepted, and so is the recipe.json of a run folder.
    """
    recipe, path = load_recipe(path, overrides), Path(path)
    chosen = "name" in parse_overrides(Recipe, overrides) or path.name == RECIPE_FILE
    if recipe.name != path.stem and not chosen:
        raise ValueError(
            f"{path} has name = {recipe.name}, which is not the file's name, so it would use the run folder "
            f"{recipe.run_dir}; delete that line (the name is then {path.stem}), or give --name"
        )
    return recipe


def capture_command(recipe_json: Path, overrides: Sequence[str] = ()) -> str:
    """Return the shell command that captures the stores of a recipe.

    The command contains those of ``overrides`` that change target or data.
    """
    values = parse_overrides(Recipe, overrides).items()
    repeated = [
        f"--{name}={value if isinstance(value, str) else json.dumps(value)}"
        for name, value in values if name.startswith(("target.", "data."))
    ]
    return shlex.join(["python", "tools/prepare_hidden_states.py", "--recipe", str(recipe_json), *repeated])


def data_parallel_size(recipe: Recipe, world_size: int) -> int:
    """Return dp = world_size / (ulysses * ring).

    Raises ValueError with the layouts that fit ``world_size``.
    """
    parallel = recipe.parallel
    if world_size % parallel.size == 0:
        return world_size // parallel.size
    heads = divisors(recipe.draft.num_attention_heads)
    fits = [f"ulysses {u} ring {p // u}" for p in divisors(world_size) for u in heads if p % u == 0]
    raise ValueError(
        f"world_size = dp * ulysses * ring does not hold: {world_size} ranks are no multiple of "
        f"ulysses {parallel.ulysses} * ring {parallel.ring} = {parallel.size}; "
        f"with {world_size} ranks use {join_or(fits)}"
    )
