"""One rank's training data: from a step's packs to batches that hold this rank's rows only.

The number of counted rows of a whole step (all its micro-batches) must be known before its first backward. It follows
from small arrays alone where the store has label facts; where it lacks them ``labeler`` makes them from the target rows,
and then a step's batches are all read before the first is handed out.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from eagle_ds.data.batch import Batch, TokenLabels, assemble, counted_rows
from eagle_ds.data.packing import Pack, ShardingSettings, TrainSample
from eagle_ds.data.read_pool import ReadPool, RowsWanted
from eagle_ds.data.sampler import GlobalBatch
from eagle_ds.sharding import ranges as rg
from eagle_ds.store.format import TORCH_DTYPES
from eagle_ds.store.store import ReadStats, SampleReader, Store, StoreError

Labeler = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Target hidden states [M, H] on the CPU -> (argmax int64 [M], log-sum-exp float32 [M]) over the full vocabulary."""


_Wanted = tuple[str, rg.Ranges, int]
"""(dataset, rows of the sequence, width)"""


@dataclass
class MicroBatch:
    """One rank's share of one pack, and what must be known about the step that it belongs to."""

    step: GlobalBatch
    index: int  # of the micro-batch in its step
    batch: Batch
    counted: Tensor  # int64 [T]: rows of the whole step that this rank counts; the same in all its micro-batches
    global_names: tuple[tuple[str, ...], ...]  # sample ids of this micro-batch, by dp rank
    global_tokens: int  # of the whole step, over all dp ranks
    stats: ReadStats = field(default_factory=ReadStats)
    read_s: float = 0.0

    @property
    def is_last(self) -> bool:
        """Whether the optimizer step follows."""
        return self.index + 1 == len(self.step.packs)

    def fingerprints(self) -> tuple[int, int]:
        """63-bit hashes that must agree: (place and samples, over all ranks; plan, over one sequence-parallel group)."""
        return _hash63(self.step.number, self.index, self.global_names), _hash63(self.batch.names, self.batch.sharding.digest)


class RankDataset:
    """Reads what sequence-parallel rank ``sp_rank`` of data-parallel rank ``dp_rank`` needs of each step.

    ``t2d`` bool [V] says which labels are in the draft vocabulary. With ``pin`` hidden states are read into pinned memory, with
    ``pool`` by its processes instead of the thread that asks for them.
    """

    def __init__(
        self,
        store: Store,
        samples: Sequence[TrainSample],
        settings: ShardingSettings,
        *,
        t2d: Tensor,
        dp_rank: int = 0,
        sp_rank: int = 0,
        labeler: Labeler | None = None,
        pool: ReadPool | None = None,
        pin: bool = False,
    ) -> None:
        self.store, self.samples, self.settings, self.t2d = store, samples, settings, t2d
        self.dp_rank, self.sp_rank = dp_rank, sp_rank
        self.labeler, self.pool, self.pin = labeler, pool, pin
        self.dtype = TORCH_DTYPES[store.info.dtype]

    def batches(self, steps: Iterable[GlobalBatch]) -> Iterator[MicroBatch]:
        """Every micro-batch of ``steps`` in order. Raises StoreError for a file that cannot be read."""
        for step in steps:
            yield from self._step(step)

    def _step(self, step: GlobalBatch) -> Iterator[MicroBatch]:
        opened = deque(_OpenPack(self, packs[self.dp_rank]) for packs in step.packs)
        if not all(pack.has_labels for pack in opened):
            for pack in opened:
                pack.fill()
        counted = torch.stack([pack.count() for pack in opened]).sum(0)
        tokens = sum(self.samples[n].document.num_tokens for packs in step.packs for pack in packs for n in pack)
        for index, packs in enumerate(step.packs):
            yield opened.popleft().finish(step, index, counted, tuple(map(self._names, packs)), tokens)

    def _names(self, pack: Pack) -> tuple[str, ...]:
        return tuple(self.samples[number].entry.id for number in pack)


class _OpenPack:
    """A pack on its way into memory: first the small arrays and all index arithmetic, then the hidden states."""

    def __init__(self, dataset: RankDataset, pack: Pack) -> None:
        started = time.perf_counter()
        self.dataset = dataset
        self.samples = [dataset.samples[number] for number in pack]
        by_processes = dataset.pool is not None
        self.readers = [dataset.store.reader(s.entry, threads=1, rows=not by_processes) for s in self.samples]
        self.sharding = dataset.settings.shard([sample.document for sample in self.samples])
        self.filled = False
        self.stats = ReadStats()  # of the pool's processes
        rank, settings = dataset.sp_rank, dataset.settings
        aux, hidden = (torch.empty(rg.count(rows), 0) for rows in (self.sharding.aux_rows(rank), self.sharding.target_rows(rank)))
        info = [_token_labels(s, reader) for s, reader in zip(self.samples, self.readers, strict=True)]
        names = tuple(s.entry.id for s in self.samples)
        self.batch = assemble(self.sharding, rank, info, aux, hidden, alignment=settings.alignment, names=names)
        self.read_s = time.perf_counter() - started

    @property
    def has_labels(self) -> bool:
        return self.batch.target_token is not None

    def count(self) -> Tensor:
        """int64 [T]: trained rows of this rank whose label's argmax is in the draft vocabulary."""
        batch = self.batch
        assert batch.target_token is not None
        return counted_rows(batch.trained, batch.target_token, batch.target_index, self.dataset.t2d).sum(0)

    def fill(self) -> None:
        """Read the hidden states, and make label facts where the store has none."""
        if self.filled:
            return
        started = time.perf_counter()
        rank, info = self.dataset.sp_rank, self.dataset.store.info
        aux, hidden = (self._read if self.dataset.pool is None else self._read_by_processes)(
            ("aux_hidden_state", self.sharding.aux_rows(rank), len(info.aux_layer_ids) * info.hidden_size),
            ("hidden_state", self.sharding.target_rows(rank), info.hidden_size),
        )
        self.batch = replace(self.batch, aux=aux, target_hidden=hidden)
        if not self.has_labels:
            if self.dataset.labeler is None:
                raise StoreError(
                    f"{self.readers[0].path} has no target_token_id and no target_logsumexp, and no head is at hand to make them from; "
                    "give the target's weights"
                )
            token, logsumexp = self.dataset.labeler(hidden)
            self.batch = replace(self.batch, target_token=token, target_logsumexp=logsumexp)
        self.filled = True
        self.read_s += time.perf_counter() - started

    def finish(self, step: GlobalBatch, index: int, counted: Tensor, names: tuple[tuple[str, ...], ...], tokens: int) -> MicroBatch:
        """The filled batch with its step's facts; the files are closed."""
        self.fill()
        stats = sum((reader.stats for reader in self.readers), self.stats)
        for reader in self.readers:
            reader.close()
        return MicroBatch(step, index, self.batch, counted, names, tokens, stats, self.read_s)

    def _read(self, *wanted: _Wanted) -> list[Tensor]:
        """[rows, width] of each."""
        return [self._rows(*one) for one in wanted]

    def _rows(self, name: str, rows: rg.Ranges, width: int) -> Tensor:
        out = torch.empty(rg.count(rows), width, dtype=self.dataset.dtype, pin_memory=self.dataset.pin)
        done = 0
        for number, ranges in self.sharding.file_rows(rows):
            stop = done + rg.count(ranges)
            self.readers[number].read_rows(name, ranges, out[done:stop])
            done = stop
        return out

    def _read_by_processes(self, *wanted: _Wanted) -> list[Tensor]:
        """As ``_read``, all at once."""
        assert self.dataset.pool is not None
        store, dtype = self.dataset.store, self.dataset.dtype
        parts = [
            RowsWanted(self.readers[n].path, self.samples[n].entry, store.info, name, tuple(ranges), (rg.count(ranges), width), dtype)
            for name, rows, width in wanted
            for n, ranges in self.sharding.file_rows(rows)
        ]
        both = torch.empty(sum(part.nbytes for part in parts), dtype=torch.uint8, pin_memory=self.dataset.pin)
        self.stats = self.dataset.pool.read(parts, both)
        sizes = [rg.count(rows) * width * dtype.itemsize for _, rows, width in wanted]
        return [part.view(dtype).view(-1, width) for part, (*_, width) in zip(both.split(sizes), wanted, strict=True)]


def _token_labels(sample: TrainSample, reader: SampleReader) -> TokenLabels:
    """The small arrays, cut to what is trained on."""
    size = sample.document.num_tokens
    arrays: dict[str, np.ndarray | None] = {}
    for name in ("input_ids", "loss_mask", "target_token_id", "target_logsumexp"):
        values = reader.read_small(name)
        arrays[name] = None if values is None else values[:size].numpy()
    return TokenLabels(**arrays)


def _hash63(*values: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(values).encode()).digest()[:8], "big") >> 1
