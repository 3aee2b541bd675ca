"""Decode prompts in several processes, each with its own copy of the target.

On a CPU, one pass over a few tokens is too little work to share among threads, and threads that wait for each
other lose much more on a busy machine than independent processes. So each process has its own core and its
own prompts.
"""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from multiprocessing.connection import Connection
from typing import Any

import torch

from eagle_ds.drafts.cached_draft import CachedDraft
from eagle_ds.drafts.loading import DraftOnDisk
from eagle_ds.evaluation.acceptance import (
    LoadedTarget,
    Measurement,
    Progress,
    Prompt,
    TargetFiles,
    batches_of,
    measure,
    warm_up,
)
from eagle_ds.evaluation.decoding import DecodeSettings
from eagle_ds.store.processes import WorkerProcess, receive_all


@dataclass(frozen=True)
class DecodingJob:
    """What every process loads: a target on ``device`` in ``dtype``, and the drafts to decode with, by name.

    ``batch``: prompts that a process decodes together.
    """

    target: TargetFiles
    layers: tuple[int, ...]
    dtype: str
    device: str
    drafts: Mapping[str, DraftOnDisk]
    settings: DecodeSettings
    batch: int = 1

    def load(self) -> tuple[LoadedTarget, dict[str, CachedDraft]]:
        """Load target and drafts. Raises ValueError if the target cannot be loaded or does not fit a draft.
        """
        target = LoadedTarget.load(self.target, self.layers, self.dtype, self.device)
        return target, {name: target.cache(draft) for name, draft in self.drafts.items()}


def measure_job(job: DecodingJob, prompts: list[Prompt], processes: int, progress: Progress) -> Measurement:
    """Measure like ``acceptance.measure``, with the prompts shared among ``processes``.

    Every process warms up before it measures. ``progress`` is called with the number of new tokens.
    """
    for draft in job.drafts.values():
        draft.check_target(job.target.info, job.target.folder)
    processes = min(processes, -(-len(prompts) // job.batch))
    if processes <= 1:
        target, drafts = job.load()
        warm_up(target.cached, drafts, prompts, job.settings, job.batch)
        return measure(target.cached, drafts, prompts, job.settings, progress=progress, batch=job.batch)
    return _gather(job, prompts, processes, progress)


def _gather(job: DecodingJob, prompts: Sequence[Prompt], processes: int, progress: Progress) -> Measurement:
    """Give out batches of prompts, the longest first; collect the answers in the order of the prompts."""
    context = multiprocessing.get_context("spawn")
    tasks = context.Queue()
    for indices in batches_of(prompts, job.batch):
        tasks.put((indices, [prompts[i] for i in indices]))
    for _ in range(processes):
        tasks.put(None)
    threads = max(1, torch.get_num_threads() // processes)
    # As bytes: tensors in a task would be passed through shared memory, and containers have little of it.
    packed = pickle.dumps(job)
    workers = [WorkerProcess(context, _work, packed, threads, tasks) for _ in range(processes)]
    answers: dict[int, Measurement] = {}
    with closing(receive_all(workers)) as measurements:
        for indices, measured in measurements:
            answers |= dict(zip(indices, measured.split(), strict=True))
            answered = chain(measured.plain, *measured.drafts.values())
            progress(sum(len(decoded.tokens) for decoded in answered))
    ordered = [answers[index] for index in range(len(prompts))]
    return Measurement.join(job.settings, prompts, ordered)


def _work(connection: Connection, packed: bytes, threads: int, tasks: Any) -> None:
    """Send (indices, answers) of each batch until none is left, or the error that ended this process."""
    torch.set_num_threads(threads)
    try:
        job: DecodingJob = pickle.loads(packed)
        target, drafts = job.load()
        warm = False
        while (task := tasks.get()) is not None:
            indices, prompts = task
            if not warm:
                warm_up(target.cached, drafts, prompts, job.settings, job.batch)
                warm = True
            measured = measure(target.cached, drafts, prompts, job.settings, batch=job.batch)
            connection.send((indices, measured))
    except (ValueError, OSError, RuntimeError) as error:
        connection.send(error)
