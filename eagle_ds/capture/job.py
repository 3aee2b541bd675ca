"""What to capture: the job as requested, its preparation, and its size on disk.

Preparing a job checks it against the target's files, the conversations and the store, before the target's
weights are loaded. So a wrong setting is reported at once and not after hours.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from eagle_ds.capture.hf import ForwardLimits
from eagle_ds.config.recipe import Recipe
from eagle_ds.data.chat import ChatEncoder, EncodeStats, load_tokenizer
from eagle_ds.data.conversations import ConversationFile, Intake, require_samples
from eagle_ds.store.manifest import STORE_JSON, SampleEntry, StoreInfo, whole_entries
from eagle_ds.store.store import Store, StoreWriter
from eagle_ds.target.files import resolve_target
from eagle_ds.target.info import TargetInfo

# Stored bytes / raw bytes. Measured 0.69 on SmolLM2 (H = 576); wider targets compress a little better.
STORED_SHARE = 0.7
MARGIN_BYTES = 64 << 20  # kept free on the disk, beyond the estimate


@dataclass(frozen=True)
class CaptureJob:
    """What to capture, with which target and how, and into which store."""

    target: str
    conversations: Path
    store: Path
    max_length: int
    overlong: Literal["truncate", "skip"] = "truncate"
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    duplicates: Literal["reject", "suffix"] = "reject"
    strict: bool = False
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    aux_layer_ids: tuple[int, ...] | None = None
    device: str = "auto"
    attention: str = "sdpa"
    limits: ForwardLimits | None = None
    limit_samples: int | None = None

    @property
    def store_dtype(self) -> str:
        """The dtype of stored hidden states: 16 bits, whatever dtype the target computes in."""
        return "float16" if self.dtype == "float16" else "bfloat16"

    @classmethod
    def from_recipe(cls, recipe: Recipe, split: Literal["train", "eval"], **settings: Any) -> CaptureJob:
        """Make the job that fills the recipe's ``data.store`` or ``data.eval_store``."""
        prefix = "" if split == "train" else "eval_"
        conversations = getattr(recipe.data, prefix + "conversations")
        store = getattr(recipe.data, prefix + "store")
        if not conversations or not store:
            found = f"the recipe has no data.{prefix}conversations or no data.{prefix}store"
            raise ValueError(f"{found}; set both, or capture the other split alone with --split")
        return cls(
            target=recipe.target.model, revision=recipe.target.revision, dtype=recipe.target.dtype,
            aux_layer_ids=recipe.target.aux_ids, conversations=Path(conversations), store=Path(store),
            template_kwargs=recipe.target.template_kwargs, max_length=recipe.data.max_length,
            overlong=recipe.data.overlong, duplicates=recipe.data.duplicates, **settings)


@dataclass(frozen=True)
class PendingSample:
    """A sample to capture: the byte offset of its line in the conversation file, and its length in tokens."""

    offset: int
    id: str
    num_tokens: int
    trained_spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class CaptureEstimate:
    """How large a capture is, before it runs."""

    tokens: int
    raw_bytes: int  # hidden states, uncompressed
    store_bytes: int  # their predicted size on disk
    free_bytes: int  # free space of that disk


@dataclass
class PreparedCapture:
    """A job whose target was found and conversations were encoded, and the samples still to capture."""

    job: CaptureJob
    folder: Path  # of the target
    info: StoreInfo
    file: ConversationFile
    encoder: ChatEncoder
    stats: EncodeStats
    pending: list[PendingSample]  # longest first
    num_stored: int
    intake: Intake = field(default_factory=Intake)  # the records that cannot be used

    @property
    def tokens(self) -> int:
        """Tokens of all pending samples."""
        return sum(sample.num_tokens for sample in self.pending)

    def estimate(self) -> CaptureEstimate:
        """Predict the size of the pending samples, and look up the free disk space."""
        layers = len(self.info.aux_layer_ids) + 1  # the aux layers and the final state, 2 bytes a number
        raw_bytes = self.tokens * layers * self.info.hidden_size * 2
        parents = (self.job.store, *self.job.store.absolute().parents)
        existing = next(folder for folder in parents if folder.is_dir())
        free_bytes = shutil.disk_usage(existing).free
        return CaptureEstimate(self.tokens, raw_bytes, int(raw_bytes * STORED_SHARE), free_bytes)


def prepare_capture(job: CaptureJob) -> PreparedCapture:
    """Find the target, encode every conversation, and list the samples that the store lacks. Writes nothing.

    A record that cannot be used is rejected, or raises ValueError if the job is strict.

    Raises: ValueError if target, tokenizer, conversations or an existing store do not fit the job.
    """
    folder = resolve_target(job.target, job.revision)
    info = StoreInfo.of_target(folder, job.target, job.store_dtype, job.aux_layer_ids, job.template_kwargs)
    stored = stored_entries(job.store, info)
    tokenizer = load_tokenizer(folder)
    encoder = ChatEncoder(tokenizer, job.max_length, job.overlong, template_kwargs=job.template_kwargs)
    file, intake = ConversationFile(job.conversations), Intake(job.strict, job.duplicates)
    samples = []
    for offset, encoded in file.encode(encoder, intake):
        samples.append(PendingSample(offset, encoded.id, len(encoded.input_ids), encoded.trained_spans))
        if len(samples) == job.limit_samples:
            break
    require_samples(job.conversations, encoder.stats, intake)
    pending = [sample for sample in samples if not is_stored(sample, stored, job.store)]
    # Longest first: a lack of memory shows at once, and the remaining time is not underestimated.
    pending.sort(key=lambda sample: (-sample.num_tokens, sample.id))
    num_stored = len(samples) - len(pending)
    stats = deepcopy(encoder.stats)  # capturing encodes every record once more
    return PreparedCapture(job, folder, info, file, encoder, stats, pending, num_stored, intake)


def check_recipe_target(recipe: Recipe) -> None:
    """Raise ValueError unless the recipe states the sizes that its target has. Reads config.json only."""
    folder = resolve_target(recipe.target.model, recipe.target.revision, weights=False)
    TargetInfo.from_folder(folder).check_against(recipe.target)


def stored_entries(root: Path, info: StoreInfo) -> dict[str, SampleEntry]:
    """Return the complete samples of the store at ``root``, by id; none if there is no store.

    Raises: ValueError if the store was made from another target or other layers.
    """
    if not (root / STORE_JSON).exists():
        return {}
    store = Store(root)
    if store.info != info:
        with StoreWriter(root, info):  # raises, naming the values that differ
            pass
    return whole_entries(root, store.entries)


def is_stored(sample: PendingSample, stored: Mapping[str, SampleEntry], root: Path) -> bool:
    """Return whether the store has this sample.

    Raises ValueError if it has another text under the same id.
    """
    entry = stored.get(sample.id)
    if entry is None:
        return False
    if (entry.num_tokens, entry.trained_spans) != (sample.num_tokens, sample.trained_spans):
        found = f"store {root} holds sample {sample.id} with {entry.num_tokens} tokens"
        raise ValueError(
            f"{found}, but the conversation file now gives {sample.num_tokens} (or other answers); "
            "capture into another folder, or delete this store")
    return True


def require_space(prepared: PreparedCapture) -> None:
    """Raise ValueError if the disk has too little free space for the pending samples."""
    estimate = prepared.estimate()
    if estimate.store_bytes + MARGIN_BYTES > estimate.free_bytes:
        raise ValueError(
            f"the disk of {prepared.job.store} has {estimate.free_bytes / 1e9:.1f} GB free but the capture "
            f"needs about {estimate.store_bytes / 1e9:.1f} GB; free some, or choose another folder")
