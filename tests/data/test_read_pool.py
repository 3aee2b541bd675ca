"""The read pool returns the same bytes as a reader, and a failed process is an error, not a wait."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from eagle_ds.data.read_pool import REQUEST_ROWS, ReadPool, RowRequest
from eagle_ds.store.format import CHUNK_ROWS, WIDE_NAMES
from eagle_ds.store.store import Store, StoreError
from tests.store_cases import make_info, make_sample, same_bits, write_store

INFO = make_info()
TOKENS = 2 * REQUEST_ROWS + CHUNK_ROWS + 11


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    samples = [make_sample("long", TOKENS, INFO, 0), make_sample("short", 70, INFO, 1)]
    return write_store(tmp_path_factory.mktemp("store"), INFO, *samples)


@pytest.fixture(scope="module")
def pool() -> Iterator[ReadPool]:
    made = ReadPool(2)
    yield made
    made.close()


def request(store: Store, number: int, name: str, *ranges: tuple[int, int]) -> RowRequest:
    entry, info = store.entries[number], store.info
    width = info.hidden_size * (len(info.aux_layer_ids) if name == WIDE_NAMES[0] else 1)
    rows = sum(stop - start for start, stop in ranges)
    return RowRequest(store.root / entry.path, entry, info, name, ranges, (rows, width), torch.bfloat16)


def read(pool: ReadPool, parts: list[RowRequest]) -> list[torch.Tensor]:
    out = torch.empty(sum(part.nbytes for part in parts), dtype=torch.uint8)
    stats = pool.read(parts, out)
    assert stats.bytes_used >= out.nbytes
    return [
        x.view(torch.bfloat16).view(part.shape)
        for x, part in zip(out.split([p.nbytes for p in parts]), parts, strict=True)
    ]


@pytest.mark.parametrize(
    "ranges",
    [
        [(0, TOKENS)],
        [(5, 6)],
        [(63, 65), (3, 70), (900, TOKENS - 1)],
        [(0, 0), (REQUEST_ROWS, REQUEST_ROWS + 1)],
    ],
    ids=str,
)
def test_the_pool_reads_what_a_reader_reads(
    store: Store, pool: ReadPool, ranges: list[tuple[int, int]]
) -> None:
    parts = [request(store, 0, name, *ranges) for name in WIDE_NAMES] + [
        request(store, 1, WIDE_NAMES[0], (1, 70))
    ]
    for part, found in zip(parts, read(pool, parts), strict=True):
        entry = next(entry for entry in store.entries if entry.id == part.entry.id)
        with store.reader(entry) as reader:
            assert same_bits(found, reader.read_rows(part.name, part.ranges))


def test_an_empty_request_reads_nothing(store: Store, pool: ReadPool) -> None:
    assert not pool.read([], torch.empty(0, dtype=torch.uint8)).bytes_read
    with pytest.raises(ValueError, match="reads nothing; use 1 or more"):
        ReadPool(0)


def test_a_damaged_file_raises_the_readers_error_and_the_next_read_works(
    store: Store, pool: ReadPool, tmp_path: Path
) -> None:
    damaged = write_store(tmp_path / "damaged", INFO, make_sample("s", 200, INFO))
    victim = damaged.root / damaged.entries[0].path
    victim.write_bytes(victim.read_bytes()[:-7])
    with pytest.raises(StoreError, match=f"{victim}.*the file was truncated or replaced"):
        read(pool, [request(damaged, 0, WIDE_NAMES[0], (0, 200))])
    assert read(pool, [request(store, 1, WIDE_NAMES[0], (0, 70))])


def test_a_killed_process_is_an_error_that_gives_its_exit_code(store: Store, pool: ReadPool) -> None:
    part = request(store, 0, WIDE_NAMES[0], (0, TOKENS))
    read(pool, [part])
    processes = [worker._process for worker in pool._workers]
    os.kill(processes[1].pid, signal.SIGKILL)
    with pytest.raises(StoreError, match=r"exit code -9.*data.read_processes"):
        read(pool, [part])
    assert all(process.returncode is not None for process in processes)  # all have ended
    assert read(pool, [part])


def test_processes_end_with_their_pool(store: Store) -> None:
    pool = ReadPool(1)
    read(pool, [request(store, 1, WIDE_NAMES[1], (0, 70))])
    process = pool._workers[0]._process
    pool._workers[0]._connection.close()  # as when the trainer is killed
    deadline = time.monotonic() + 20
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.poll() == 0
    pool.close()
