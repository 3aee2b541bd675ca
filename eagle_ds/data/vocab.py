"""Choose the draft vocabulary: the target tokens that the draft can propose, by how often they are trained.

The draft has its own, smaller vocabulary because its output head is a large part of its cost. Two arrays
connect it to the target's vocabulary, in the form that serving engines read. ``d2t`` holds OFFSETS: draft
token i is target token ``i + d2t[i]``. ``t2d`` marks the target tokens that the draft has.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file

if TYPE_CHECKING:
    from eagle_ds.store.store import Store

logger = logging.getLogger(__name__)

JOINED_SAMPLES = 64  # whose tokens are counted together


@dataclass(frozen=True)
class VocabMap:
    """The draft vocabulary in both directions."""

    d2t: torch.Tensor  # int64 [Vd], offsets: draft token i is target token i + d2t[i], ascending
    t2d: torch.Tensor  # bool [V], whether a target token is in the draft vocabulary

    def __post_init__(self) -> None:
        ids = self.target_ids
        inside = bool(ids.numel()) and int(ids.min()) >= 0 and int(ids.max()) < self.t2d.numel()
        if not inside or int(self.t2d.sum()) != ids.numel() or not bool(self.t2d[ids].all()):
            raise ValueError(
                "d2t and t2d do not describe the same draft vocabulary: the target ids i + d2t[i] must be "
                "exactly the entries of t2d that are true")

    @classmethod
    def from_target_ids(cls, target_ids: torch.Tensor, vocab_size: int) -> VocabMap:
        """Make the map of the given target ids, sorted in ascending order."""
        ids = torch.sort(target_ids.to(torch.int64)).values
        t2d = torch.zeros(vocab_size, dtype=torch.bool)
        t2d[ids] = True
        return cls(ids - torch.arange(ids.numel()), t2d)

    @classmethod
    def identity(cls, vocab_size: int) -> VocabMap:
        """Make the map of Vd = V, in which every token keeps its id."""
        return cls(torch.zeros(vocab_size, dtype=torch.int64), torch.ones(vocab_size, dtype=torch.bool))

    @property
    def target_ids(self) -> torch.Tensor:
        """Return the target id of each draft token: int64 [Vd]."""
        return self.d2t + torch.arange(self.d2t.numel())

    def save(self, path: str | Path, metadata: dict[str, str] | None = None) -> None:
        """Write a safetensors file atomically, through a temporary file. Several writers may run at once."""
        path = Path(path)
        handle, temp = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        try:
            save_file({"d2t": self.d2t.contiguous(), "t2d": self.t2d.contiguous()}, temp, metadata=metadata)
            os.chmod(temp, 0o644)
            os.replace(temp, path)
        finally:
            Path(temp).unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> VocabMap:
        """Read a file that `save` wrote."""
        with safe_open(path, framework="pt") as archive:
            return cls(archive.get_tensor("d2t"), archive.get_tensor("t2d"))


def count_trained_tokens(
    samples: Store | Iterable[tuple[torch.Tensor, torch.Tensor]], vocab_size: int
) -> torch.Tensor:
    """Count how often each token is trained: int64 [V].

    Args:
        samples: a store, or pairs (input_ids [S], loss_mask [S]).
        vocab_size: V.
    """
    pairs = _store_pairs(samples) if hasattr(samples, "entries") else samples
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    trained = (input_ids[loss_mask.bool()].to(torch.int64) for input_ids, loss_mask in pairs)
    # Adding V counts for each sample costs more than encoding a short one, so samples are joined first.
    waiting: list[torch.Tensor] = []
    for tokens in trained:
        if tokens.numel() and (largest := int(tokens.max())) >= vocab_size:
            raise ValueError(f"token id {largest} does not fit the target vocabulary of {vocab_size}")
        waiting.append(tokens)
        if len(waiting) == JOINED_SAMPLES:
            counts += torch.bincount(torch.cat(waiting), minlength=vocab_size)
            waiting.clear()
    if waiting:
        counts += torch.bincount(torch.cat(waiting), minlength=vocab_size)
    return counts


def _store_pairs(store: Store) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    for entry in store.entries:
        reader = store.reader(entry, hidden_states=False)
        yield reader.read_small("input_ids"), reader.read_small("loss_mask")


def build_vocab_map(counts: torch.Tensor, draft_vocab_size: int) -> VocabMap:
    """Select the ``draft_vocab_size`` tokens that are trained most often; lower ids win ties."""
    vocab_size = counts.numel()
    if draft_vocab_size > vocab_size:
        found = f"draft vocabulary {draft_vocab_size} is larger than the target's {vocab_size}"
        raise ValueError(f"{found}; use at most {vocab_size}")
    if draft_vocab_size == vocab_size:
        return VocabMap.identity(vocab_size)
    chosen = torch.sort(counts, descending=True, stable=True).indices[:draft_vocab_size]
    vocab = VocabMap.from_target_ids(chosen, vocab_size)
    found = f"cover {100 * covered_share(counts, vocab):.2f}% of {int(counts.sum())} trained tokens"
    logger.info("draft vocabulary: %d of %d tokens %s", draft_vocab_size, vocab_size, found)
    return vocab


def covered_share(counts: torch.Tensor, vocab: VocabMap) -> float:
    """Return the share of trained tokens that are in the draft vocabulary; 0 without trained tokens.

    Args:
        counts: how often each target token is trained, int64 [V].
    """
    return int(counts[vocab.t2d].sum()) / max(1, int(counts.sum()))


def vocab_path(store_root: str | Path, draft_vocab_size: int) -> Path:
    """Return the path of a store's vocabulary map of this size."""
    return Path(store_root) / f"vocab_{draft_vocab_size}.safetensors"


def load_or_build(store: Store, draft_vocab_size: int) -> VocabMap:
    """Return the store's map of this size. Build and save it if the store has none, or has changed since."""
    path = vocab_path(store.root, draft_vocab_size)
    if path.is_file():
        with safe_open(path, framework="pt") as archive:
            if (archive.metadata() or {}).get("manifest_hash") == store.manifest_hash:
                return VocabMap.load(path)
        logger.info("%s was made when the store had other samples; counting tokens again", path)
    vocab = build_vocab_map(count_trained_tokens(store, store.info.vocab_size), draft_vocab_size)
    vocab.save(path, {"manifest_hash": store.manifest_hash})
    return vocab
