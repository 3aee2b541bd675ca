"""Convert a tree of other projects' hidden-state files into a store: survey, workers, manifest, rejects, clean-up.

Safe to kill and start again: a sample is done when its manifest line is on disk, and only then may its source be deleted,
after the stored file was read back and compared bit for bit.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

from eagle_ds.convert.completion import Completer
from eagle_ds.convert.rejected import Reason, Rejected
from eagle_ds.convert.setup import ConvertOptions, index_masks, settle
from eagle_ds.convert.sources import SourceItem, iter_source
from eagle_ds.convert.survey import Prediction, head_s_per_row, predict, survey
from eagle_ds.convert.work import Job, Outcome, Worker, run_jobs
from eagle_ds.store.manifest import STORE_JSON, SampleEntry, StoreInfo, read_manifest
from eagle_ds.store.writer import StoreWriter

logger = logging.getLogger(__name__)

REJECTED_NAME = "rejected.jsonl"
SLOW_TOKENS_PER_S = 2000


class ConversionStopped(RuntimeError):
    """The machine, not a file, is the reason: a full disk, or a target that cannot be used. What was converted stays."""


@dataclass
class Summary:
    """What a conversion did. "raw" bytes are the hidden states as they are in memory."""

    info: StoreInfo | None = None
    found: int = 0
    converted: int = 0
    already_done: int = 0
    compared: int = 0
    deleted: int = 0
    without_training: int = 0  # samples none of whose tokens is trained
    tokens: int = 0
    trained_tokens: int = 0
    source_bytes: int = 0
    raw_bytes: int = 0
    stored_bytes: int = 0
    seconds: float = 0.0
    stopped_early: bool = False
    rejected: list[Rejected] = field(default_factory=list)

    @property
    def reasons(self) -> Counter[Reason]:
        return Counter(rejected.reason for rejected in self.rejected)


@dataclass(frozen=True)
class Progress:
    """After each file: bytes of the source that are dealt with, of all there are to do."""

    done_bytes: int
    total_bytes: int
    done_files: int
    total_files: int
    rejected: int


def convert(options: ConvertOptions, on_progress: Callable[[Progress], None] = lambda progress: None) -> Summary:
    """Do it. Raises ValueError for what the user must change, `ConversionStopped` where the machine fails."""
    begin = time.perf_counter()
    found = _unique(iter_source(options.source, options.mapping))
    summary = Summary(found=len(found), rejected=list(found.duplicates))
    seen, unreadable = survey(found.items, options.workers)
    if seen is None or (options.strict and found.duplicates):
        options.destination.mkdir(parents=True, exist_ok=True)
        with _RejectLog(options.destination / REJECTED_NAME, found.duplicates) as log:
            for rejected in unreadable:
                _reject(summary, log, rejected)
    else:
        summary.info, completer = settle(options, seen)
        completer = replace(completer, masks=index_masks(options))
        _warn_of_slow_head(completer)
        worker = Worker(
            options.destination,
            summary.info,
            completer,
            verify=options.verify or options.delete_source,
            encoders=max(1, (os.cpu_count() or 1) // options.workers),
        )
        _run(options, found, worker, summary, on_progress)
    summary.stopped_early = options.strict and bool(summary.rejected)
    summary.seconds = time.perf_counter() - begin
    return summary


def predict_conversion(options: ConvertOptions) -> tuple[Summary, Prediction | None]:
    """``--dry-run``: the same checks of flags and a few files, and a prediction; writes nothing."""
    found = _unique(iter_source(options.source, options.mapping))
    items = found.items
    summary = Summary(found=len(found), rejected=list(found.duplicates))
    seen, unreadable = survey(items, options.workers)
    if seen is None:
        summary.rejected += unreadable
        return summary, None
    summary.info, completer = settle(options, seen)
    done = _stored(options.destination)
    pending = [item for item in items if item.id not in done]
    summary.already_done = len(items) - len(pending)
    return summary, predict(pending, seen, options.workers, completer.head()) if pending else None


def _warn_of_slow_head(completer: Completer) -> None:
    """A large vocabulary costs a CPU far more than everything else here."""
    if completer.head_device == "cpu" and (head := completer.head()) is not None:
        speed = 1 / head_s_per_row(head)
        if speed < SLOW_TOKENS_PER_S:
            advice = "--skip-head leaves target_token_id to the training, --head-device cuda is faster"
            logger.warning("the target's head on this CPU manages %.0f tokens/s a thread; %s", speed, advice)


def _run(
    options: ConvertOptions,
    found: _Found,
    worker: Worker,
    summary: Summary,
    on_progress: Callable[[Progress], None],
) -> None:
    """Convert what is not stored yet; compare what is, if asked to. Writes nothing before the store is ours alone."""
    items = found.items
    deleter = _Deleter(found) if options.delete_source else None
    with StoreWriter(worker.root, worker.info, workers=1) as writer, _RejectLog(worker.root / REJECTED_NAME, found.duplicates) as log:
        entries = {entry.id: entry for entry in read_manifest(worker.root)[0]}
        jobs = _jobs(items, {name: entries[name] for name in writer.done_ids}, compare=worker.verify)
        summary.already_done = len(writer.done_ids & {item.id for item in items})
        total_bytes, done_bytes = sum(job.item.file_bytes for job in jobs), 0
        with closing(run_jobs(jobs, worker, options.workers)) as outcomes:
            for number, outcome in enumerate(outcomes, start=1):
                _take(outcome, worker.verify, writer, summary, log, deleter)
                done_bytes += outcome.job.item.file_bytes
                on_progress(Progress(done_bytes, total_bytes, number, len(jobs), len(summary.rejected)))
                if options.strict and summary.rejected:
                    return


def _jobs(items: Sequence[SourceItem], stored: dict[str, SampleEntry], compare: bool) -> list[Job]:
    return [Job(item, stored.get(item.id)) for item in items if compare or item.id not in stored]


def _take(outcome: Outcome, compared: bool, writer: StoreWriter, summary: Summary, log: _RejectLog, deleter: _Deleter | None) -> None:
    """Book one outcome; the manifest line comes before the source goes."""
    if outcome.failure is not None:
        raise ConversionStopped(f"{outcome.failure}; what was converted is kept, run the same command again to go on")
    if outcome.rejected is not None:
        _reject(summary, log, outcome.rejected)
        return
    entry, job = outcome.entry, outcome.job
    assert entry is not None
    if job.entry is None:
        writer.register(entry)
        summary.converted += 1
        summary.source_bytes += job.item.file_bytes
        summary.raw_bytes += outcome.raw_bytes
        summary.stored_bytes += entry.bytes
        summary.tokens += entry.num_tokens
        summary.trained_tokens += entry.num_trained
        summary.without_training += entry.num_trained == 0
    summary.compared += compared
    if deleter is not None:
        summary.deleted += deleter.finished(job.item)


def _reject(summary: Summary, log: _RejectLog, rejected: Rejected) -> None:
    logger.warning("rejected %s", rejected)
    summary.rejected.append(rejected)
    log.add(rejected)


@dataclass(frozen=True)
class _Found:
    """What lies in the source: items of unlike ids, and a rejection for each whose id was taken."""

    items: list[SourceItem]
    duplicates: list[Rejected]
    with_duplicates: set[Path]  # the files that these lie in

    def __len__(self) -> int:
        return len(self.items) + len(self.duplicates)


def _unique(source: Iterator[SourceItem]) -> _Found:
    """Sort out ids that are taken: ``data_1.ckpt`` beside ``data_1.ckpt.gz``."""
    items: dict[str, SourceItem] = {}
    found = _Found([], [], set())
    for item in source:
        if item.id in items:
            detail = f"its id {item.id!r} is that of {items[item.id].path}; keep one of the two"
            found.duplicates.append(Rejected(item.place, Reason.DUPLICATE, detail))
            found.with_duplicates.add(item.path)
        else:
            items[item.id] = item
    found.items.extend(items.values())
    return found


def _stored(root: Path) -> set[str]:
    """Ids that the store at ``root`` holds, if there is one."""
    if not (root / STORE_JSON).exists():
        return set()
    return {entry.id for entry in read_manifest(root)[0] if (root / entry.path).exists()}


class _Deleter:
    """Deletes a source file once every sample in it is stored and compared; one that changed since, or is a link, stays."""

    def __init__(self, found: _Found) -> None:
        self._left = Counter(item.path for item in found.items)
        self._left.update(found.with_duplicates)  # what is not stored may not be deleted
        self._seen = {path: _stamp(path) for path in self._left}

    def finished(self, item: SourceItem) -> bool:
        """Count one sample off; True if that was the file's last and the file is gone."""
        path = item.path
        self._left[path] -= 1
        if self._left[path]:
            return False
        if path.is_symlink() or _stamp(path) != self._seen[path]:
            logger.warning("%s is kept: it is a link, or has changed since the conversion began", path)
            return False
        try:
            path.unlink()
        except OSError as error:
            logger.warning("%s is kept: it cannot be deleted (%s)", path, error.strerror)
            return False
        return True


def _stamp(path: Path) -> tuple[int, int] | None:
    """(size, time of the last change), None where there is no file."""
    try:
        info = path.stat()
    except OSError:
        return None
    return info.st_size, info.st_mtime_ns


class _RejectLog:
    """``rejected.jsonl``, one line a rejection, written as it happens; every run starts it afresh, as it tries again."""

    def __init__(self, path: Path, first: Sequence[Rejected]) -> None:
        self._file = path.open("w", encoding="utf-8")
        for rejected in first:
            self.add(rejected)

    def add(self, rejected: Rejected) -> None:
        line = {"path": rejected.path, "reason": str(rejected.reason), "detail": rejected.detail}
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()

    def __enter__(self) -> _RejectLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
