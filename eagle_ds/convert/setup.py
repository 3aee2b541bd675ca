"""What the user said and what the files showed, settled into the store's facts and the rule for completing samples."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from eagle_ds.convert.completion import Completer, FinalNorm
from eagle_ds.convert.hdf5_files import Hdf5Map
from eagle_ds.convert.masks import ConversationMasks
from eagle_ds.convert.survey import Survey
from eagle_ds.store.manifest import STORE_JSON, StoreInfo, check_same_store, read_store_info
from eagle_ds.target.files import TargetInfo, check_aux_ids, load_target_weights, resolve_target, target_hash, tokenizer_hash

OWN_FOLDERS = ("writing", "samples")  # of a store

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ConvertOptions:
    """A conversion as asked for. ``None`` is: not said."""

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
    token_facts: bool = True
    head_device: str = "auto"
    dataset: Path | None = None
    max_length: int = 1 << 20
    strict: bool = False
    verify: bool = False
    delete_source: bool = False

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"--workers is {self.workers}, expected at least 1")
        source, destination = self.source.resolve(), self.destination.resolve()
        if destination == source or destination.is_relative_to(source):
            raise ValueError(f"destination {self.destination} lies inside the source {self.source}; choose a folder outside")
        if any(source.is_relative_to(destination / own) for own in OWN_FOLDERS):
            raise ValueError(f"source {self.source} lies where the store {self.destination} keeps its own files; choose another folder")
        if self.dataset is not None and self.target is None:
            raise ValueError("--dataset needs --target, whose tokenizer and chat template make the loss mask")
        if self.dataset is not None and not self.dataset.is_file():
            raise ValueError(f"--dataset {self.dataset} is not a file; give a JSONL of conversations")
        if self.head_device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"--head-device is {self.head_device}, but there is no CUDA device here; use cpu, or --skip-head")
        if self.cast and self.delete_source:
            raise ValueError("--cast loses bits that the source still has, so --delete-source is refused with it; drop one of them")


def settle(options: ConvertOptions, survey: Survey) -> tuple[StoreInfo, Completer]:
    """The store's facts, and the rule for completing samples (still without masks from a dataset, which take long to index).

    Raises ValueError where something is missing or contradicts the files.
    """
    is_store = (options.destination / STORE_JSON).exists()
    existing = read_store_info(options.destination) if is_store else None
    before_norm = options.final_norm == "apply" or (options.final_norm == "auto" and survey.before_norm)
    folder = None
    if options.target is not None:
        folder = resolve_target(options.target, options.revision, weights=options.token_facts or before_norm)
    elif before_norm:
        raise ValueError("these files hold the last state from before the target's final norm; give the target with --target")
    if not survey.has_mask and options.dataset is None:
        raise ValueError("these files have no loss mask; give the conversations they were captured from with --dataset, and --target")
    info = _info(options, survey, existing, folder)
    if is_store:
        check_same_store(options.destination, info)
    has_weights = folder is not None and any(folder.glob("*.safetensors"))
    return info, Completer(
        hidden_size=info.hidden_size,
        num_aux=len(info.aux_layer_ids),
        dtype=info.dtype,
        cast=options.cast is not None,
        vocab_size=info.vocab_size,
        target=folder if has_weights else None,
        final_norm=options.final_norm,
        token_facts=has_weights and options.token_facts,
        head_device=("cuda" if torch.cuda.is_available() else "cpu") if options.head_device == "auto" else options.head_device,
    )


def index_masks(options: ConvertOptions) -> ConversationMasks | None:
    """Loss masks of the conversations in ``--dataset``, by the target's tokenizer; None where there is no dataset."""
    if options.dataset is None or options.target is None:
        return None
    logger.info("indexing the conversations of %s", options.dataset)
    folder = resolve_target(options.target, options.revision, weights=False)
    return ConversationMasks.index(options.dataset, folder, options.max_length, options.workers)


def _info(options: ConvertOptions, survey: Survey, existing: StoreInfo | None, folder: Path | None) -> StoreInfo:
    if folder is not None:
        info = _info_of_target(options, survey, folder)
    elif existing is not None:
        info = replace(existing, **_said(options))
    else:
        info = _info_of_flags(options, survey)
    if info.hidden_size != survey.hidden_size:
        where = f"target {options.target}" if folder is not None else f"the store {options.destination}"
        raise ValueError(f"the files have hidden size {survey.hidden_size}, {where} has {info.hidden_size}; check --target")
    if len(info.aux_layer_ids) != survey.num_aux:
        expected = list(info.aux_layer_ids)
        raise ValueError(f"the files hold {survey.num_aux} aux layers, expected {expected}; name theirs with --aux-layer-ids")
    return info


def _info_of_target(options: ConvertOptions, survey: Survey, folder: Path) -> StoreInfo:
    target = TargetInfo.from_folder(folder)
    aux_ids = options.aux_layer_ids or target.aux_ids
    check_aux_ids(aux_ids, target.num_layers)
    if options.aux_layer_ids is None:
        logger.info("aux layers taken to be %s, the default of a target of %d layers", list(aux_ids), target.num_layers)
    weights = any(folder.glob("*.safetensors"))
    return StoreInfo(
        target=options.target_name or str(options.target),
        target_hash=target_hash(folder) if weights else "",
        tokenizer_hash=tokenizer_hash(folder),
        hidden_size=target.hidden_size,
        aux_layer_ids=aux_ids,
        vocab_size=options.vocab_size or target.vocab_size,
        dtype=options.cast or survey.dtype,
        head_size=len(load_target_weights(folder, names=("lm_head",))["lm_head"]) if weights else 0,
    )


def _said(options: ConvertOptions) -> dict[str, Any]:
    """The facts that flags name, to be held against an existing store's."""
    flags = {"target": options.target_name, "aux_layer_ids": options.aux_layer_ids, "vocab_size": options.vocab_size, "dtype": options.cast}
    return {name: value for name, value in flags.items() if value is not None}


def _info_of_flags(options: ConvertOptions, survey: Survey) -> StoreInfo:
    flags = {"--target-name": options.target_name, "--aux-layer-ids": options.aux_layer_ids, "--vocab-size": options.vocab_size}
    if missing := [flag for flag, value in flags.items() if value is None]:
        raise ValueError(
            "the files do not say which target and layers they come from; give --target with the target's folder or Hugging Face id, "
            f"or else {' and '.join(missing)}"
        )
    assert options.target_name and options.aux_layer_ids and options.vocab_size
    dtype = options.cast or survey.dtype
    return StoreInfo(options.target_name, "", "", survey.hidden_size, options.aux_layer_ids, options.vocab_size, dtype=dtype)
