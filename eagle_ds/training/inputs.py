"""What a run reads, opened and checked before anything expensive: target, stores, vocabulary, draft to start from.

All ranks check, and all stop together with one sentence; then they make sure that they see the same files.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

from eagle_ds.config.recipe import Recipe
from eagle_ds.data.packing import TrainSample, screen
from eagle_ds.data.vocab import VocabMap, load_or_build
from eagle_ds.drafts.folder import DraftOnDisk, initial_draft
from eagle_ds.model.arch import DraftArch
from eagle_ds.store.store import Store, StoreInfo
from eagle_ds.target.files import TargetInfo, resolve_target, target_hash
from eagle_ds.training.world import World

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenStore:
    """A store that fits the recipe, and the samples of it that are used."""

    store: Store
    samples: list[TrainSample]


@dataclass(frozen=True)
class Inputs:
    """Everything that a run reads."""

    target: Path
    target_info: TargetInfo
    train: OpenStore
    held_out: OpenStore | None
    vocab: VocabMap
    arch: DraftArch
    start: DraftOnDisk | None

    @property
    def all_samples(self) -> list[TrainSample]:
        """Samples of every store, held-out ones too."""
        return self.train.samples + (self.held_out.samples if self.held_out else [])

    @property
    def vocab_hash(self) -> str:
        """Identity of the draft vocabulary."""
        return hashlib.sha256(self.vocab.d2t.numpy().tobytes()).hexdigest()[:16]


def open_inputs(recipe: Recipe, world: World) -> Inputs:
    """Check and open. Collective. Raises RankFailure (a ValueError) on all ranks if any rank finds something wrong."""
    agreement = world.agreement
    target = agreement.first_then_all(lambda: resolve_target(recipe.target.model, recipe.target.revision, weights=True))
    info, identity = agreement.together(lambda: _target_facts(recipe, target))
    train = agreement.together(lambda: _open_store(recipe, recipe.data.store, identity))
    held_out = agreement.together(lambda: _open_held_out(recipe, identity))
    start = agreement.together(lambda: initial_draft(recipe, info) if recipe.draft.init_from else None)
    vocab = start.vocab if start else agreement.first_then_all(lambda: load_or_build(train.store, recipe.draft.vocab_size))
    inputs = Inputs(target, info, train, held_out, vocab, start.arch if start else DraftArch.from_recipe(recipe), start)
    agreement.same(
        {
            "recipe": hashlib.sha256(recipe.model_dump_json().encode()).hexdigest()[:16],
            "store manifest": train.store.manifest_hash,
            "held-out manifest": held_out.store.manifest_hash if held_out else None,
            "draft vocabulary": inputs.vocab_hash,
            "target": identity,
        }
    )
    return inputs


def _target_facts(recipe: Recipe, folder: Path) -> tuple[TargetInfo, str]:
    info = TargetInfo.from_folder(folder)
    info.check_against(recipe.target)
    return info, target_hash(folder)


def _open_held_out(recipe: Recipe, identity: str) -> OpenStore | None:
    if not recipe.training.eval_interval or recipe.data.eval_store is None:
        return None
    return _open_store(recipe, recipe.data.eval_store, identity)


def _open_store(recipe: Recipe, root: str, identity: str) -> OpenStore:
    store = Store(root)
    check_store_facts(recipe, store.info, root, identity)
    if not store.entries:
        raise ValueError(f"the store {root} holds no samples; its capture has not written any yet")
    with store.reader(store.entries[0]) as reader:
        reader.read_small("loss_mask")  # a store that plain h5py must read says so here: reading processes log nothing
    samples, screening = screen(
        store.entries,
        max_length=recipe.data.max_length,
        overlong=recipe.data.overlong,
        ttt_steps=recipe.training.ttt_steps,
        alignment=recipe.training.mask_alignment,
    )
    logger.info("%s: %s", root, screening)
    return OpenStore(store, samples)


def check_store_facts(recipe: Recipe, info: StoreInfo, root: str, identity: str) -> None:
    """Raise ValueError unless the store holds this target's states of the recipe's layers. ``identity`` is the target's hash;
    a converted store may not know its target's."""
    target = recipe.target
    for name, found, stated in (
        ("hidden_size", info.hidden_size, target.hidden_size),
        ("vocab_size", info.vocab_size, target.vocab_size),
        ("aux_layer_ids", list(info.aux_layer_ids), list(target.aux_ids)),
    ):
        if found != stated:
            raise ValueError(f"the store {root} was captured with {name} {found}, the recipe says {stated}; capture again or mend that")
    if info.target_hash and info.target_hash != identity:
        raise ValueError(
            f"the store {root} was captured from other weights ({info.target}, hash {info.target_hash}) than those of {target.model} "
            f"(hash {identity}), so labels would come from the wrong head; capture again, or give the target that it was captured from"
        )
