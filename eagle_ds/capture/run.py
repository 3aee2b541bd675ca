"""One capture: conversations in, a hidden-state store out.

What is to do is planned from the tokenizer alone, before the target is loaded: lengths, skips, what the store has already.
Samples go longest first, so that a lack of memory shows at once and the remaining time is not underestimated. A sample is
encoded and written by a background thread while the next ones are computed.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from eagle_ds.capture.hf import ForwardLimits, HiddenStates, load_model
from eagle_ds.config.recipe import Recipe
from eagle_ds.data.chat import ChatEncoder, EncodeStats, load_tokenizer
from eagle_ds.data.conversations import ConversationFile, require_samples
from eagle_ds.store.manifest import STORE_JSON, SampleEntry, StoreInfo
from eagle_ds.store.store import Sample, Store, StoreWriter
from eagle_ds.target.files import TargetInfo, check_aux_ids, resolve_target, target_hash, tokenizer_hash

log = logging.getLogger(__name__)

STORED_SHARE = 0.7  # of the raw bytes that the encoding keeps: 0.69 measured on SmolLM2 (H 576); wider targets compress a little better
MARGIN_BYTES = 64 << 20
WRITES_AHEAD = 2
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class CaptureJob:
    """What to capture, with what, and where to."""

    target: str
    conversations: Path
    store: Path
    max_length: int
    overlong: Literal["truncate", "skip"] = "truncate"
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    aux_layer_ids: tuple[int, ...] | None = None
    device: str = "auto"
    attention: str = "sdpa"
    limits: ForwardLimits | None = None
    limit_samples: int | None = None

    @property
    def store_dtype(self) -> str:
        return "float16" if self.dtype == "float16" else "bfloat16"

    @classmethod
    def from_recipe(cls, recipe: Recipe, split: Literal["train", "eval"], **settings: Any) -> CaptureJob:
        """The job that fills ``data.store`` or ``data.eval_store``."""
        prefix = "" if split == "train" else "eval_"
        conversations, store = getattr(recipe.data, prefix + "conversations"), getattr(recipe.data, prefix + "store")
        if not conversations or not store:
            raise ValueError(f"the recipe names no data.{prefix}conversations or no data.{prefix}store, so there is nothing to capture")
        return cls(
            target=recipe.target.model,
            revision=recipe.target.revision,
            dtype=recipe.target.dtype,
            aux_layer_ids=recipe.target.aux_ids,
            conversations=Path(conversations),
            store=Path(store),
            max_length=recipe.data.max_length,
            overlong=recipe.data.overlong,
            **settings,
        )


@dataclass(frozen=True)
class Planned:
    """A sample to capture: where its record begins in the conversation file, and how long it is."""

    offset: int
    id: str
    num_tokens: int
    trained_spans: tuple[tuple[int, int], ...]


@dataclass
class CaptureEstimate:
    """Everything known before the target is loaded."""

    job: CaptureJob
    folder: Path
    info: StoreInfo
    file: ConversationFile
    encoder: ChatEncoder
    stats: EncodeStats
    todo: list[Planned]
    done: int

    @property
    def tokens(self) -> int:
        return sum(sample.num_tokens for sample in self.todo)

    @property
    def raw_bytes(self) -> int:
        """Hidden states of what is to do, uncompressed."""
        return self.tokens * (len(self.info.aux_layer_ids) + 1) * self.info.hidden_size * 2

    @property
    def store_bytes(self) -> int:
        """What they will take on disk, about."""
        return int(self.raw_bytes * STORED_SHARE)

    @property
    def free_bytes(self) -> int:
        folder = next(parent for parent in (self.job.store, *self.job.store.absolute().parents) if parent.is_dir())
        return shutil.disk_usage(folder).free


def estimate_capture(job: CaptureJob) -> CaptureEstimate:
    """Resolve the target, encode every conversation, and see what the store has.  Writes nothing.

    Raises ValueError for whatever is wrong with target, tokenizer, conversations or an existing store.
    """
    folder = resolve_target(job.target, job.revision)
    info = store_info(job, folder)
    present = stored_entries(job.store, info)
    encoder = ChatEncoder(load_tokenizer(folder), job.max_length, job.overlong)
    file = ConversationFile(job.conversations)
    planned = []
    for offset, encoded in file.encode(encoder):
        planned.append(Planned(offset, encoded.id, len(encoded.input_ids), encoded.trained_spans))
        if len(planned) == job.limit_samples:
            break
    require_samples(job.conversations, encoder.stats)
    todo = [sample for sample in planned if not is_stored(sample, present, job.store)]
    todo.sort(key=lambda sample: (-sample.num_tokens, sample.id))
    return CaptureEstimate(job, folder, info, file, encoder, replace(encoder.stats), todo, len(planned) - len(todo))


def check_recipe_target(recipe: Recipe) -> None:
    """ValueError unless the recipe states the sizes that its target has; reads config.json only."""
    folder = resolve_target(recipe.target.model, recipe.target.revision, weights=False)
    TargetInfo.from_folder(folder).check_against(recipe.target)


def store_info(job: CaptureJob, folder: Path) -> StoreInfo:
    target = TargetInfo.from_folder(folder)
    aux_ids = job.aux_layer_ids or target.aux_ids
    check_aux_ids(aux_ids, target.num_layers)
    return StoreInfo(
        target=job.target,
        target_hash=target_hash(folder),
        tokenizer_hash=tokenizer_hash(folder),
        hidden_size=target.hidden_size,
        aux_layer_ids=tuple(aux_ids),
        vocab_size=target.vocab_size,
        dtype=job.store_dtype,
    )


def stored_entries(root: Path, info: StoreInfo) -> dict[str, SampleEntry]:
    """What an existing store holds whole, by id; ValueError if it is about another target or other layers."""
    if not (root / STORE_JSON).exists():
        return {}
    store = Store(root)
    if store.info != info:
        with StoreWriter(root, info):  # raises, naming the facts that differ
            pass
    return {entry.id: entry for entry in store.entries if _size(root / entry.path) == entry.bytes}


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1


def is_stored(sample: Planned, present: dict[str, SampleEntry], root: Path) -> bool:
    """True if the store has this sample; ValueError if it has another text under the same id."""
    entry = present.get(sample.id)
    if entry is None:
        return False
    if (entry.num_tokens, entry.trained_spans) != (sample.num_tokens, sample.trained_spans):
        raise ValueError(
            f"store {root} holds sample {sample.id} with {entry.num_tokens} tokens, but the conversation file now gives "
            f"{sample.num_tokens} (or other answers); capture into another folder, or delete this store"
        )
    return True


def capture(estimate: CaptureEstimate, progress: Callable[[int], None] = lambda tokens: None) -> int:
    """Write every sample of the plan; ``progress`` is told the tokens of each as it is stored.  Returns the sample count.

    Stopped at any moment, a new plan goes on with what is missing.
    """
    require_space(estimate)
    with disk_errors(estimate.job.store), StoreWriter(estimate.job.store, estimate.info) as writer:
        if not estimate.todo:
            return 0
        states = load_states(estimate)
        with ThreadPoolExecutor(1) as background:
            writes: deque[Future[SampleEntry]] = deque()
            for sample in compute(estimate, states):
                writes.append(background.submit(writer.add, sample))
                if len(writes) > WRITES_AHEAD:
                    progress(writes.popleft().result().num_tokens)
            for write in writes:
                progress(write.result().num_tokens)
    return len(estimate.todo)


def require_space(estimate: CaptureEstimate) -> None:
    if estimate.store_bytes + MARGIN_BYTES > estimate.free_bytes:
        raise ValueError(
            f"the disk of {estimate.job.store} has {estimate.free_bytes / 1e9:.1f} GB free but the capture needs about "
            f"{estimate.store_bytes / 1e9:.1f} GB; free some, or choose another folder"
        )


@contextlib.contextmanager
def disk_errors(store: Path) -> Iterator[None]:
    """Turns a full disk into one sentence; the store keeps the samples written whole, and nothing else."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # h5py passes on HDF5's message, with or without the number
        if getattr(error, "errno", None) in FULL or any(os.strerror(number) in str(error) for number in FULL):
            raise ValueError(f"the disk of {store} is full; the samples written so far are whole: free some space, run again") from error
        raise


def load_states(estimate: CaptureEstimate) -> HiddenStates:
    job = estimate.job
    model = load_model(estimate.folder, job.dtype, job.device, job.attention)
    return HiddenStates(model, estimate.info.aux_layer_ids, getattr(torch, job.store_dtype), job.limits)


def compute(estimate: CaptureEstimate, states: HiddenStates) -> Iterator[Sample]:
    """Samples of the plan, longest first, with their hidden states."""
    for batch in batches(estimate.todo, states.limits):
        encoded = [estimate.encoder.encode(estimate.file.read(sample.offset)) for sample in batch]
        ids = [torch.from_numpy(one.input_ids) for one in encoded if one is not None]
        for one, input_ids, captured in zip(encoded, ids, states(ids), strict=True):
            yield Sample(
                id=one.id,
                input_ids=input_ids,
                loss_mask=torch.from_numpy(one.loss_mask),
                aux_hidden_state=captured.aux_hidden_state,
                hidden_state=captured.hidden_state,
                target_token_id=captured.target_token_id,
                target_logsumexp=captured.target_logsumexp,
            )


def batches(samples: Sequence[Planned], limits: ForwardLimits) -> Iterator[list[Planned]]:
    """Consecutive samples (sorted by length) that fit ``batch_tokens`` once padded; one longer than a chunk goes alone."""
    batch: list[Planned] = []
    for sample in samples:
        width = max([sample.num_tokens, *(other.num_tokens for other in batch)])
        if batch and (width > limits.chunk_tokens or width * (len(batch) + 1) > limits.batch_tokens):
            yield batch
            batch = []
        batch.append(sample)
    if batch:
        yield batch


def probe_seconds(estimate: CaptureEstimate) -> float:
    """Seconds that the plan will take on this machine, writing aside: seconds(S) = a S + b S^2 fitted to two timed passes."""
    states = load_states(estimate)
    longest = max(sample.num_tokens for sample in estimate.todo)
    short, long = min(longest, 512), min(longest, 2 * states.limits.chunk_tokens)
    _time_forward(states, short)  # warms up
    times = {length: _time_forward(states, length) for length in {short, long}}
    quadratic = max(0.0, (times[long] / long - times[short] / short) / (long - short)) if long > short else 0.0
    linear = times[short] / short - quadratic * short
    return sum(linear * sample.num_tokens + quadratic * sample.num_tokens**2 for sample in estimate.todo)


def _time_forward(states: HiddenStates, length: int) -> float:
    start = time.perf_counter()
    states([torch.arange(length) % 1000])
    return time.perf_counter() - start
