"""One capture on several devices: a process with its own copy of the target each, one store.

The processes write sample files; the parent alone holds the store and enters them into its manifest. A target that does not
fit one GPU is captured by one process with ``device="split"`` instead.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import multiprocessing
import os
import queue
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from eagle_ds.capture.run import CaptureEstimate, compute, disk_errors, load_states, require_space
from eagle_ds.store.store import StoreWriter
from eagle_ds.store.writer import SampleFiles

log = logging.getLogger(__name__)

POLL_S = 1.0


def capture_on(estimate: CaptureEstimate, devices: Sequence[str], progress: Callable[[int], None] = lambda tokens: None) -> int:
    """As :func:`eagle_ds.capture.run.capture`, with a process for each of ``devices``."""
    require_space(estimate)
    with disk_errors(estimate.job.store), StoreWriter(estimate.job.store, estimate.info) as writer:
        context = multiprocessing.get_context("spawn")
        results = context.Queue()
        shares = [share for share in shares_of(estimate, devices) if share.todo]
        threads = max(1, torch.get_num_threads() // len(devices))
        workers = [context.Process(target=work, args=(share, os.getpid(), threads, results), daemon=True) for share in shares]
        with running(workers):
            for _ in estimate.todo:
                entry = next_result(results, workers)
                writer.register(entry)
                progress(entry.num_tokens)
    return len(estimate.todo)


@contextlib.contextmanager
def running(workers: Sequence[multiprocessing.process.BaseProcess]) -> Iterator[None]:
    """Processes that end by themselves when their work is done, and are ended where this process meets an error."""
    for worker in workers:
        worker.start()
    try:
        yield
    except BaseException:
        for worker in workers:
            worker.terminate()
        raise
    finally:
        for worker in workers:
            worker.join()


def shares_of(estimate: CaptureEstimate, devices: Sequence[str]) -> list[CaptureEstimate]:
    """The plan dealt out: samples are sorted by length, so every share gets its part of the long ones."""
    count = len(devices)
    jobs = [dataclasses.replace(estimate.job, device=device) for device in devices]
    return [dataclasses.replace(estimate, job=job, todo=estimate.todo[i::count]) for i, job in enumerate(jobs)]


def work(estimate: CaptureEstimate, parent: int, threads: int, results: Any) -> None:
    """Body of a process: entries, or the exception that ended it, go into ``results``."""
    torch.set_num_threads(threads)
    try:
        with SampleFiles(estimate.job.store, estimate.info) as files:
            for sample in compute(estimate, load_states(estimate)):
                if os.getppid() != parent:  # the capture was killed; a new one may be at work on this store
                    return
                results.put(files.write(sample))
    except (ValueError, OSError, RuntimeError) as error:
        results.put(error)


def next_result(results: Any, workers: Sequence[multiprocessing.process.BaseProcess]) -> Any:
    """What a worker put next; raises what a worker raised, or ChildProcessError if one died without a word."""
    while True:
        dead = [worker for worker in workers if worker.exitcode not in (None, 0)]
        try:
            result = results.get(timeout=POLL_S)
        except queue.Empty:
            if dead:
                raise ChildProcessError(f"a process died with exit code {dead[0].exitcode} (killed for lack of memory?)") from None
            continue
        if isinstance(result, BaseException):
            raise result
        return result
