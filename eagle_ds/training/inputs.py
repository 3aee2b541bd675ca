"""Open and check what a run reads, before anything expensive: target, stores, vocabulary, initial draft.

Every rank checks, and all ranks stop together with one message if any finds an error. Then the ranks compare
hashes: on a cluster, one node may see other files than the rest.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

from eagle_ds.config.recipe import Recipe
from eagle_ds.data.packing import TrainSample, screen
from eagle_ds.data.vocab import VocabMap, load_or_build
from eagle_ds.drafts.loading import DraftOnDisk, initial_draft
from eagle_ds.model.arch import DraftArch
from eagle_ds.store.store import Store
from eagle_ds.target.files import resolve_target
from eagle_ds.target.identity import target_hash
from eagle_ds.target.info import TargetInfo
from eagle_ds.training.preflight import check_store
from eagle_ds.training.world import World

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenStore:
    """A store that fits the recipe, and those of its samples that are used."""

    store: Store
    samples: list[TrainSample]


@dataclass(frozen=True)
class Inputs:
    """Everything that a run reads."""

    target: Path
    train: OpenStore
    held_out: OpenStore | None
    vocab: VocabMap
    arch: DraftArch
    start: DraftOnDisk | None

    @property
    def all_samples(self) -> list[TrainSample]:
        """Samples of the training store and of the held-out store."""
        return self.train.samples + (self.held_out.samples if self.held_out else [])


def open_inputs(recipe: Recipe, world: World) -> Inputs:
    """Open and check everything that a run reads. Collective.

    Raises RankFailure (a ValueError) on all ranks if any rank finds an error, or if ranks see different
    files.
    """
    agreement = world.agreement
    # Rank 0 goes first where a call may download or write a file; the others then find it done.
    model, revision = recipe.target.model, recipe.target.revision
    target = agreement.first_then_all(lambda: resolve_target(model, revision, weights=True))
    info, identity = agreement.together(lambda: _check_target(recipe, target))
    train = agreement.together(lambda: _open_store(recipe, recipe.data.store, identity))
    # Without evaluations the held-out store is not needed, so it may be missing.
    held = recipe.data.eval_store if recipe.training.eval_interval else None
    held_out = agreement.together(lambda: None if held is None else _open_store(recipe, held, identity))
    start = agreement.together(lambda: initial_draft(recipe, info) if recipe.draft.init_from else None)
    if start:
        vocab, arch = start.vocab, start.arch
    else:
        vocab = agreement.first_then_all(lambda: load_or_build(train.store, recipe.draft.vocab_size))
        arch = DraftArch.from_recipe(recipe)
    agreement.same({
        "recipe": _short_hash(recipe.model_dump_json().encode()),
        "store manifest": train.store.manifest_hash,
        "held-out manifest": held_out.store.manifest_hash if held_out else None,
        "draft vocabulary": _short_hash(vocab.d2t.numpy().tobytes()),
        "target": identity,
    })  # fmt: skip
    return Inputs(target, train, held_out, vocab, arch, start)


def _check_target(recipe: Recipe, folder: Path) -> tuple[TargetInfo, str]:
    info = TargetInfo.from_folder(folder)
    info.check_against(recipe.target)
    return info, target_hash(folder)


def _open_store(recipe: Recipe, root: str, identity: str) -> OpenStore:
    store = Store(root)
    check_store(recipe, root, store.info, "capture again, or correct the recipe", identity)
    if not store.entries:
        raise ValueError(f"the store {root} holds no samples; its capture has not written any yet")
    # Open one file here: a warning that the fast reader cannot be used is logged now. Reading processes log
    # nothing.
    with store.reader(store.entries[0]) as reader:
        reader.read_small("loss_mask")
    data, training = recipe.data, recipe.training
    samples, screening = screen(
        store.entries, max_length=data.max_length, overlong=data.overlong,
        ttt_steps=training.ttt_steps, alignment=training.mask_alignment,
    )  # fmt: skip
    logger.info("%s: %s", root, screening)
    return OpenStore(store, samples)


def _short_hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
