"""Convert a tree of other projects' hidden-state files into a store.

Survey a few files, decide what the store says, convert each sample in worker processes, record it in the
manifest, list rejected files, and delete sources if asked to.

It can be killed and started again at any moment. A sample is done when its manifest line is on disk. Only
then may its source be deleted, and only after the stored file was read back and compared bit for bit.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from eagle_ds.convert.completion import Completer
from eagle_ds.convert.formats import Reason, Rejected
from eagle_ds.convert.options import ConvertOptions, index_masks, resolve_options
from eagle_ds.convert.sources import SourceItem, iter_source
from eagle_ds.convert.survey import Prediction, head_s_per_row, predict, survey
from eagle_ds.convert.worker import Job, Outcome, Worker, run_jobs
from eagle_ds.data.conversations import REJECTED_CONVERSATIONS, Intake
from eagle_ds.store.manifest import StoreInfo, read_manifest, whole_entries
from eagle_ds.store.writer import StoreWriter

logger = logging.getLogger(__name__)

REJECTED_NAME = "rejected.jsonl"
SLOW_TOKENS_PER_S = 2000


class ConversionStopped(RuntimeError):
    """The machine failed, not a file: a full disk, or a target that cannot be used.

    What was converted is kept.
    """


@dataclass
class Summary:
    """What a conversion did. "raw" bytes are those of the hidden states in memory."""

    info: StoreInfo | None = None
    found: int = 0
    converted: int = 0
    already_done: int = 0
    compared: int = 0
    deleted: int = 0
    without_training: int = 0  # samples without a trained token
    tokens: int = 0
    trained_tokens: int = 0
    source_bytes: int = 0
    raw_bytes: int = 0
    stored_bytes: int = 0
    seconds: float = 0.0
    stopped_early: bool = False
    rejected: list[Rejected] = field(default_factory=list)
    conversations: Intake = field(default_factory=Intake)  # those of --dataset that cannot be used

    @property
    def reasons(self) -> Counter[Reason]:
        """How many files were rejected for each reason."""
        return Counter(rejected.reason for rejected in self.rejected)


@dataclass(frozen=True)
class Progress:
    """How far a conversion is, after each file."""

    done_bytes: int  # of the source
    total_bytes: int
    done_files: int
    total_files: int
    rejected: int


def convert(
    options: ConvertOptions, on_progress: Callable[[Progress], None] = lambda progress: None
) -> Summary:
    """Convert the samples that are not in the store yet.

    Raises:
        ValueError: the user must change an option.
        ConversionStopped: the machine failed.
    """
    begin = time.perf_counter()
    found = _find_samples(iter_source(options.source, options.mapping))
    summary = Summary(found=len(found), rejected=list(found.duplicates))
    seen, unreadable = survey(found.items, options.workers)
    if seen is None or (options.strict and found.duplicates):
        options.destination.mkdir(parents=True, exist_ok=True)
        with _rejected_log(options.destination, summary) as reject:
            for rejected in unreadable:
                reject(rejected)
    else:
        summary.info, completer = resolve_options(options, seen)
        summary.conversations = Intake(options.strict)
        completer = replace(completer, masks=index_masks(options, summary.conversations))
        _warn_of_slow_head(completer)
        verify = options.verify or options.delete_source
        encoders = max(1, (os.cpu_count() or 1) // options.workers)
        worker = Worker(options.destination, summary.info, completer, verify, encoders)
        _convert_samples(options, found, worker, summary, on_progress)
    summary.stopped_early = options.strict and bool(summary.rejected)
    summary.seconds = time.perf_counter() - begin
    return summary


def predict_conversion(options: ConvertOptions) -> tuple[Summary, Prediction | None]:
    """Check the options and a few files as `convert` does, and predict size and time. Writes nothing."""
    found = _find_samples(iter_source(options.source, options.mapping))
    summary = Summary(found=len(found), rejected=list(found.duplicates))
    seen, unreadable = survey(found.items, options.workers)
    if seen is None:
        summary.rejected += unreadable
        return summary, None
    summary.info, completer = resolve_options(options, seen)
    stored = whole_entries(options.destination, read_manifest(options.destination)[0])
    pending = [item for item in found.items if item.id not in stored]
    summary.already_done = len(found.items) - len(pending)
    return summary, predict(pending, seen, options.workers, completer.head()) if pending else None


def _warn_of_slow_head(completer: Completer) -> None:
    """Warn if the head runs on the CPU and is slow: it then takes far longer than all other work."""
    if completer.head_device == "cpu" and (head := completer.head()) is not None:
        speed = 1 / head_s_per_row(head)
        if speed < SLOW_TOKENS_PER_S:
            advice = "--head-device cuda is faster, --skip-head leaves target_token_id to the training"
            logger.warning("the target's head on this CPU does %.0f tokens/s a thread; %s", speed, advice)


def _convert_samples(
    options: ConvertOptions, found: _FoundSamples, worker: Worker, summary: Summary,
    on_progress: Callable[[Progress], None],
) -> None:
    """Convert the samples that are not stored yet. With ``worker.verify`` also compare those that are.

    Writes nothing before it holds the store's lock. Leaves no new store if every sample was rejected.
    """
    deleter = _SourceDeleter(found) if options.delete_source else None
    root = worker.root
    with StoreWriter(root, worker.info, workers=1) as writer, _rejected_log(root, summary) as reject:
        summary.conversations.write(root / REJECTED_CONVERSATIONS)
        entries = {entry.id: entry for entry in read_manifest(root)[0] if entry.id in writer.done_ids}
        wanted = [item for item in found.items if worker.verify or item.id not in entries]
        jobs = [Job(item, entries.get(item.id)) for item in wanted]
        summary.already_done = sum(item.id in entries for item in found.items)
        total_bytes, done_bytes = sum(job.item.file_bytes for job in jobs), 0
        with closing(run_jobs(jobs, worker, options.workers)) as outcomes:
            for number, outcome in enumerate(outcomes, start=1):
                if outcome.rejected is not None:
                    reject(outcome.rejected)
                else:
                    _record_outcome(outcome, worker.verify, writer, summary, deleter)
                done_bytes += outcome.job.item.file_bytes
                on_progress(Progress(done_bytes, total_bytes, number, len(jobs), len(summary.rejected)))
                if options.strict and summary.rejected:
                    break
        if not writer.done_ids and writer.discard_if_empty():
            logger.warning("no sample could be converted, so no store was made; see %s", root / REJECTED_NAME)


def _record_outcome(
    outcome: Outcome, compared: bool, writer: StoreWriter, summary: Summary, deleter: _SourceDeleter | None
) -> None:
    """Add a converted sample to the manifest. Only then may the deleter delete its source."""
    if outcome.failure is not None:
        advice = "what was converted is kept; run the same command again to continue"
        raise ConversionStopped(f"{outcome.failure}; {advice}")
    entry, item = outcome.entry, outcome.job.item
    assert entry is not None
    if outcome.job.entry is None:
        writer.register(entry)
        summary.converted += 1
        summary.source_bytes += item.file_bytes
        summary.raw_bytes += outcome.raw_bytes
        summary.stored_bytes += entry.bytes
        summary.tokens += entry.num_tokens
        summary.trained_tokens += entry.num_trained
        summary.without_training += entry.num_trained == 0
    summary.compared += compared
    if deleter is not None:
        summary.deleted += deleter.sample_done(item)


@dataclass(frozen=True)
class _FoundSamples:
    """The samples of the source. The first sample of an id is kept; each later one is a duplicate."""

    items: list[SourceItem]
    duplicates: list[Rejected]
    duplicate_paths: list[Path]  # the file of each duplicate

    def __len__(self) -> int:
        return len(self.items) + len(self.duplicates)


def _find_samples(source: Iterator[SourceItem]) -> _FoundSamples:
    """List the samples and separate duplicate ids, such as ``data_1.ckpt`` and ``data_1.ckpt.gz``."""
    items: dict[str, SourceItem] = {}
    duplicates, duplicate_paths = [], []
    for item in source:
        first = items.setdefault(item.id, item)
        if first is not item:
            detail = f"it has the same id {item.id!r} as {first.path}; keep one of the two"
            duplicates.append(Rejected(Reason.DUPLICATE, detail, item.place))
            duplicate_paths.append(item.path)
    return _FoundSamples(list(items.values()), duplicates, duplicate_paths)


class _SourceDeleter:
    """Deletes a source file once every sample in it is stored and compared.

    A file is kept if it is a link, if it changed since the conversion began, or if it holds a sample with a
    duplicate id, because that sample was not stored.
    """

    def __init__(self, found: _FoundSamples) -> None:
        # A duplicate counts as a sample that is never done, so its file's count does not reach zero.
        self._remaining = Counter([item.path for item in found.items] + found.duplicate_paths)
        self._versions = {path: _file_version(path) for path in self._remaining}

    def sample_done(self, item: SourceItem) -> bool:
        """Count one sample as stored.

        Returns True if it was the last one of its file and the file was deleted.
        """
        path = item.path
        self._remaining[path] -= 1
        if self._remaining[path]:
            return False
        if path.is_symlink() or _file_version(path) != self._versions[path]:
            logger.warning("%s is kept: it is a link, or it changed since the conversion began", path)
            return False
        try:
            path.unlink()
        except OSError as error:
            logger.warning("%s is kept: it cannot be deleted (%s)", path, error.strerror)
            return False
        return True


def _file_version(path: Path) -> tuple[int, int] | None:
    """Return (size, time of the last change); None if there is no file."""
    try:
        info = path.stat()
    except OSError:
        return None
    return info.st_size, info.st_mtime_ns


@contextmanager
def _rejected_log(root: Path, summary: Summary) -> Iterator[Callable[[Rejected], None]]:
    """Open ``rejected.jsonl``, write the rejections in ``summary``, and yield a function that adds one.

    Every run overwrites the file, because it tries the rejected files again.
    """
    # Line buffering: each line is on disk at once.
    with (root / REJECTED_NAME).open("w", encoding="utf-8", buffering=1) as file:

        def write(rejected: Rejected) -> None:
            line = {"path": rejected.path, "reason": str(rejected.reason), "detail": rejected.detail}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

        def reject(rejected: Rejected) -> None:
            logger.warning("rejected %s", rejected)
            summary.rejected.append(rejected)
            write(rejected)

        for rejected in summary.rejected:
            write(rejected)
        yield reject
