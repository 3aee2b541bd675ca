"""Drafts on disk, read without DeepSpeed: a checkpoint of a run, a folder that we exported, or a published EAGLE-3 draft.

Whatever it was read from, a draft is the same three things: tensors under training names in float32, the architecture
that its own files describe, and its vocabulary map.
"""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from eagle_ds.config.recipe import Recipe, load_recipe
from eagle_ds.config.run_folder import RECIPE_FILE, draft_candidates
from eagle_ds.config.settings import read_json
from eagle_ds.data.vocab import VocabMap
from eagle_ds.drafts.served import (
    EMBEDDING,
    VOCABULARY,
    arch_of_config,
    layer_outputs,
    tensor_shapes,
    training_name,
)
from eagle_ds.model.arch import DraftArch
from eagle_ds.model.draft import Eagle3Draft
from eagle_ds.target.info import TargetInfo

log = logging.getLogger(__name__)

ARCH_FILE, STATE_FILE, VOCAB_FILE = "arch.json", "draft_state.safetensors", "vocab.safetensors"
ROPE_FIELDS = ("rope_theta", "rope_scaling")
OWN_FIELDS = ("rms_norm_eps", "fc_norm", "norm_output", "norm_before_fc", *ROPE_FIELDS)  # a draft brings these; the rest must agree


@dataclass(frozen=True)
class DraftOnDisk:
    """A draft as its files describe it. ``layer_outputs``: target layers that it reads, None where its files do not say."""

    state: dict[str, Tensor]
    arch: DraftArch
    vocab: VocabMap
    folder: Path
    layer_outputs: tuple[int, ...] | None = None

    def build(self, embedding: Tensor | None, dtype: torch.dtype, device: torch.device | str = "cpu") -> Eagle3Draft:
        """The module, ready to run. ``embedding``: the target's [V, H], read only where the draft has none of its own."""
        return build_draft(self.arch, self.state, embedding, dtype, device)


def build_draft(
    arch: DraftArch, state: Mapping[str, Tensor], embedding: Tensor | None, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Eagle3Draft:
    """A draft in ``dtype`` with the given tensors, and the target's embedding where it shares it."""
    draft = Eagle3Draft(arch).to(device=device, dtype=dtype)
    draft.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()})
    if not arch.trains_embedding:
        assert embedding is not None, "a draft as wide as its target shares the target's embedding"
        draft.embed_tokens.weight = embedding.to(device=device, dtype=dtype)
    return draft.requires_grad_(False).eval()


def load_draft(path: str | Path) -> DraftOnDisk:
    """The draft at ``path``: an exported or published folder, a checkpoint, or a run folder (its best, else newest checkpoint).

    Raises ValueError, one sentence, where there is none or it cannot be read.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"draft {path} is not a folder; give an exported draft, a checkpoint, or a run folder")
    if (folder / "config.json").is_file():
        state, arch, vocab = load_served_draft(folder)
        return DraftOnDisk(state, arch, vocab, folder, served_layers(folder))
    return load_checkpoint(find_checkpoint(folder))


def find_checkpoint(folder: Path) -> Path:
    """``folder`` itself where it is a checkpoint, else a run's best one, else its newest."""
    for candidate in draft_candidates(folder):
        if (candidate / ARCH_FILE).is_file():
            return candidate
    raise ValueError(f"{folder} holds no draft: no config.json (exported), no {ARCH_FILE} (checkpoint), nor one in best/ or checkpoints/")


def load_checkpoint(folder: Path) -> DraftOnDisk:
    """A checkpoint of a run: ``draft_state.safetensors``, ``arch.json`` and ``vocab.safetensors``."""
    tree = read_json(folder / ARCH_FILE)
    try:
        arch = TypeAdapter(DraftArch).validate_python({field.name: tree[field.name] for field in fields(DraftArch) if field.name in tree})
    except ValidationError as error:
        raise ValueError(f"{folder / ARCH_FILE} does not describe a draft: {error.errors()[0]['msg']}") from error
    state = {name: tensor.float() for name, tensor in _read_safetensors(folder / STATE_FILE).items()}
    _check_tensors(state, arch, folder)
    try:
        vocab = VocabMap.load(folder / VOCAB_FILE)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder / VOCAB_FILE} cannot be read: {error}") from error
    recipe = recipe_of(folder)
    return DraftOnDisk(state, arch, vocab, folder, recipe.target.aux_ids if recipe else None)


def run_of(folder: Path) -> Path | None:
    """The run folder that a checkpoint or an export lies in (or that ``folder`` is), None outside a run."""
    for candidate in (folder, folder.parent, folder.parent.parent):
        if (candidate / RECIPE_FILE).is_file():
            return candidate
    return None


def recipe_of(folder: Path) -> Recipe | None:
    """The resolved recipe of the run that ``folder`` lies in, None outside a run."""
    run_dir = run_of(folder)
    return load_recipe(run_dir / RECIPE_FILE) if run_dir else None


def load_served_draft(folder: str | Path) -> tuple[dict[str, Tensor], DraftArch, VocabMap]:
    """(tensors under training names in float32, architecture, vocabulary map) of an exported or published draft.

    Rope and norms are those of its own config.json; a missing rope base means 10000, as it does to engines. With D = H its
    copy of the target's embedding, if it has one, is left out. Raises ValueError, one sentence, for anything unaccounted for.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    try:
        arch = arch_of_config(config)
    except ValueError as error:
        raise ValueError(f"draft {folder} cannot be used: {error}") from error
    tensors = {training_name(name): tensor for name, tensor in read_tensors(folder).items()}
    vocab = _vocabulary({name: tensors.pop(name) for name in VOCABULARY if name in tensors}, arch, folder)
    if not arch.trains_embedding and tensors.pop(EMBEDDING, None) is not None:
        log.info("%s brings an embedding as wide as the target's; the target's own is used, as serving engines do", folder)
    state = {name: tensor.float() for name, tensor in tensors.items()}
    _check_tensors(state, arch, folder)
    return state, arch, vocab


def served_layers(folder: Path, target: TargetInfo | None = None) -> tuple[int, ...] | None:
    """Layer outputs that a served draft reads, None where its config.json does not say."""
    config = read_json(folder / "config.json")
    ids = (config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    if ids:
        return tuple(layer_outputs(ids, target.model_type if target else None, target.num_layers if target else None))
    entering = config.get("eagle_aux_hidden_state_layer_ids")
    return tuple(layer - 1 for layer in entering) if entering else None


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a Hugging Face folder: safetensors, whole or in shards, else pytorch_model.bin (never unpickling code)."""
    paths = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not paths:
        raise ValueError(f"draft {folder} has neither *.safetensors nor pytorch_model.bin; fetch its weights too")
    tensors: dict[str, Tensor] = {}
    for path in paths:
        tensors |= _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    return tensors


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is damaged, or holds more than tensors and is not opened for that reason") from error
    if not isinstance(loaded, dict) or not all(isinstance(tensor, Tensor) for tensor in loaded.values()):
        raise ValueError(f"{path} holds no dictionary of tensors")
    return loaded


def _vocabulary(maps: dict[str, Tensor], arch: DraftArch, folder: Path) -> VocabMap:
    """The map of d2t and t2d; the identity where there is none and the sizes allow it."""
    if "d2t" not in maps:
        if arch.draft_vocab_size != arch.target_vocab_size:
            raise ValueError(f"draft {folder} has {arch.draft_vocab_size} of {arch.target_vocab_size} tokens but no d2t to say which")
        return VocabMap.identity(arch.target_vocab_size)
    d2t = maps["d2t"].to(torch.int64)
    expected = {"d2t": arch.draft_vocab_size, "t2d": arch.target_vocab_size}
    for name, tensor in maps.items():
        if tuple(tensor.shape) != (expected[name],):
            raise ValueError(f"draft {folder}: {name} has shape {list(tensor.shape)} where its config.json means [{expected[name]}]")
    try:
        if "t2d" in maps:
            return VocabMap(d2t, maps["t2d"].to(torch.bool))
        return VocabMap.from_target_ids(d2t + torch.arange(d2t.numel()), arch.target_vocab_size)
    except (ValueError, IndexError) as error:
        raise ValueError(f"draft {folder}: {error}") from error


def _check_tensors(state: Mapping[str, Tensor], arch: DraftArch, folder: Path) -> None:
    """Every tensor there, none unknown, each in its shape."""
    shapes = tensor_shapes(arch)
    if missing := sorted(shapes.keys() - state.keys()):
        raise ValueError(f"draft {folder} lacks the tensors {', '.join(missing)}")
    if unknown := sorted(state.keys() - shapes.keys()):
        raise ValueError(f"draft {folder} holds tensors that this architecture has no place for: {', '.join(unknown)}")
    for name, shape in shapes.items():
        if tuple(state[name].shape) != shape:
            raise ValueError(f"draft {folder}: {name} has shape {list(state[name].shape)} where its configuration means {list(shape)}")


def untrained_draft(arch: DraftArch, vocab: VocabMap, seed: int = 0) -> DraftOnDisk:
    """Where training starts without ``init_from``: everything random. The target's own head and final norm are no start: over
    random states their logits are large and wrong (SmolLM2: twice the loss of a random head), and it takes steps to shrink them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Eagle3Draft(arch)
    state = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return DraftOnDisk(state, arch, vocab, Path("untrained"))


def initial_draft(recipe: Recipe, target: TargetInfo | None = None) -> DraftOnDisk:
    """What ``draft.init_from`` starts from: tensors, vocabulary and norms of that draft, sizes checked against the recipe.

    Rope is the draft's own unless ``draft.override_rope``; the maximum length is the recipe's, which the export then
    states. Raises ValueError, one sentence, where a size, the vocabulary or the captured layers differ.
    """
    assert recipe.draft.init_from is not None
    folder = Path(recipe.draft.init_from)
    found = load_draft(folder)
    if target and (folder / "config.json").is_file():
        found = replace(found, layer_outputs=served_layers(folder, target))
    wanted = DraftArch.from_recipe(recipe)
    own = {name: getattr(found.arch, name) for name in OWN_FIELDS}
    if recipe.draft.override_rope:
        own |= {name: getattr(wanted, name) for name in ROPE_FIELDS}
    for name, value in own.items():
        if value != getattr(wanted, name):
            log.info("draft.%s is %s, as in %s; the recipe's %s is not used", name, _show(value), folder, _show(getattr(wanted, name)))
    if recipe.draft.override_rope:
        log.info("rope is the recipe's (%s) in place of the draft's own (%s), as override_rope says", _rope(wanted), _rope(found.arch))
    arch = replace(wanted, **own)
    _check_sizes(arch, found, recipe)
    return replace(found, arch=arch)


def _check_sizes(arch: DraftArch, found: DraftOnDisk, recipe: Recipe) -> None:
    """The draft on disk must have the recipe's sizes, read the recipe's target and the recipe's layers."""
    for field in fields(DraftArch):
        if field.name in (*OWN_FIELDS, "max_position_embeddings"):
            continue
        stated, actual = getattr(arch, field.name), getattr(found.arch, field.name)
        if stated != actual:
            raise ValueError(
                f"draft.init_from={found.folder} has {field.name} {actual} where the recipe says {stated}; write {actual}, or start afresh"
            )
    if found.layer_outputs and tuple(found.layer_outputs) != recipe.target.aux_ids:
        raise ValueError(
            f"draft.init_from={found.folder} reads the outputs of target layers {list(found.layer_outputs)} where the recipe captures "
            f"{list(recipe.target.aux_ids)}; set target.aux_layer_ids to {list(found.layer_outputs)} and capture again"
        )


def _rope(arch: DraftArch) -> str:
    return f"theta {arch.rope_theta:g}, scaling {_show(arch.rope_scaling)}"


def _show(value: Any) -> str:
    return json.dumps(value.model_dump(exclude_none=True)) if hasattr(value, "model_dump") else str(value)
