"""Convert one source sample into a store file, in this process or in several worker processes.

Workers write sample files; only the parent writes the manifest. If the system kills a worker (out of memory,
a segmentation fault), the parent knows its file, rejects that file, and starts another worker.
"""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch

from eagle_ds.convert.completion import Completer
from eagle_ds.convert.formats import Reason, Rejected
from eagle_ds.convert.sources import SourceItem
from eagle_ds.store.format import SMALL_DTYPES, WIDE_NAMES, Sample, same_bits
from eagle_ds.store.manifest import SampleEntry, StoreError, StoreInfo
from eagle_ds.store.processes import WorkerProcess, fork_server
from eagle_ds.store.reader import SampleReader
from eagle_ds.store.writer import SampleFiles

# What is compared with an earlier run's file. Argmax and log-sum-exp of the target's logits are not: this run
# may compute them on another device, where sums are rounded differently.
SOURCE_NAMES = ("input_ids", "loss_mask")
READ_AHEAD_BYTES = 1 << 30  # of a file that comes next; the rest of a longer file is read when it is used
ADVICE_BYTES = 1 << 20  # for one call, because the kernel reads only the beginning of a longer range
COMPARE_ROWS = 1024  # a multiple of the chunk's rows


@dataclass(frozen=True)
class Job:
    """Convert ``item``; or, if ``entry`` is given, only compare it with what an earlier run stored."""

    item: SourceItem
    entry: SampleEntry | None = None


@dataclass(frozen=True)
class Outcome:
    """The result of a job: an ``entry`` for the manifest, a rejected file, or the machine's ``failure``."""

    job: Job
    entry: SampleEntry | None = None
    rejected: Rejected | None = None
    failure: str | None = None
    raw_bytes: int = 0


@dataclass(frozen=True)
class Worker:
    """Converts items into files of the store ``root``. It is pickled to the worker processes."""

    root: Path
    info: StoreInfo
    completer: Completer
    verify: bool  # read each file back and compare it
    encoders: int  # threads that encode chunks

    def run(self, job: Job, files: SampleFiles) -> Outcome:
        """Do one job. Never raises, because one odd file must not stop the conversion of all others."""
        try:
            sample = job.item.load(self.completer)
            entry = job.entry or files.write(sample)
            if self.verify:
                names = SOURCE_NAMES if job.entry else tuple(SMALL_DTYPES)
                compare(sample, names, self.root, entry, self.info)
        except Rejected as error:
            return Outcome(job, rejected=error.at(job.item.place))
        except OSError as error:  # reading raises Rejected, so this is the store's disk
            return Outcome(job, failure=f"{self.root}: {error.strerror or error}")
        except ValueError as error:  # the target cannot be used
            return Outcome(job, failure=str(error))
        except Exception as error:
            cause = f"{type(error).__name__}: {str(error)[:200]}"
            detail = f"converting it failed ({cause}); the file is left unchanged"
            return Outcome(job, rejected=Rejected(Reason.FAILED, detail, job.item.place))
        finally:
            if not job.item.group:  # free the page cache of the source: the next files need the memory
                _advise(job.item.path, os.POSIX_FADV_DONTNEED)
        return Outcome(job, entry, raw_bytes=sample.aux_hidden_state.nbytes + sample.hidden_state.nbytes)


def compare(sample: Sample, names: Sequence[str], root: Path, entry: SampleEntry, info: StoreInfo) -> None:
    """Read the stored file back from the disk and compare it with the source, bit for bit.

    Compared are the hidden states and the small datasets ``names``. Raises `Rejected` if anything differs.
    """
    path = root / entry.path
    _advise(path, os.POSIX_FADV_DONTNEED)  # read from the disk, not from the page cache
    try:
        with SampleReader(path, entry, info, threads=1) as reader:
            difference = _difference(sample, names, reader)
    except StoreError as error:
        difference = str(error)
    if difference:
        raise Rejected(Reason.READBACK, f"{difference}; the source is kept: delete {path} and run again")


def _difference(sample: Sample, names: Sequence[str], reader: SampleReader) -> str | None:
    """Name the first part of the stored file that differs from the sample; None if all are equal."""
    for name in names:
        ours, theirs = getattr(sample, name), reader.read_small(name)
        if (ours is None) != (theirs is None) or (ours is not None and not same_bits(ours, theirs)):
            return f"{name} differs from the source"
    for name in WIDE_NAMES:
        ours = getattr(sample, name)
        buffer = torch.empty(min(COMPARE_ROWS, len(ours)), ours.shape[1], dtype=ours.dtype)
        for start in range(0, len(ours), COMPARE_ROWS):
            end = min(start + COMPARE_ROWS, len(ours))
            theirs = reader.read_rows(name, [(start, end)], buffer[: end - start])
            if not same_bits(ours[start:end], theirs):
                return f"{name} rows {start}:{end} differ from the source"
    return None


def run_jobs(jobs: Iterable[Job], worker: Worker, workers: int) -> Iterator[Outcome]:
    """Yield outcomes as they come, from ``workers`` processes (1: this process). Closing it ends them."""
    jobs = _read_ahead(iter(jobs), workers)
    if workers > 1:
        yield from _run_in_processes(jobs, worker, workers)
        return
    with SampleFiles(worker.root, worker.info, workers=worker.encoders) as files:
        for job in jobs:
            yield worker.run(job, files)


def _run_in_processes(jobs: Iterator[Job], worker: Worker, workers: int) -> Iterator[Outcome]:
    """Give each process one job at a time: if it dies, its file is known, and little is in memory at once."""
    with ExitStack() as started:  # stops every process, however this generator ends
        busy = []
        for job in islice(jobs, workers):
            process = ConverterProcess(worker)
            started.callback(process.stop)
            process.begin(job)
            busy.append(process)
        while busy:
            ready = wait([process.connection for process in busy])
            for process in [process for process in busy if process.connection in ready]:
                outcome = process.outcome()
                # The next job goes out before the outcome is recorded: the process works meanwhile.
                if (job := next(jobs, None)) is None:
                    busy.remove(process)
                else:
                    process.begin(job)
                yield outcome


class ConverterProcess:
    """A worker process and its present job."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self.child = WorkerProcess(fork_server(), _serve, worker)

    @property
    def connection(self) -> Connection:
        """Has something to read once `outcome` will not wait."""
        return self.child.connection

    def begin(self, job: Job) -> None:
        """Send a job to the process; start a new process if it died at the last one."""
        if not self.child.process.is_alive():
            self.child.stop()
            self.child = WorkerProcess(fork_server(), _serve, self._worker)
        self._job = job
        with suppress(OSError):  # it died this very moment; `outcome` finds out
            self.connection.send(job)

    def outcome(self) -> Outcome:
        """Wait for the outcome of the job; the death of the process rejects the job's file."""
        try:
            return self.child.receive()
        except EOFError:
            code = self.child.exit_code()
            hint = "-9 is usually the system's out-of-memory killer: use fewer --workers"
            detail = f"the worker that converted it died (exit code {code}; {hint})"
            return Outcome(self._job, rejected=Rejected(Reason.WORKER, detail, self._job.item.place))

    def stop(self) -> None:
        """End the process."""
        self.child.stop()


def _serve(connection: Connection, worker: Worker) -> None:
    """Run in a worker process: do jobs one by one until the parent closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent decides
    torch.set_num_threads(1)
    with SampleFiles(worker.root, worker.info, workers=worker.encoders) as files, suppress(EOFError, OSError):
        while True:
            connection.send(worker.run(connection.recv(), files))


def _read_ahead(jobs: Iterator[Job], depth: int) -> Iterator[Job]:
    """Yield the same jobs, and ask the kernel to read each file ``depth`` jobs early, while workers encode.

    A thread asks, because the call blocks while the disk's queue is full. No worker should wait for that.
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


def _advise(path: Path, advice: int, num_bytes: int = 0) -> None:
    """Advise the kernel about the first ``num_bytes`` of a file (0: all), if the file can be opened."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe would wait for its writer
        try:
            end = min(num_bytes, os.fstat(descriptor).st_size)
            for start in range(0, end, ADVICE_BYTES) if end else (0,):
                os.posix_fadvise(descriptor, start, min(end - start, ADVICE_BYTES), advice)
        finally:
            os.close(descriptor)
