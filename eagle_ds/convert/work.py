"""The workers of a conversion: processes that each turn one source item after the other into a store file.

A plain pool over pipes, so that a worker killed by the system (out of memory) is known together with the file it was at, and
costs that file only. Workers write files; the one manifest stays with the parent.
"""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from eagle_ds.convert.completion import Completer
from eagle_ds.convert.rejected import Reason, Rejected
from eagle_ds.convert.sources import SourceItem
from eagle_ds.store.format import SMALL_DTYPES, WIDE_NAMES, Sample
from eagle_ds.store.manifest import SampleEntry, StoreError, StoreInfo
from eagle_ds.store.processes import fork_server
from eagle_ds.store.reader import SampleReader
from eagle_ds.store.writer import SampleFiles

SOURCE_NAMES = ("input_ids", "loss_mask")  # what a later run can compare: it may compute the head's facts in another order
READ_AHEAD_BYTES = 1 << 30  # of a file that comes next; a longer one is read on as it is used
ADVICE_BYTES = 1 << 20  # at once: of a longer range the kernel reads the beginning only
COMPARE_ROWS = 1024  # a multiple of the chunk's rows


@dataclass(frozen=True)
class Job:
    """Convert an item, or, where ``entry`` is given, only compare what an earlier run stored."""

    item: SourceItem
    entry: SampleEntry | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a job: an entry for the manifest, or a rejection; ``failure`` is of the machine, not of the file."""

    job: Job
    entry: SampleEntry | None = None
    rejected: Rejected | None = None
    failure: str | None = None
    raw_bytes: int = 0


@dataclass(frozen=True)
class Worker:
    """Converts items into files under ``root``. Pickles to its process."""

    root: Path
    info: StoreInfo
    completer: Completer
    verify: bool
    encoders: int

    def run(self, job: Job, files: SampleFiles) -> Outcome:
        try:
            sample = job.item.load(self.completer)
            entry = job.entry or files.write(sample)
            if self.verify:
                names = SOURCE_NAMES if job.entry else tuple(SMALL_DTYPES)
                compare(sample, names, self.root, entry, self.info, job.item.place)
        except Rejected as error:
            return Outcome(job, rejected=error)
        except OSError as error:
            return Outcome(job, failure=f"{self.root}: {error.strerror or error}")
        except ValueError as error:
            return Outcome(job, failure=str(error))
        except Exception as error:  # one file's oddity must not stop a million others
            detail = f"converting it failed ({type(error).__name__}: {str(error)[:200]}); the file is left as it is"
            return Outcome(job, rejected=Rejected(job.item.place, Reason.FAILED, detail))
        return Outcome(job, entry, raw_bytes=sample.aux_hidden_state.nbytes + sample.hidden_state.nbytes)


def compare(sample: Sample, names: Sequence[str], root: Path, entry: SampleEntry, info: StoreInfo, place: str) -> None:
    """Read the stored file back from the disk and hold the hidden states and the small datasets ``names`` against the
    sample, bit for bit; `Rejected` where they differ."""
    path = root / entry.path
    _advise(path, os.POSIX_FADV_DONTNEED)  # what is compared comes from the disk, not from the page cache
    try:
        with SampleReader(path, entry, info, threads=1) as reader:
            difference = _difference(sample, names, reader)
    except StoreError as error:
        difference = str(error)
    if difference:
        mend = f"the source is kept; delete {path} and run again"
        raise Rejected(place, Reason.READBACK, f"{difference}; {mend}")


def _difference(sample: Sample, names: Sequence[str], reader: SampleReader) -> str | None:
    """What of the stored file is not what the source holds."""
    for name in names:
        ours, theirs = getattr(sample, name), reader.read_small(name)
        if (ours is None) != (theirs is None) or (ours is not None and not torch.equal(_bits(ours), _bits(theirs))):
            return f"{name} is not what the source holds"
    for name in WIDE_NAMES:
        ours = getattr(sample, name)
        block = torch.empty(min(COMPARE_ROWS, len(ours)), ours.shape[1], dtype=ours.dtype)
        for start in range(0, len(ours), COMPARE_ROWS):
            rows = (start, min(start + COMPARE_ROWS, len(ours)))
            theirs = reader.read_rows(name, [rows], block[: rows[1] - rows[0]])
            if not torch.equal(_bits(ours[slice(*rows)]), _bits(theirs)):
                return f"{name} rows {rows[0]}:{rows[1]} are not what the source holds"
    return None


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Floats as integers, so that NaN equals itself and -0 differs from 0."""
    integers = {2: torch.int16, 4: torch.int32}
    return tensor.view(integers[tensor.element_size()]) if tensor.is_floating_point() else tensor


def run_jobs(jobs: Iterable[Job], worker: Worker, workers: int) -> Iterator[Outcome]:
    """Outcomes in the order they come. One worker runs here, in this process. Closing the generator ends the workers."""
    jobs = _read_ahead(iter(jobs), workers)
    if workers == 1:
        with SampleFiles(worker.root, worker.info, workers=worker.encoders) as files:
            for job in jobs:
                outcome = worker.run(job, files)
                _let_go(job)
                yield outcome
        return
    with _Pool(worker, workers) as pool:
        yield from pool.run(jobs)


def _read_ahead(jobs: Iterator[Job], depth: int) -> Iterator[Job]:
    """The same jobs; the kernel is told of each file ``depth`` jobs early, so that the disk reads while workers encode.

    By a thread: telling waits while the disk's queue is full, and no worker should wait for a job meanwhile.
    """
    waiting: deque[Job] = deque()
    advisor = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
    try:
        for job in jobs:
            if not job.item.group:
                advisor.submit(_advise, job.item.path, os.POSIX_FADV_WILLNEED, READ_AHEAD_BYTES)
            waiting.append(job)
            if len(waiting) > depth:
                yield waiting.popleft()
        yield from waiting
    finally:
        advisor.shutdown(wait=False, cancel_futures=True)


def _let_go(job: Job) -> None:
    """Forget the page cache's copy of a source that is done with: the next ones need the room."""
    if not job.item.group:
        _advise(job.item.path, os.POSIX_FADV_DONTNEED)


def _advise(path: Path, advice: int, num_bytes: int = 0) -> None:
    """Tell the kernel about the first ``num_bytes`` of a file (0: all); silent where there is none, its reader will say so."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe would wait for its writer
        try:
            end = min(num_bytes, os.fstat(descriptor).st_size)
            for start in range(0, end, ADVICE_BYTES) if end else (0,):
                os.posix_fadvise(descriptor, start, min(end - start, ADVICE_BYTES), advice)
        finally:
            os.close(descriptor)


class _Pool:
    def __init__(self, worker: Worker, workers: int) -> None:
        self._context, self._worker = fork_server(), worker
        self._busy: dict[Connection, Job] = {}
        self._processes: dict[Connection, BaseProcess] = {}
        self._size = workers

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for connection, process in self._processes.items():
            process.terminate()
            process.join()
            connection.close()

    def run(self, jobs: Iterator[Job]) -> Iterator[Outcome]:
        for _ in range(self._size):
            self._give(jobs)
        while self._busy:
            for connection in wait(list(self._busy)):
                assert isinstance(connection, Connection)
                job = self._busy.pop(connection)
                try:
                    outcome = connection.recv()
                except (EOFError, ConnectionResetError):
                    outcome = self._bury(connection, job)
                    self._give(jobs)
                else:
                    self._give(jobs, connection)
                yield outcome

    def _give(self, jobs: Iterator[Job], connection: Connection | None = None) -> None:
        """The next job to a worker, a new one if none is named; nothing where no job is left."""
        if (job := next(jobs, None)) is None:
            return
        connection = connection or self._start()
        try:
            connection.send(job)
        except OSError:  # it died between two jobs
            self._dismiss(connection)
            connection = self._start()
            connection.send(job)
        self._busy[connection] = job

    def _start(self) -> Connection:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, self._worker), daemon=True)
        process.start()
        theirs.close()
        self._processes[ours] = process
        return ours

    def _bury(self, connection: Connection, job: Job) -> Outcome:
        cause = f"the worker that converted it died (exit code {self._dismiss(connection)}"
        hint = "; -9 is mostly the system's out-of-memory killer: use fewer --workers)"
        return Outcome(job, rejected=Rejected(job.item.place, Reason.WORKER, cause + hint))

    def _dismiss(self, connection: Connection) -> int | None:
        """Forget a dead worker; its exit code."""
        process = self._processes.pop(connection)
        process.join()
        connection.close()
        return process.exitcode


def _serve(connection: Connection, worker: Worker) -> None:
    """A worker process: one job after the other until the parent goes away."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    torch.set_num_threads(1)
    with SampleFiles(worker.root, worker.info, workers=worker.encoders) as files:
        while True:
            try:
                job = connection.recv()
                outcome = worker.run(job, files)
                _let_go(job)
                connection.send(outcome)
            except (EOFError, BrokenPipeError):
                return
