"""Capture on several devices into one store: one process for each, with its own copy of the target.

The processes write sample files. Only the parent holds the store's lock, so only it adds the samples to the
manifest. A target that does not fit one GPU is captured by one process with ``device="split"`` instead.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from multiprocessing.connection import Connection

import torch

from eagle_ds.capture.job import PreparedCapture, require_space
from eagle_ds.capture.run import compute_samples, disk_full_as_one_sentence, load_extractor
from eagle_ds.data.conversations import REJECTED_NAME
from eagle_ds.store.processes import WorkerProcess, receive_all
from eagle_ds.store.store import StoreWriter
from eagle_ds.store.writer import SampleFiles


def capture_on_devices(
    prepared: PreparedCapture, devices: Sequence[str], progress: Callable[[int], None] = lambda tokens: None
) -> int:
    """Do what :func:`eagle_ds.capture.run.capture` does, with one process for each of ``devices``.

    Args:
        prepared: what to capture, from :func:`eagle_ds.capture.job.prepare_capture`.
        devices: such as ``["cuda:0", "cuda:1"]``.
        progress: called with the number of tokens of each sample once it is stored.

    Returns: the number of samples written.

    Raises: ValueError if the disk is too small or fills up; ChildProcessError if a process dies.
    """
    require_space(prepared)
    store = prepared.job.store
    with disk_full_as_one_sentence(store), StoreWriter(store, prepared.info) as writer:
        prepared.intake.write(store / REJECTED_NAME)
        # CUDA does not survive a fork, so these processes start from a fresh interpreter.
        context = multiprocessing.get_context("spawn")
        threads = max(1, torch.get_num_threads() // len(devices))
        shares = [share for share in split_samples(prepared, devices) if share.pending]
        workers = [WorkerProcess(context, _capture_share, share, os.getpid(), threads) for share in shares]
        with closing(receive_all(workers)) as entries:
            for entry in entries:
                writer.register(entry)
                progress(entry.num_tokens)
    return len(prepared.pending)


def split_samples(prepared: PreparedCapture, devices: Sequence[str]) -> list[PreparedCapture]:
    """Give the pending samples to ``devices`` in turn. They are sorted by length, so shares are similar."""
    jobs = [replace(prepared.job, device=device) for device in devices]
    return [
        replace(prepared, job=job, pending=prepared.pending[i :: len(jobs)]) for i, job in enumerate(jobs)]


def _capture_share(connection: Connection, share: PreparedCapture, parent: int, threads: int) -> None:
    """Run in a child process: send the parent the entry of each sample, or the exception that ended it."""
    torch.set_num_threads(threads)
    try:
        with SampleFiles(share.job.store, share.info) as files:
            for sample in compute_samples(share, load_extractor(share)):
                # If the parent has died, the system gives this process another parent. Stop then, because a
                # new capture may already write to this store.
                if os.getppid() != parent:
                    return
                connection.send(files.write(sample))
    except (ValueError, OSError, RuntimeError) as error:
        with suppress(OSError):  # the parent may be gone
            connection.send(error)
