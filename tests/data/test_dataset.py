"""A rank reads what whole-array slicing gives, and a failed read names the file and reaches the consumer."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from eagle_ds.data.batch import TokenLabels, counted_rows
from eagle_ds.data.dataset import MicroBatch, RankDataset
from eagle_ds.data.packing import ShardingSettings, screen
from eagle_ds.data.prefetch import DeviceCopy, Prefetcher
from eagle_ds.data.read_pool import ReadPool
from eagle_ds.data.sampler import GlobalBatch, Sampler
from eagle_ds.sharding import ranges as rg
from eagle_ds.sharding.sequence import shard_sequence
from eagle_ds.store.store import Store, StoreError
from eagle_ds.target.head import argmax_and_logsumexp
from tests.micro_batch import WholeSequence, rank_batch
from tests.store_cases import inflated_per_used
from tests.training.tiny_run import V, make_tiny, target_head, write_store

T = 3
T2D = torch.arange(V) % 2 == 0


@pytest.fixture(scope="module")
def pool() -> Iterator[ReadPool]:
    made = ReadPool(2)
    yield made
    made.close()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny")).root


def dataset(
    store: Store, ulysses: int = 1, ring: int = 1, max_length: int = 64, **options: object
) -> RankDataset:
    samples, _ = screen(
        store.entries, max_length=max_length, overlong="truncate", ttt_steps=T, alignment="serving"
    )
    return RankDataset(store, samples, ShardingSettings(ulysses, ring, "gather", T), t2d=T2D, **options)


def whole_sequence(store: Store, data: RankDataset, pack: tuple[int, ...]) -> WholeSequence:
    """Read all arrays of a pack whole, without sharding."""
    info, aux, hidden = [], [], []
    for sample in (data.samples[n] for n in pack):
        size = sample.document.num_tokens
        with store.reader(sample.entry) as reader:
            small = {
                n: reader.read_small(n)[:size].numpy()
                for n in ("input_ids", "loss_mask", "target_token_id", "target_logsumexp")
            }
            info.append(TokenLabels(**small))
            aux.append(reader.read_rows("aux_hidden_state", [(0, size)]))
            hidden.append(reader.read_rows("hidden_state", [(0, size)]))
    return WholeSequence(info, torch.cat(aux), torch.cat(hidden))


@pytest.mark.parametrize(("ulysses", "ring"), [(1, 1), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("max_length", [64, 20])
@pytest.mark.parametrize("in_processes", [False, True])
def test_each_rank_reads_the_rows_that_the_sharding_gives_it(
    root: Path, pool: ReadPool, ulysses: int, ring: int, max_length: int, in_processes: bool
) -> None:
    store, readers = Store(root / "train"), pool if in_processes else None
    packs = ((0, 4, 2), (3,), (5, 1))
    for rank in range(ulysses * ring):
        data = dataset(store, ulysses, ring, max_length, sp_rank=rank, pool=readers)
        steps = [GlobalBatch(i, 0, ((pack,),)) for i, pack in enumerate(packs)]
        for pack, item in zip(packs, data.micro_batches(steps), strict=True):
            sharding = shard_sequence(
                [data.samples[n].document for n in pack], ulysses=ulysses, ring=ring, ttt_steps=T
            )
            expected = rank_batch(sharding, rank, whole_sequence(store, data, pack), "serving")
            for name, value in vars(expected).items():
                if isinstance(value, torch.Tensor):
                    assert torch.equal(getattr(item.batch, name), value), name
            assert item.batch.sharding.digest == sharding.digest
            assert item.batch.names == tuple(data.samples[n].entry.id for n in pack)


@pytest.mark.parametrize(("ulysses", "ring"), [(1, 1), (2, 2)])
def test_counted_rows_are_known_at_the_first_micro_batch(root: Path, ulysses: int, ring: int) -> None:
    step = GlobalBatch(0, 0, (((0, 1), (2,)), ((3,), (4, 5))))  # two micro-batches, dp 2
    total = torch.zeros(T, dtype=torch.int64)
    expected = torch.zeros(T, dtype=torch.int64)
    for dp_rank in range(2):
        for rank in range(ulysses * ring):
            data = dataset(Store(root / "train"), ulysses, ring, dp_rank=dp_rank, sp_rank=rank)
            items = list(data.micro_batches([step]))
            assert [(item.index, item.is_last) for item in items] == [(0, False), (1, True)]
            assert torch.equal(items[0].counted, items[1].counted)
            total += items[0].counted
            for item in items:
                batch = item.batch
                expected += counted_rows(batch.trained, batch.target_token, batch.target_index, T2D).sum(0)
            assert items[0].global_tokens == sum(data.samples[n].document.num_tokens for n in range(6))
            assert items[1].global_names == (("sample-3",), ("sample-4", "sample-5"))
    assert torch.equal(total, expected) and total[0] > 0


def test_labels_that_a_store_lacks_are_computed_with_the_head(root: Path, tmp_path: Path) -> None:
    write_store(tmp_path / "bare", root / "target", ("0001111111", "0111110"), seed=3, labels=False)
    write_store(tmp_path / "full", root / "target", ("0001111111", "0111110"), seed=3)
    head = target_head(root / "target")
    steps = [GlobalBatch(0, 0, (((0,),), ((1,),)))]
    bare = list(
        dataset(
            Store(tmp_path / "bare"), labeler=lambda hidden: argmax_and_logsumexp(hidden, head)
        ).micro_batches(steps)
    )
    full = list(dataset(Store(tmp_path / "full")).micro_batches(steps))
    for made, stored in zip(bare, full, strict=True):
        assert torch.equal(made.batch.target_token, stored.batch.target_token)
        assert torch.allclose(made.batch.target_logsumexp, stored.batch.target_logsumexp)
        assert torch.equal(made.counted, stored.counted)
    with pytest.raises(StoreError, match="no target_token_id and no target_logsumexp"):
        list(dataset(Store(tmp_path / "bare")).micro_batches(steps))


def test_each_needed_chunk_is_read_once_and_counted(root: Path, tmp_path: Path) -> None:
    mask = "0" * 1900 + "1" * 148
    write_store(tmp_path / "long", root / "target", (mask,), seed=4)
    store = Store(tmp_path / "long")
    shares = [
        next(dataset(store, 1, 4, 4096, sp_rank=rank).micro_batches([GlobalBatch(0, 0, (((0,),),))])).stats
        for rank in range(4)
    ]
    bytes_per_row = 4 * 24 * 4
    inflated = sum(share.bytes_inflated for share in shares)
    assert inflated < 1.2 * 2048 * bytes_per_row  # the whole file would be 4 times that
    assert all(inflated_per_used(share) < 1.6 for share in shares)


def test_fingerprints_differ_for_other_samples_and_other_shardings(root: Path) -> None:
    store = Store(root / "train")

    def first(pack: tuple[int, ...], **layout: int) -> tuple[int, int]:
        return next(dataset(store, **layout).micro_batches([GlobalBatch(0, 0, ((pack,),))])).fingerprints()

    assert first((0, 1)) == first((0, 1))
    assert first((0, 1))[0] != first((1, 0))[0]
    assert first((0, 1))[0] == first((0, 1), ring=2)[0] and first((0, 1))[1] != first((0, 1), ring=2)[1]


def test_a_damaged_file_is_an_error_at_the_place_of_its_batch(
    root: Path, tmp_path: Path
) -> None:
    write_store(tmp_path / "store", root / "target", ("0001111111", "0111110"), seed=3)
    store = Store(tmp_path / "store")
    victim = store.root / store.entries[1].path
    victim.write_bytes(victim.read_bytes()[:-7])
    batches = Prefetcher(
        dataset(store).micro_batches([GlobalBatch(0, 0, (((0,),),)), GlobalBatch(1, 0, (((1,),),))]),
        2,
        "read",
    )
    assert next(batches).batch.names == ("sample-0",)
    with pytest.raises(StoreError, match=str(victim)):
        next(batches)
    batches.close()


def test_prefetching_gives_the_same_batches(root: Path) -> None:
    data = dataset(Store(root / "train"))
    steps = list(Sampler(data.samples, dp=1, accumulation=2, pack_tokens=50, seed=1).global_batches(0, 4))

    def numbers(items: Iterator[MicroBatch]) -> list[tuple[int, int, float]]:
        return [
            (item.global_batch.number, item.index, float(item.batch.aux.double().sum())) for item in items
        ]

    plain = numbers(data.micro_batches(steps))
    for depth in (1, 3):
        inner = Prefetcher(data.micro_batches(steps), depth, "read")
        outer = Prefetcher(DeviceCopy(inner, torch.device("cpu"), torch.float32), 1, "copy")
        assert numbers(iter(outer)) == plain
        outer.close()


def test_resuming_in_an_epoch_with_other_readers_and_depth_gives_the_same_batches(
    root: Path, pool: ReadPool
) -> None:
    store = Store(root / "train")

    def batches(
        start: int, readers: ReadPool | None, depth: int
    ) -> list[tuple[int, int, tuple[str, ...], torch.Tensor]]:
        data = dataset(store, 2, 1, sp_rank=1, pool=readers)
        sampler = Sampler(data.samples, dp=1, accumulation=1, pack_tokens=50, seed=1)
        assert sampler.steps_in(0) > 3  # step 3 is in the middle of an epoch
        reading = Prefetcher(data.micro_batches(sampler.global_batches(start, 6)), depth, "read")
        return [(item.global_batch.number, item.index, item.batch.names, item.batch.aux) for item in reading]

    whole = batches(0, None, depth=1)
    for readers, depth in ((None, 3), (pool, 2)):
        for ours, theirs in zip(batches(3, readers, depth), whole[3:], strict=True):
            assert ours[:3] == theirs[:3] and torch.equal(ours[3], theirs[3])


@pytest.mark.parametrize("end", [SystemExit, KeyboardInterrupt, MemoryError])
def test_the_consumer_gets_the_error_of_a_dead_reading_thread(end: type[BaseException]) -> None:
    def items() -> Iterator[int]:
        yield 0
        raise end

    outer = Prefetcher(Prefetcher(items(), 2, "inner"), 1, "outer")
    assert next(outer) == 0
    with pytest.raises(end):
        next(outer)
    outer.close()


def counted_into(made: list[int], count: int) -> Iterator[int]:
    for number in range(count):
        made.append(number)
        yield number


def settled(made: list[int], count: int) -> list[int]:
    """Wait until ``count`` items are made and more had time to follow; return ``made``."""
    deadline = time.monotonic() + 5
    while len(made) < count and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    return made


def test_the_prefetcher_runs_ahead_by_its_depth_only() -> None:
    made: list[int] = []
    prefetcher = Prefetcher(counted_into(made, 10), 2, "count")
    assert settled(made, 2) == [0, 1]
    assert next(prefetcher) == 0
    assert settled(made, 3) == [0, 1, 2]
    assert list(prefetcher) == list(range(1, 10))


def test_no_item_is_started_between_take_and_advance() -> None:
    made: list[int] = []
    prefetcher = Prefetcher(counted_into(made, 4), 1, "count")
    assert prefetcher.take() == 0 and settled(made, 1) == [0]
    prefetcher.advance()
    assert settled(made, 2) == [0, 1]
    prefetcher.advance()
    assert settled(made, 2) == [0, 1]  # the slot was given back already
    assert prefetcher.take() == 1 and settled(made, 2) == [0, 1]
    assert prefetcher.take() == 2 and settled(made, 3) == [0, 1, 2]  # take advances if nobody did
    assert list(prefetcher) == [3]


def test_closing_ends_threads_and_generators() -> None:
    ended = threading.Event()

    def items() -> Iterator[int]:
        try:
            yield from range(1000)
        finally:
            ended.set()

    outer = Prefetcher(DeviceCopyLike(Prefetcher(items(), 2, "inner")), 1, "outer")
    assert next(outer) == 0
    outer.close()
    assert ended.wait(5)
    assert not [t for t in threading.enumerate() if t.name in ("inner", "outer")]


class DeviceCopyLike:
    """Forward items and `close`, as DeviceCopy does."""

    def __init__(self, items: Prefetcher[int]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[int]:
        return iter(self.items)

    def close(self) -> None:
        self.items.close()


def test_rows_of_all_ranks_are_the_trained_rows(root: Path) -> None:
    store = Store(root / "train")
    pack = (0, 1, 2, 3)
    owned = []
    for rank in range(4):
        data = dataset(store, 2, 2, sp_rank=rank)
        item = next(data.micro_batches([GlobalBatch(0, 0, ((pack,),))]))
        owned.append(rg.rows(item.batch.sharding.queries[rank]))
    rows = np.concatenate(owned)
    assert len(set(rows.tolist())) == len(rows) == sum(data.samples[n].query_rows for n in pack)
