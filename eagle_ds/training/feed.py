"""Bring micro-batches to the device while the previous one trains.

Three stages run ahead of the training loop: processes read and inflate hidden states, one thread waits for
them and assembles batches, and a second thread copies each batch to the device.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from eagle_ds.config.sections import DataConfig
from eagle_ds.data.dataset import MicroBatch, RankDataset
from eagle_ds.data.prefetch import DeviceCopy, Prefetcher, record_use
from eagle_ds.data.read_pool import ReadPool
from eagle_ds.data.sampler import GlobalBatch
from eagle_ds.training.agreement import Agreement, attempt

# Reading processes on a GPU machine where the recipe does not say. One process inflates 0.6 GB/s of hidden
# states on one CPU core (docs/benchmarks/h200.md).
GPU_READERS = 4


def read_pool(data: DataConfig, device: torch.device) -> ReadPool | None:
    """Start the reading processes that the recipe asks for.

    Returns None where the thread reads by itself. That is the default on a CPU, where training needs all
    cores.
    """
    processes = data.read_processes
    if processes is None:
        processes = GPU_READERS if device.type == "cuda" else 0
    return ReadPool(processes) if processes else None


@dataclass(frozen=True)
class FeedSettings:
    """How far to read ahead, and where batches go."""

    depth: int  # micro-batches read ahead; one more is copied ahead
    device: torch.device
    dtype: torch.dtype  # of the hidden states on the device


class Feed:
    """Micro-batches of ``steps`` on the device, in order. Use as a context manager."""

    def __init__(self, dataset: RankDataset, steps: Iterable[GlobalBatch], settings: FeedSettings) -> None:
        self.device, self._ttt_steps = settings.device, dataset.settings.ttt_steps
        read = Prefetcher(dataset.micro_batches(steps), settings.depth, "read")
        self._batches = Prefetcher(DeviceCopy(read, settings.device, settings.dtype), 1, "copy")

    def take(self, agreement: Agreement) -> tuple[MicroBatch, Tensor]:
        """Return the next micro-batch, once all ranks agree on it. Collective.

        Call `advance` once its forward is queued. Reading ahead holds the interpreter's lock for some ten
        milliseconds; before the forward, the GPU would spend them waiting for its first kernels.

        Returns:
            The micro-batch, and the counted rows of its whole step summed over all ranks, int64 [T].

        Raises:
            RankFailure: on all ranks, if any rank cannot read its data or holds other data than the rest.
        """
        item, error = attempt(lambda: record_use(self._batches.take(), self.device))
        if item is None:
            # This rank has an error, which the agreement raises on every rank. The zeros only fill the
            # message.
            agreement.check_micro_batch(error, (0, 0), "", [0] * self._ttt_steps)
        assert item is not None, "check_micro_batch raises on every rank if one has an error"
        names, digest = ", ".join(item.batch.names), item.batch.sharding.digest
        what = f"step {item.global_batch.number + 1} micro-batch {item.index}: {names} (sharding {digest})"
        counted = agreement.check_micro_batch(error, item.fingerprints(), what, item.counted.tolist())
        return item, torch.from_numpy(counted)

    def advance(self) -> None:
        """Allow both threads to prepare one more micro-batch."""
        self._batches.advance()

    def close(self) -> None:
        """End both threads."""
        self._batches.close()

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
