"""Check what the user asked for, and derive the store's info and the rules for completing samples from it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from eagle_ds.convert.completion import Completer, FinalNorm
from eagle_ds.convert.hdf5_files import Hdf5Map
from eagle_ds.convert.masks import ConversationMasks
from eagle_ds.convert.survey import Survey
from eagle_ds.data.conversations import Intake
from eagle_ds.store.manifest import STORE_JSON, StoreInfo, check_same_store, read_store_info
from eagle_ds.target.files import load_target_weights, resolve_target

STORE_FOLDERS = ("writing", "samples")  # the folders that a store keeps its files in
INFO_FLAGS = {"target": "--target-name", "aux_layer_ids": "--aux-layer-ids", "vocab_size": "--vocab-size"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ConvertOptions:
    """A conversion as requested; None means not given.

    Raises ValueError for options that contradict each other.
    """

    source: Path
    destination: Path
    workers: int = 2
    mapping: Hdf5Map | None = None
    target: str | None = None
    revision: str | None = None
    target_name: str | None = None
    aux_layer_ids: tuple[int, ...] | None = None
    vocab_size: int | None = None
    cast: str | None = None
    final_norm: FinalNorm = "auto"
    token_labels: bool = True
    head_device: str = "auto"
    dataset: Path | None = None
    max_length: int = 1 << 20
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    strict: bool = False
    verify: bool = False
    delete_source: bool = False

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"--workers is {self.workers}, expected at least 1")
        source, destination = self.source.resolve(), self.destination.resolve()
        if destination == source or destination.is_relative_to(source):
            detail = f"destination {self.destination} lies inside the source {self.source}"
            raise ValueError(f"{detail}; choose a folder outside")
        if any(source.is_relative_to(destination / folder) for folder in STORE_FOLDERS):
            detail = f"source {self.source} lies where the store {self.destination} keeps its own files"
            raise ValueError(f"{detail}; choose another source or destination")
        if self.dataset is not None and self.target is None:
            raise ValueError("--dataset needs --target, whose tokenizer and chat template make the loss mask")
        if self.dataset is not None and not self.dataset.is_file():
            raise ValueError(f"--dataset {self.dataset} is not a file; give a JSONL file of conversations")
        if self.head_device.startswith("cuda") and not torch.cuda.is_available():
            detail = f"--head-device is {self.head_device}, but there is no CUDA device here"
            raise ValueError(f"{detail}; use --head-device cpu, or --skip-head")
        if self.cast and self.delete_source:
            raise ValueError("--cast loses bits that only the source has: drop --cast or --delete-source")

    @property
    def resolved_head_device(self) -> str:
        """The device of the target's head; ``auto`` is a GPU if there is one."""
        if self.head_device != "auto":
            return self.head_device
        return "cuda" if torch.cuda.is_available() else "cpu"


def resolve_options(options: ConvertOptions, survey: Survey) -> tuple[StoreInfo, Completer]:
    """Return the store's info, and the completer of its samples.

    The completer has no masks from ``--dataset`` yet; `index_masks` makes them, which takes long.

    Raises: ValueError if something is missing or contradicts the files or an existing store.
    """
    folder = _target_folder(options, survey)
    if not survey.has_mask and options.dataset is None:
        advice = "give the conversations they were captured from with --dataset, and --target"
        raise ValueError(f"these files have no loss mask; {advice}")
    is_store = (options.destination / STORE_JSON).exists()
    info = _store_info(options, survey, folder, read_store_info(options.destination) if is_store else None)
    if is_store:
        check_same_store(options.destination, info)
    has_weights = folder is not None and any(folder.glob("*.safetensors"))
    return info, Completer(
        hidden_size=info.hidden_size, num_aux=len(info.aux_layer_ids), dtype=info.dtype,
        cast=options.cast is not None, vocab_size=info.vocab_size, target=folder if has_weights else None,
        final_norm=options.final_norm, token_labels=has_weights and options.token_labels,
        head_device=options.resolved_head_device)


def index_masks(options: ConvertOptions, intake: Intake) -> ConversationMasks | None:
    """Index the loss masks of the conversations in ``--dataset``; None if there is no dataset.

    Conversations that cannot be used are noted in ``intake``.
    """
    if options.dataset is None or options.target is None:
        return None
    logger.info("indexing the conversations of %s", options.dataset)
    folder = resolve_target(options.target, options.revision, weights=False)
    return ConversationMasks.index(
        options.dataset, folder, options.max_length, options.workers, intake, options.template_kwargs)


def _target_folder(options: ConvertOptions, survey: Survey) -> Path | None:
    """Find the target's folder; None if no target was given. Weights are fetched only if they are needed."""
    before_norm = options.final_norm == "apply" or (options.final_norm == "auto" and survey.before_norm)
    if options.target is None and before_norm:
        detail = "these files hold the last state from before the target's final norm"
        raise ValueError(f"{detail}; give the target with --target")
    if options.target is None:
        return None
    weights = options.token_labels or before_norm
    return resolve_target(options.target, options.revision, weights=weights)


def _store_info(
    options: ConvertOptions, survey: Survey, folder: Path | None, existing: StoreInfo | None
) -> StoreInfo:
    """Describe the store from the target, else from the existing store, else from the files. Flags override.

    Raises: ValueError if flags are missing, or the description does not fit the surveyed files.
    """
    flags = {
        "target": options.target_name, "aux_layer_ids": options.aux_layer_ids,
        "vocab_size": options.vocab_size, "dtype": options.cast,
        "template_kwargs": dict(options.template_kwargs) or None}
    given = {name: value for name, value in flags.items() if value is not None}
    if folder is not None:
        info = StoreInfo.of_target(folder, str(options.target), survey.dtype, options.aux_layer_ids)
        if options.aux_layer_ids is None:
            logger.info("aux layers: %s, the default for this target", list(info.aux_layer_ids))
        has_weights = bool(info.target_hash)
        head_size = len(load_target_weights(folder, names=("lm_head",))["lm_head"]) if has_weights else 0
        info = replace(info, head_size=head_size, **given)
    elif existing is not None:
        info = replace(existing, **given)
    elif missing := [flag for name, flag in INFO_FLAGS.items() if name not in given]:
        raise ValueError(
            "the files do not say which target and layers they come from; give --target with the "
            f"target's folder or Hugging Face id, or else {' and '.join(missing)}")
    else:
        known = {"hidden_size": survey.hidden_size, "dtype": survey.dtype}
        info = StoreInfo(target_hash="", tokenizer_hash="", **(known | given))
    if info.hidden_size != survey.hidden_size:
        other = f"target {options.target}" if folder is not None else f"the store {options.destination}"
        detail = f"the files have hidden size {survey.hidden_size}, {other} has {info.hidden_size}"
        raise ValueError(f"{detail}; check --target")
    if len(info.aux_layer_ids) != survey.num_aux:
        detail = f"the files hold {survey.num_aux} aux layers, expected {list(info.aux_layer_ids)}"
        raise ValueError(f"{detail}; name theirs with --aux-layer-ids")
    return info
