"""Load a draft from disk: a checkpoint of a run, an exported folder, or a published EAGLE-3 draft.

DeepSpeed is not needed.

Every source gives the same three things: float32 tensors under their training names, the architecture that
the draft's own files describe, and its vocabulary map.
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
from eagle_ds.config.run_folder import ARCH_FILE, RECIPE_FILE, find_draft
from eagle_ds.config.sections import RopeScaling
from eagle_ds.config.settings import read_json
from eagle_ds.data.vocab import VocabMap
from eagle_ds.drafts import published_format as published
from eagle_ds.drafts import serving_format as served
from eagle_ds.model.arch import DraftArch
from eagle_ds.model.draft import Eagle3Draft
from eagle_ds.target.info import TargetInfo

logger = logging.getLogger(__name__)

STATE_FILE, VOCAB_FILE = "draft_state.safetensors", "vocab.safetensors"
ROPE_FIELDS = ("rope_theta", "rope_scaling")
# With init_from these come from the draft; all other fields must equal the recipe's.
OWN_FIELDS = (
    "rms_norm_eps", "fc_norm", "norm_output", "norm_before_fc", "norm_before_residual", "qk_norm",
    *ROPE_FIELDS,
)


@dataclass(frozen=True)
class DraftOnDisk:
    """A draft as its files describe it.

    ``layer_outputs``: the target layers that it reads; None if its files do not say.
    """

    state: dict[str, Tensor]
    arch: DraftArch
    vocab: VocabMap
    folder: Path
    layer_outputs: tuple[int, ...] | None = None

    def build(
        self, embedding: Tensor | None, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> Eagle3Draft:
        """Build the module for inference.

        ``embedding``: the target's [V, H], used only by a draft without its own.
        """
        draft = Eagle3Draft(self.arch).to(device=device, dtype=dtype)
        draft.load_state_dict({name: tensor.to(dtype) for name, tensor in self.state.items()})
        if not self.arch.trains_embedding:
            assert embedding is not None, "a draft as wide as its target shares the target's embedding"
            draft.embed_tokens.weight = embedding.to(device=device, dtype=dtype)
        return draft.requires_grad_(False).eval()

    def check_target(self, info: TargetInfo, target: str | Path) -> None:
        """Raise ValueError if the draft was made for a target of other sizes than ``target``, with ``info``.
        """
        for name in ("hidden_size", "vocab_size"):
            stated, found = getattr(self.arch, f"target_{name}"), getattr(info, name)
            if found != stated:
                wrong = f"draft {self.folder} was made for a target with {name} {stated}"
                raise ValueError(f"{wrong}, but {target} has {found}; give the draft's own target")


def load_draft(path: str | Path, target: TargetInfo | None = None) -> DraftOnDisk:
    """Load the draft at ``path``.

    Args:
        path: an exported or published folder, a checkpoint, or a run. Of a run the best checkpoint is loaded,
            else the newest.
        target: see ``load_served_draft``.

    Raises:
        ValueError: one sentence, if there is no draft or it cannot be read.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"draft {path} is not a folder; give an exported draft, a checkpoint, or a run")
    if described := find_draft(folder):
        is_checkpoint = described.name == ARCH_FILE
        return load_checkpoint(described.parent) if is_checkpoint else load_served_draft(folder, target)
    looked_for = f"no config.json (exported), no {ARCH_FILE} (checkpoint), and none in best/ or checkpoints/"
    raise ValueError(f"{folder} holds no draft: {looked_for}")


def load_checkpoint(folder: Path) -> DraftOnDisk:
    """Load a run's checkpoint: ``draft_state.safetensors``, ``arch.json`` and ``vocab.safetensors``."""
    tree = read_json(folder / ARCH_FILE)
    if "max_position_embeddings" in tree:  # the name of trained_length before version 0.2
        tree.setdefault("trained_length", tree["max_position_embeddings"])
    try:
        known = {field.name: tree[field.name] for field in fields(DraftArch) if field.name in tree}
        if isinstance(known.get("rope_scaling"), dict):
            known["rope_scaling"] = RopeScaling.of_model(known["rope_scaling"])
        arch = TypeAdapter(DraftArch).validate_python(known)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise ValueError(f"{folder / ARCH_FILE} does not describe a draft: {reason}") from error
    state = {name: tensor.float() for name, tensor in _read_safetensors(folder / STATE_FILE).items()}
    _check_tensors(state, arch, folder)
    vocab = _vocabulary(_read_safetensors(folder / VOCAB_FILE), arch, folder)
    recipe = recipe_of(folder)
    return DraftOnDisk(state, arch, vocab, folder, recipe.target.aux_ids if recipe else None)


def run_of(folder: Path) -> Path | None:
    """Return the run folder that ``folder`` is or lies in (a checkpoint or an export); None outside a run."""
    return next((run for run in (folder, *folder.parents[:2]) if (run / RECIPE_FILE).is_file()), None)


def recipe_of(folder: Path) -> Recipe | None:
    """Return the recipe of the run that ``folder`` is or lies in; None outside a run."""
    run_dir = run_of(folder)
    return load_recipe(run_dir / RECIPE_FILE) if run_dir else None


def load_served_draft(folder: Path, target: TargetInfo | None = None) -> DraftOnDisk:
    """Load an exported or published draft.

    Rope and norms are those of its own config.json; without rope_theta it is 10000, as in the engines. With
    D = H a copy of the target's embedding is ignored.

    Args:
        target: the draft's target, if known. For some targets config.json numbers the layers differently.

    Raises:
        ValueError: one sentence, for anything that is not understood.
    """
    config = read_json(folder / "config.json")
    try:
        config = published.plain_config(config)
        arch = published.arch_of_config(config)
    except ValueError as error:
        raise ValueError(f"draft {folder} cannot be used: {error}") from error
    tensors = {published.training_name(name): tensor for name, tensor in _read_tensors(folder).items()}
    for name in tensors.keys() & set(published.COPIES):
        logger.info("%s has a copy of the target's %s, which drafting does not read", folder, name)
        del tensors[name]
    maps = {name: tensors.pop(name) for name in served.VOCABULARY if name in tensors}
    vocab = _vocabulary(maps, arch, folder)
    if not arch.trains_embedding and tensors.pop(served.EMBEDDING, None) is not None:
        text = "%s has a copy of the target's embedding; the target's own is used, as engines do"
        logger.info(text, folder)
    state = {name: tensor.float() for name, tensor in tensors.items()}
    _check_tensors(state, arch, folder)
    return DraftOnDisk(state, arch, vocab, folder, _served_layers(config, target))


def _served_layers(config: Mapping[str, Any], target: TargetInfo | None) -> tuple[int, ...] | None:
    """Return the target layers whose outputs a served draft reads; None if its config.json does not say."""
    if ids := (config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids"):
        return served.layer_outputs(ids, target)
    # vLLM's list names inputs of layers; the input of layer i + 1 is the output of layer i.
    inputs = config.get("eagle_aux_hidden_state_layer_ids")
    return tuple(layer - 1 for layer in inputs) if inputs else None


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read every tensor of a Hugging Face folder from its safetensors files.

    Without such files, pytorch_model.bin is read, and no code in it is run.
    """
    paths = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not paths:
        wrong = f"draft {folder} has neither *.safetensors nor pytorch_model.bin"
        raise ValueError(f"{wrong}; download its weights too")
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
        wrong = f"{path} is damaged, or holds more than tensors; such a file could run code and is not opened"
        raise ValueError(wrong) from error
    if not isinstance(loaded, dict) or not all(isinstance(tensor, Tensor) for tensor in loaded.values()):
        raise ValueError(f"{path} holds no dictionary of tensors")
    return loaded


def _vocabulary(maps: dict[str, Tensor], arch: DraftArch, folder: Path) -> VocabMap:
    """Build the vocabulary map from d2t and t2d.

    Without them, draft and target must have the same vocabulary size; the map is then the identity.
    """
    if "d2t" not in maps:
        if arch.draft_vocab_size != arch.target_vocab_size:
            sizes = f"{arch.draft_vocab_size} of {arch.target_vocab_size} tokens"
            raise ValueError(f"draft {folder} has {sizes} but no d2t to say which")
        return VocabMap.identity(arch.target_vocab_size)
    _check_shapes(maps, {"d2t": (arch.draft_vocab_size,), "t2d": (arch.target_vocab_size,)}, folder)
    d2t = maps["d2t"].to(torch.int64)
    try:
        if "t2d" in maps:
            return VocabMap(d2t, maps["t2d"].to(torch.bool))
        return VocabMap.from_target_ids(d2t + torch.arange(d2t.numel()), arch.target_vocab_size)
    except (ValueError, IndexError) as error:
        raise ValueError(f"draft {folder}: {error}") from error


def _check_tensors(state: Mapping[str, Tensor], arch: DraftArch, folder: Path) -> None:
    """Raise ValueError unless ``state`` has exactly the tensors of ``arch``, each in its shape."""
    shapes = served.tensor_shapes(arch)
    if missing := sorted(shapes.keys() - state.keys()):
        raise ValueError(f"draft {folder} lacks the tensors {', '.join(missing)}")
    if unknown := sorted(state.keys() - shapes.keys()):
        names = ", ".join(unknown)
        raise ValueError(f"draft {folder} holds tensors that this architecture does not have: {names}")
    _check_shapes(state, shapes, folder)


def _check_shapes(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    """Raise ValueError if a tensor has another shape than the one in ``shapes``."""
    for name, shape in shapes.items():
        if name in tensors and tuple(tensors[name].shape) != shape:
            wrong = f"{list(tensors[name].shape)}, but its configuration says {list(shape)}"
            raise ValueError(f"draft {folder}: {name} has shape {wrong}")


def untrained_draft(arch: DraftArch, vocab: VocabMap, seed: int = 0) -> DraftOnDisk:
    """Return a draft with random weights, from which training starts without ``init_from``.

    The head starts from random weights too. Starting from the target's head and final norm is worse: an
    untrained draft's states make their logits large and wrong (SmolLM2: twice the loss of a random head), and
    training first has to shrink them.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Eagle3Draft(arch)
    state = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return DraftOnDisk(state, arch, vocab, Path("untrained"))


def initial_draft(recipe: Recipe, target: TargetInfo | None = None) -> DraftOnDisk:
    """Load the draft of ``draft.init_from`` with its tensors, vocabulary and norms.

    Rope is the draft's own unless ``draft.override_rope`` is set. The trained length is the recipe's.

    Raises:
        ValueError: one sentence, if a size, the vocabulary or the captured layers differ from the recipe's.
    """
    assert recipe.draft.init_from is not None
    found, wanted = load_draft(recipe.draft.init_from, target), DraftArch.from_recipe(recipe)
    from_recipe = ROPE_FIELDS if recipe.draft.override_rope else ()
    own = {name: getattr(found.arch, name) for name in OWN_FIELDS if name not in from_recipe}
    for name, value in own.items():
        if value != (unused := getattr(wanted, name)):
            text = "draft.%s is %s, from %s; the recipe's %s is not used"
            logger.info(text, name, _show(value), recipe.draft.init_from, _show(unused))
    if from_recipe:
        ropes = [f"theta {a.rope_theta:g}, scaling {_show(a.rope_scaling)}" for a in (wanted, found.arch)]
        text = "rope is the recipe's (%s) in place of the draft's own (%s), because override_rope is set"
        logger.info(text, *ropes)
    arch = replace(wanted, **own)
    _check_sizes(arch, found, recipe)
    return replace(found, arch=arch)


def _check_sizes(arch: DraftArch, found: DraftOnDisk, recipe: Recipe) -> None:
    """Raise ValueError unless the loaded draft has the recipe's sizes and target layers."""
    for field in fields(DraftArch):
        if field.name in (*OWN_FIELDS, "trained_length"):
            continue
        stated, actual = getattr(arch, field.name), getattr(found.arch, field.name)
        if stated != actual:
            wrong = f"draft.init_from={found.folder} has {field.name} {actual} where the recipe says {stated}"
            raise ValueError(f"{wrong}; write {actual}, or set draft.init_from to null")
    layers, captured = list(found.layer_outputs or ()), list(recipe.target.aux_ids)
    if layers and layers != captured:
        raise ValueError(
            f"draft.init_from={found.folder} reads the outputs of target layers {layers} where the recipe "
            f"captures {captured}; set target.aux_layer_ids to {layers} and capture again"
        )


def _show(value: Any) -> str:
    return json.dumps(value.model_dump(exclude_none=True)) if hasattr(value, "model_dump") else str(value)
