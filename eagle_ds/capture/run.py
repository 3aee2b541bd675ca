"""Run one capture: compute the hidden states of every pending sample and write them into the store.

A background thread encodes and writes each sample while the next ones are computed. To overlap more of the
work, change `capture`: `compute_samples` yields samples on the CPU, and writing them does not use the device.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from eagle_ds.capture.hf import ForwardLimits, StateExtractor, load_model
from eagle_ds.capture.job import PendingSample, PreparedCapture, require_space
from eagle_ds.data.conversations import REJECTED_NAME
from eagle_ds.store.processes import in_order
from eagle_ds.store.store import Sample, StoreWriter

WRITES_AHEAD = 2  # samples that wait for the writer: bounds the host memory
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def capture(prepared: PreparedCapture, progress: Callable[[int], None] = lambda tokens: None) -> int:
    """Compute and store every pending sample.

    It can be stopped at any moment: prepare the same job again and capture what is missing.

    Args:
        prepared: from :func:`eagle_ds.capture.job.prepare_capture`.
        progress: called with the number of tokens of each sample once it is stored.

    Returns: the number of samples written.

    Raises: ValueError if the disk is too small or fills up, or the target cannot be loaded.
    """
    require_space(prepared)
    store = prepared.job.store
    with disk_full_as_one_sentence(store), StoreWriter(store, prepared.info) as writer:
        prepared.intake.write(store / REJECTED_NAME)
        if not prepared.pending:
            return 0
        extractor = load_extractor(prepared)
        with ThreadPoolExecutor(1) as background:
            samples = compute_samples(prepared, extractor)
            writes = (background.submit(writer.add, sample) for sample in samples)
            for entry in in_order(writes, WRITES_AHEAD):
                progress(entry.num_tokens)
    return len(prepared.pending)


@contextlib.contextmanager
def disk_full_as_one_sentence(store: Path) -> Iterator[None]:
    """Turn the error of a full disk into a ValueError that says what to do.

    Samples written before it stay valid.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        # h5py passes on HDF5's message as a RuntimeError or OSError, with or without the error number.
        texts = [os.strerror(number) for number in DISK_FULL]
        if getattr(error, "errno", None) in DISK_FULL or any(text in str(error) for text in texts):
            detail = "the samples written so far are whole: free some space and run the same command again"
            raise ValueError(f"the disk of {store} is full; {detail}") from error
        raise


def load_extractor(prepared: PreparedCapture) -> StateExtractor:
    """Load the job's target onto its device."""
    job = prepared.job
    model = load_model(prepared.folder, job.dtype, job.device, job.attention)
    return StateExtractor(model, prepared.info.aux_layer_ids, getattr(torch, job.store_dtype), job.limits)


def compute_samples(prepared: PreparedCapture, extractor: StateExtractor) -> Iterator[Sample]:
    """Yield the pending samples with their hidden states, longest first."""
    for batch in make_batches(prepared.pending, extractor.limits):
        read, encode = prepared.file.read, prepared.encoder.encode
        encoded = [encode(read(sample.offset), sample.id) for sample in batch]
        ids = [torch.from_numpy(one.input_ids) for one in encoded if one is not None]
        for one, input_ids, states in zip(encoded, ids, extractor(ids), strict=True):
            yield Sample(
                id=one.id, input_ids=input_ids, loss_mask=torch.from_numpy(one.loss_mask),
                aux_hidden_state=states.aux_hidden_state, hidden_state=states.hidden_state,
                target_token_id=states.target_token_id, target_logsumexp=states.target_logsumexp)


def make_batches(samples: Sequence[PendingSample], limits: ForwardLimits) -> Iterator[list[PendingSample]]:
    """Group consecutive samples into batches for one forward pass. ``samples`` must be sorted, longest first.

    A batch is padded to its longest sample and then has at most ``limits.batch_tokens`` tokens. A sample
    longer than ``limits.chunk_tokens`` is a batch of its own.
    """
    batch: list[PendingSample] = []
    for sample in samples:
        width = max([sample.num_tokens, *(other.num_tokens for other in batch)])
        if batch and (width > limits.chunk_tokens or width * (len(batch) + 1) > limits.batch_tokens):
            yield batch
            batch = []
        batch.append(sample)
    if batch:
        yield batch


def predict_seconds(prepared: PreparedCapture) -> float:
    """Predict the seconds of all forward passes for the pending samples on this machine, without writing.

    Attention is quadratic in the length S and the rest is linear, so seconds(S) = a S + b S^2 is fitted to
    two timed forward passes.
    """
    extractor = load_extractor(prepared)
    longest = max(sample.num_tokens for sample in prepared.pending)
    short = min(longest, 512)
    long = min(longest, 2 * extractor.limits.chunk_tokens)
    _time_forward(extractor, short)  # warms up
    times = {length: _time_forward(extractor, length) for length in {short, long}}
    # times[S] / S = a + b S is a straight line through both measurements: b is its slope.
    quadratic = 0.0
    if long > short:
        quadratic = max(0.0, (times[long] / long - times[short] / short) / (long - short))
    linear = times[short] / short - quadratic * short
    return sum(linear * sample.num_tokens + quadratic * sample.num_tokens**2 for sample in prepared.pending)


def _time_forward(extractor: StateExtractor, length: int) -> float:
    start = time.perf_counter()
    extractor([torch.arange(length) % 1000])
    return time.perf_counter() - start
