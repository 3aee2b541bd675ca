"""The way of a batch to the device: read and inflated by processes that one thread waits for, copied in a second thread, while
the one before it trains."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType

import torch
from torch import Tensor

from eagle_ds.config.recipe import DataConfig
from eagle_ds.data.dataset import MicroBatch, RankDataset
from eagle_ds.data.prefetch import DeviceCopy, Prefetcher, adopt
from eagle_ds.data.read_pool import ReadPool
from eagle_ds.data.sampler import GlobalBatch
from eagle_ds.training.agreement import Agreement, attempt

GPU_READERS = 4  # processes, where the recipe says nothing; one reads 0.6 GB/s of hidden states on a CPU core (docs/benchmarks/h200.md)


def read_pool(data: DataConfig, device: torch.device) -> ReadPool | None:
    """The processes that the recipe asks for. None: read in the thread, which leaves a CPU's cores to the training."""
    processes = data.read_processes
    if processes is None:
        processes = GPU_READERS if device.type == "cuda" else 0
    return ReadPool(processes) if processes else None


class Feed:
    """Micro-batches of ``steps`` on ``device``, in order; ``depth`` are read ahead and one more is copied ahead."""

    def __init__(self, dataset: RankDataset, steps: Iterable[GlobalBatch], *, depth: int, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self._ttt_steps = device, dataset.settings.ttt_steps
        read = Prefetcher(dataset.batches(steps), depth, "read")
        self._batches = Prefetcher(DeviceCopy(read, device, dtype), 1, "copy")

    def take(self, agreement: Agreement) -> tuple[MicroBatch, Tensor]:
        """The next micro-batch and its step's counted rows int64 [T] summed over all ranks, once all ranks have agreed on it.

        Call ``go_on`` once its forward is launched: to read ahead takes the interpreter's lock some ten milliseconds, which the
        GPU would spend waiting for its first kernels.

        Collective. Raises RankFailure on all ranks if any could not read its data, or reads other data than the rest.
        """
        item, error = attempt(lambda: adopt(self._batches.take(), self.device))
        if item is None:
            agreement.check_micro_batch(error, (0, 0), "", [0] * self._ttt_steps)
        assert item is not None, "the agreement raises on every rank where one has an error"
        what = f"step {item.step.number + 1} micro-batch {item.index}: {', '.join(item.batch.names)} (plan {item.batch.sharding.digest})"
        return item, torch.from_numpy(agreement.check_micro_batch(error, item.fingerprints(), what, item.counted.tolist()))

    def go_on(self) -> None:
        """Read and copy what comes next."""
        self._batches.go_on()

    def close(self) -> None:
        """End both threads."""
        self._batches.close()

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
