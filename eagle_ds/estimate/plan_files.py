"""The part of ``--plan`` about files: what a run reads, writes and finds, and what is missing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from eagle_ds.config.recipe import Recipe
from eagle_ds.config.run_folder import find_draft
from eagle_ds.config.run_state import check_resumable, latest
from eagle_ds.config.sections import RopeScaling
from eagle_ds.config.settings import read_json
from eagle_ds.data.sources import DATASET_ID, FILE_ENDINGS
from eagle_ds.store.manifest import STORE_JSON, manifest_hash, read_manifest
from eagle_ds.target.files import is_hub_id
from eagle_ds.target.info import rope_of

Row = tuple[str, object, str]


def files_text(recipe: Recipe, world_size: int, capture_command: str) -> str:
    """Return a table of the files, then one line on an existing run and one on RoPE with ``init_from``.

    Args:
        world_size: number of ranks that the plan is for.
        capture_command: the shell command that captures the recipe's stores.
    """
    rows = [
        ("reads", recipe.target.model, _target_state(recipe.target.model)),
        *_data_rows(recipe, capture_command),
    ]
    rope = ""
    if recipe.draft.init_from:
        described = find_draft(Path(recipe.draft.init_from))
        state = "draft to start from" if described else "MISSING: no exported draft, checkpoint or run there"
        rows.append(("reads", recipe.draft.init_from, state))
        rope = _rope_line(recipe, described) if described else ""
    return table([*rows, *_written_rows(recipe)]) + _existing_run(recipe, world_size) + rope


def table(rows: Iterable[Sequence[object]]) -> str:
    """Pad every cell to the width of its column: whole numbers on the left, all others on the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    text = ""
    for row in cells:
        padding = zip(row, widths, strict=True)
        padded = [cell.rjust(width) if cell.isdigit() else cell.ljust(width) for cell, width in padding]
        text += "  ".join(padded).rstrip() + "\n"
    return text


def _target_state(model: str) -> str:
    if Path(model).expanduser().is_dir() or is_hub_id(model):
        return "the target's embedding and head"
    return "MISSING: no folder of a target there"


def _data_rows(recipe: Recipe, capture_command: str) -> Iterable[Row]:
    """Stores, and the conversations that they are captured from or that measure acceptance."""
    data = recipe.data
    measures = recipe.training.acceptance_interval > 0
    for store, conversations, decoded in (
        (data.store, data.conversations, False),
        (data.eval_store, data.eval_conversations, measures),
    ):
        captured = store is not None and (Path(store) / STORE_JSON).is_file()
        if store is not None:
            yield "reads", store, "exists" if captured else f"MISSING; capture it: {capture_command}"
        if conversations is None:
            continue
        purposes = [] if captured or store is None else [f"to capture {store}"]
        purposes += ["to measure acceptance while training"] if decoded else []
        needed = f"needed {' and '.join(purposes)}" if purposes else "not needed: the store is captured"
        yield "reads", conversations, f"{_state_of(conversations)}; {needed}"


def _state_of(conversations: str) -> str:
    if Path(conversations).is_file():
        return "exists"
    is_id = DATASET_ID.fullmatch(conversations) and not conversations.endswith(FILE_ENDINGS)
    return "data set on the Hugging Face hub" if is_id and not Path(conversations).is_dir() else "MISSING"


def _written_rows(recipe: Recipe) -> Iterable[Row]:
    vocabulary = Path(recipe.data.store) / f"vocab_{recipe.draft.vocab_size}.safetensors"
    if not recipe.draft.init_from:
        yield "writes", vocabulary, "draft vocabulary, unless it exists already"
    kept = recipe.training.keep_checkpoints
    for name, what in (
        ("recipe.json", "this recipe with all defaults and overrides"),
        ("log.jsonl", "one line per optimizer step"),
        ("eval.jsonl", "one line per evaluation"),
        ("tensorboard/", "if the DeepSpeed JSON enables it"),
        ("checkpoints/", f"the newest {kept}; the same command resumes from the newest"),
        ("best/", f"checkpoint with the best {recipe.training.best_by} acceptance length"),
        ("report.html", "curves, speed, memory, and how to serve the result"),
    ):
        yield "writes", recipe.run_dir / name, what


def _existing_run(recipe: Recipe, world_size: int) -> str:
    """Say whether the run folder holds a run, and whether this recipe on this many ranks can resume it."""
    store = Path(recipe.data.store)
    captured = (store / STORE_JSON).is_file()
    try:
        if (state := latest(recipe.run_dir)) is None:
            return ""
        data = manifest_hash(store, read_manifest(store)[1]) if captured else None
        changed = check_resumable(state, recipe, world_size, data)
    except ValueError as error:
        return f"CANNOT RESUME: {error}\n"
    settings = "".join(f"; {text}" for text in changed)
    return f"EXISTING RUN: resumes {recipe.run_dir} at step {state.step}{settings}\n"


def _rope_line(recipe: Recipe, described: Path) -> str:
    """Say whose RoPE is trained: that of the draft in ``init_from``, or the recipe's with override_rope."""
    draft = recipe.draft
    scaling = draft.rope_scaling.model_dump() if draft.rope_scaling else None
    recipes, own = _show_rope(draft.rope_theta, scaling), _show_rope(*rope_of(read_json(described)))
    if own == recipes:
        return f"ROPE: {own}, in the recipe and in the draft of init_from\n"
    if draft.override_rope:
        reason = "because draft.override_rope is set; that of the draft in init_from is not used"
        return f"ROPE: the recipe's ({recipes}), {reason} ({own})\n"
    unused = f"the recipe's ({recipes}) is not used; --draft.override_rope true would use it"
    return f"ROPE: that of the draft in init_from ({own}); {unused}\n"


def _show_rope(theta: float, scaling: dict[str, Any] | None) -> str:
    """Show settings that differ from their defaults, so that equal settings give equal texts."""
    defaults = RopeScaling().model_dump()
    given = {name: value for name, value in (scaling or {}).items() if value != defaults.get(name)}
    return f"theta {theta:g}, {f'scaling {json.dumps(given, sort_keys=True)}' if given else 'no scaling'}"
