"""Load one rank's training data: from global batches to micro-batches that hold this rank's rows only.

For each pack a rank reads the token arrays of all documents, which are small, and the hidden states of its
own rows, which are large.

**Counted rows come first.** The loss is divided by the number of counted rows of the whole global batch, so
this number must be known before the first backward. If the store has labels, the number follows from the
token arrays alone, and hidden states are read one micro-batch at a time. If the store has no labels,
``labeler`` computes them from the target rows' hidden states. All hidden states of the global batch are then
read before its first micro-batch is yielded.

**Hidden states are read in one of two ways**, which give the same bytes:

- in the calling thread (``pool`` is None), usually the prefetcher's. This suits training on a CPU, which
  needs all cores anyway.
- by the processes of a `ReadPool`, which write into shared memory. With a GPU the training thread launches
  thousands of kernels per step and needs the interpreter lock for each. Threads that inflate chunks would
  take that lock a few times per chunk and delay the launches (data/read_pool.py gives figures). Other
  processes have their own locks.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from eagle_ds.data.batch import Batch, TokenLabels, assemble, counted_rows
from eagle_ds.data.packing import Pack, ShardingSettings, TrainSample
from eagle_ds.data.read_pool import ReadPool, RowRequest
from eagle_ds.data.sampler import GlobalBatch
from eagle_ds.sharding import ranges as rg
from eagle_ds.store.format import SMALL_DTYPES, TORCH_DTYPES
from eagle_ds.store.store import ReadStats, SampleReader, Store, StoreError

Labeler = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Target hidden states [M, H] on the CPU -> (argmax int64 [M], log-sum-exp float32 [M]) of the logits."""


@dataclass
class MicroBatch:
    """One rank's share of one pack, and the figures of its global batch that training needs."""

    global_batch: GlobalBatch
    index: int  # of the micro-batch in its global batch
    batch: Batch
    counted: Tensor  # int64 [T]: counted rows of this rank in the whole global batch
    global_names: tuple[tuple[str, ...], ...]  # sample ids of this micro-batch, by dp rank
    global_tokens: int  # tokens of the whole global batch, over all dp ranks
    stats: ReadStats = field(default_factory=ReadStats)
    read_s: float = 0.0

    @property
    def is_last(self) -> bool:
        """Whether the optimizer step follows this micro-batch."""
        return self.index + 1 == len(self.global_batch.packs)

    def fingerprints(self) -> tuple[int, int]:
        """Return two 63-bit hashes that ranks compare.

        The first covers the micro-batch's number and sample ids and must be equal on all ranks. The second
        covers the sharding and must be equal within a sequence-parallel group.
        """
        place = _hash63(self.global_batch.number, self.index, self.global_names)
        return place, _hash63(self.batch.names, self.batch.sharding.digest)


class RankDataset:
    """Read what one rank needs of each global batch.

    Args:
        store: the store.
        samples: its samples that training uses; packs index into them.
        settings: how sequences are sharded.
        t2d: bool [V], which target tokens are in the draft vocabulary.
        dp_rank: data-parallel rank: which pack of a micro-batch is this rank's.
        sp_rank: sequence-parallel rank: which rows of that pack are this rank's.
        labeler: computes labels if the store has none.
        pool: reads hidden states in other processes; None reads them in the calling thread.
        pin: read hidden states into pinned memory, from which copies to a GPU are asynchronous.
    """

    def __init__(
        self, store: Store, samples: Sequence[TrainSample], settings: ShardingSettings, *, t2d: Tensor,
        dp_rank: int = 0, sp_rank: int = 0, labeler: Labeler | None = None, pool: ReadPool | None = None,
        pin: bool = False,
    ) -> None:
        self.store, self.samples, self.settings, self.t2d = store, samples, settings, t2d
        self.dp_rank, self.sp_rank = dp_rank, sp_rank
        self.labeler, self.pool, self.pin = labeler, pool, pin
        self.dtype = TORCH_DTYPES[store.info.dtype]

    def micro_batches(self, global_batches: Iterable[GlobalBatch]) -> Iterator[MicroBatch]:
        """Yield every micro-batch in order. Raises StoreError for a file that cannot be read."""
        for global_batch in global_batches:
            yield from self._load(global_batch)

    def _load(self, global_batch: GlobalBatch) -> Iterator[MicroBatch]:
        loaders = deque(_PackLoader(self, packs[self.dp_rank]) for packs in global_batch.packs)
        if not all(loader.has_labels for loader in loaders):
            for loader in loaders:
                loader.load_hidden_states()
        counted = torch.stack([loader.count() for loader in loaders]).sum(0)
        numbers = [n for packs in global_batch.packs for pack in packs for n in pack]
        tokens = sum(self.samples[n].document.num_tokens for n in numbers)
        for index, packs in enumerate(global_batch.packs):
            # popleft drops the loader, so its hidden states are freed once the consumer drops the batch.
            loader = loaders.popleft()
            batch = loader.finish()
            names = tuple(tuple(self.samples[n].entry.id for n in pack) for pack in packs)
            yield MicroBatch(global_batch, index, batch, counted, names, tokens, loader.stats, loader.read_s)


@dataclass(frozen=True)
class _DatasetRows:
    """The rows of one hidden-state dataset that this rank needs, numbered over the whole sequence."""

    name: str
    rows: rg.Ranges
    width: int


class _PackLoader:
    """Load one pack, in two stages.

    1. The constructor opens the samples, reads their token arrays and does all index arithmetic. Its batch
       has no hidden states yet, but rows can be counted in it if the store has labels.
    2. `load_hidden_states` reads this rank's rows, and computes the labels if the store has none. `finish`
       calls it if nobody has, closes the files and returns the batch.
    """

    def __init__(self, dataset: RankDataset, pack: Pack) -> None:
        started = time.perf_counter()
        self.dataset = dataset
        self.samples = [dataset.samples[number] for number in pack]
        # With a pool only token arrays are read here: its processes open the files and list the chunks.
        here = dataset.pool is None
        self.readers = [dataset.store.reader(s.entry, threads=1, hidden_states=here) for s in self.samples]
        self.sharding = dataset.settings.shard([sample.document for sample in self.samples])
        self.stats = ReadStats()
        self.loaded = False
        aux, target = self._needed_rows()
        documents = [_token_labels(s, reader) for s, reader in zip(self.samples, self.readers, strict=True)]
        # Tensors without columns stand in for the hidden states until stage 2.
        self.batch = assemble(
            self.sharding, dataset.sp_rank, documents,
            torch.empty(rg.count(aux.rows), 0), torch.empty(rg.count(target.rows), 0),
            alignment=dataset.settings.alignment, names=[s.entry.id for s in self.samples])
        self.read_s = time.perf_counter() - started

    @property
    def has_labels(self) -> bool:
        """Whether the argmax and log-sum-exp of every target row are known."""
        return self.batch.target_token is not None

    def count(self) -> Tensor:
        """Return the counted rows of this rank in this pack: int64 [T]. Needs labels."""
        batch = self.batch
        assert batch.target_token is not None
        return counted_rows(batch.trained, batch.target_token, batch.target_index, self.dataset.t2d).sum(0)

    def load_hidden_states(self) -> None:
        """Read the hidden states into the batch, and compute labels if the store has none."""
        started = time.perf_counter()
        read = self._read_here if self.dataset.pool is None else self._read_in_pool
        aux, hidden = read(self._needed_rows())
        self.batch = replace(self.batch, aux=aux, target_hidden=hidden)
        if not self.has_labels:
            if self.dataset.labeler is None:
                raise StoreError(
                    f"{self.readers[0].path} has no target_token_id and no target_logsumexp, and the "
                    "target's head is not loaded to compute them; give the target's weights (target.model)")
            token, logsumexp = self.dataset.labeler(hidden)
            self.batch = replace(self.batch, target_token=token, target_logsumexp=logsumexp)
        self.loaded = True
        self.read_s += time.perf_counter() - started

    def finish(self) -> Batch:
        """Return the complete batch and close the files."""
        if not self.loaded:
            self.load_hidden_states()
        for reader in self.readers:
            self.stats += reader.stats
            reader.close()
        return self.batch

    def _needed_rows(self) -> list[_DatasetRows]:
        rank, info = self.dataset.sp_rank, self.dataset.store.info
        aux_width = len(info.aux_layer_ids) * info.hidden_size
        return [
            _DatasetRows("aux_hidden_state", self.sharding.aux_rows(rank), aux_width),
            _DatasetRows("hidden_state", self.sharding.target_rows(rank), info.hidden_size),
        ]

    def _read_here(self, needed: list[_DatasetRows]) -> list[Tensor]:
        """Read each dataset's rows in this thread: one tensor [rows, width] each."""
        tensors = []
        for part in needed:
            shape = rg.count(part.rows), part.width
            out = torch.empty(shape, dtype=self.dataset.dtype, pin_memory=self.dataset.pin)
            done = 0
            for number, ranges in self.sharding.file_rows(part.rows):
                stop = done + rg.count(ranges)
                self.readers[number].read_rows(part.name, ranges, out[done:stop])
                done = stop
            tensors.append(out)
        return tensors

    def _read_in_pool(self, needed: list[_DatasetRows]) -> list[Tensor]:
        """Read the rows by the pool's processes, in one call. The tensors [rows, width] share one buffer."""
        assert self.dataset.pool is not None
        info, dtype = self.dataset.store.info, self.dataset.dtype
        requests = []
        for part in needed:
            for number, ranges in self.sharding.file_rows(part.rows):
                reader, shape = self.readers[number], (rg.count(ranges), part.width)
                requests.append(
                    RowRequest(reader.path, reader.entry, info, part.name, tuple(ranges), shape, dtype))
        size = sum(request.nbytes for request in requests)
        buffer = torch.empty(size, dtype=torch.uint8, pin_memory=self.dataset.pin)
        self.stats += self.dataset.pool.read(requests, buffer)
        sizes = [rg.count(part.rows) * part.width * dtype.itemsize for part in needed]
        views = zip(buffer.split(sizes), needed, strict=True)
        return [view.view(dtype).view(-1, part.width) for view, part in views]


def _token_labels(sample: TrainSample, reader: SampleReader) -> TokenLabels:
    """Read a sample's token arrays, truncated to the part that is trained on."""
    arrays = {name: reader.read_small(name) for name in SMALL_DTYPES}
    size = sample.document.num_tokens
    return TokenLabels(**{name: None if x is None else x[:size].numpy() for name, x in arrays.items()})


def _hash63(*values: object) -> int:
    """Hash ``values`` to 63 bits, so that the result fits a torch.int64."""
    return int.from_bytes(hashlib.sha256(repr(values).encode()).digest()[:8], "big") >> 1
