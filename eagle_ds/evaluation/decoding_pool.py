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
from multiprocessing.connection import Connection
from typing import Any

import torch

from eagle_ds.drafts.cached_draft import CachedDraft
from eagle_ds.drafts.loading import DraftOnDisk
from eagle_ds.evaluation.acceptance import LoadedTarget, Measurement, Progress, Prompt, TargetFiles, measure
from eagle_ds.evaluation.decoding import DecodeSettings
from eagle_ds.store.processes import WorkerProcess, receive_all


@dataclass(frozen=True)
class DecodingJob:
    """What every process loads: a target on ``device`` in ``dtype``, and the drafts to decode with, by name.
    """

    target: TargetFiles
    layers: tuple[int, ...]
    dtype: str
    device: str
    drafts: Mapping[str, DraftOnDisk]
    settings: DecodeSettings

    def load(self) -> tuple[LoadedTarget, dict[str, CachedDraft]]:
        """Load target and drafts. Raises ValueError if the target cannot be loaded or does not fit a draft.
        """
        target = LoadedTarget.load(self.target, self.layers, self.dtype, self.device)
        return target, {name: target.cache(draft) for name, draft in self.drafts.items()}


def measure_job(job: DecodingJob, prompts: list[Prompt], processes: int, progress: Progress) -> Measurement:
    """Measure like ``acceptance.measure``, with the prompts shared among ``processes``.

    ``progress`` is called with the number of new tokens.
    """
    for draft in job.drafts.values():
        draft.check_target(job.target.info, job.target.folder)
    processes = min(processes, len(prompts))
    if processes <= 1:
        target, drafts = job.load()
        return measure(target.cached, drafts, prompts, job.settings, progress=progress)
    return _gather(job, prompts, processes, progress)


def _gather(job: DecodingJob, prompts: Sequence[Prompt], processes: int, progress: Progress) -> Measurement:
    """Give out prompts one at a time, the longest first, and collect the answers in the order of the prompts.
    """
    context = multiprocessing.get_context("spawn")
    tasks = context.Queue()
    for index in sorted(range(len(prompts)), key=lambda i: -len(prompts[i].ids)):
        tasks.put((index, prompts[index]))
    for _ in range(processes):
        tasks.put(None)
    threads = max(1, torch.get_num_threads() // processes)
    # As bytes: tensors in a task would be passed through shared memory, and containers have little of it.
    packed = pickle.dumps(job)
    workers = [WorkerProcess(context, _work, packed, threads, tasks) for _ in range(processes)]
    answers: dict[int, Measurement] = {}
    with closing(receive_all(workers)) as measurements:
        for index, measured in measurements:
            answers[index] = measured
            answered = (*measured.plain, *(one for (one,) in measured.drafts.values()))
            progress(sum(len(decoded.tokens) for decoded in answered))
    ordered = [answers[index] for index in range(len(prompts))]
    plain = [decoded for one in ordered for decoded in one.plain]
    drafts = {name: [one.drafts[name][0] for one in ordered] for name in job.drafts}
    return Measurement(job.settings, list(prompts), plain, drafts)


def _work(connection: Connection, packed: bytes, threads: int, tasks: Any) -> None:
    """Send (index, answers) for each prompt until none is left, or the error that ended this process."""
    torch.set_num_threads(threads)
    try:
        job: DecodingJob = pickle.loads(packed)
        target, drafts = job.load()
        while (task := tasks.get()) is not None:
            index, prompt = task
            connection.send((index, measure(target.cached, drafts, [prompt], job.settings)))
    except (ValueError, OSError, RuntimeError) as error:
        connection.send(error)
