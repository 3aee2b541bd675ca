"""Flipped bits, truncated files, killed writers, full disks: a read is right or an error names the file."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from eagle_ds.store.manifest import MANIFEST_NAME, STORE_JSON
from eagle_ds.store.store import SampleReader, Store, StoreError, StoreWriter
from eagle_ds.store.verification import verify_file
from tests.store_cases import assert_stored, make_info, make_sample, write_store

INFO = make_info()
TOKENS = 80  # two chunks of rows, the second one padded
SAMPLE = make_sample("s", TOKENS, INFO)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return write_store(tmp_path / "store", INFO, SAMPLE)


def flipped(content: bytes, bit: int) -> bytes:
    """Return ``content`` with one bit flipped."""
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def is_detected(reader: SampleReader) -> bool:
    """True if reading raises a StoreError that names the file, False if everything reads right."""
    try:
        assert_stored(reader, SAMPLE)
    except StoreError as error:
        assert str(reader.path) in str(error)
        return True
    return False


def test_every_flipped_bit_is_detected_or_harmless(store: Store) -> None:
    path = store.root / store.entries[0].path
    content = path.read_bytes()
    detected = 0
    bits = random.Random(0).sample(range(8 * len(content)), 600)
    for bit in bits:
        path.write_bytes(flipped(content, bit))
        detected += is_detected(SampleReader(path, store.entries[0], store.info, threads=1))
    assert detected > len(bits) / 2  # the other bits are in space that HDF5 does not use


def test_changes_that_adler32_misses_are_detected_by_the_crc32(store: Store) -> None:
    """+1, -2, +1 on neighbouring bytes leaves both sums of adler32 unchanged."""
    path = store.root / store.entries[0].path
    with store.reader(store.entries[0]) as reader:
        index = reader._open().wide["hidden_state"]
    content = bytearray(path.read_bytes())
    at = next(
        i
        for i in itertools.count(int(index.offsets[0, 0]) + 20)
        if content[i] < 255 and content[i + 1] > 1 and content[i + 2] < 255
    )
    for position, change in enumerate((1, -2, 1)):
        content[at + position] += change
    path.write_bytes(content)
    with pytest.raises(StoreError, match="hidden_state rows 0:64, layer 0: its crc32 is not the one"):
        store.reader(store.entries[0]).read_rows("hidden_state", [(0, 1)])


@pytest.mark.parametrize("knows_size", [True, False])
def test_every_truncated_file_is_detected(store: Store, knows_size: bool) -> None:
    path = store.root / store.entries[0].path
    content = path.read_bytes()
    for size in random.Random(1).sample(range(len(content)), 60):
        path.write_bytes(content[:size])
        assert is_detected(
            SampleReader(path, store.entries[0] if knows_size else None, store.info, threads=1)
        ), f"cut to {size} bytes"


@pytest.mark.parametrize("name", [STORE_JSON, MANIFEST_NAME])
def test_every_flipped_bit_of_the_manifest_or_store_json_is_detected_or_harmless(
    store: Store, name: str
) -> None:
    path = store.root / name
    content = path.read_bytes()
    for bit in random.Random(4).sample(range(8 * len(content)), 600):
        path.write_bytes(flipped(content, bit))
        try:
            damaged = Store(store.root)
        except StoreError as error:
            assert str(path) in str(error)
            continue
        if not damaged.entries:
            assert (
                flipped(content, bit)[-1:] != b"\n"
            )  # the only line looks incomplete, so the store seems empty
            continue
        assert damaged.entries == store.entries
        assert damaged.info == store.info


def test_swapped_chunks_are_detected_although_each_is_intact(store: Store) -> None:
    """Two intact streams that changed places pass zlib's own checks."""
    path = store.root / store.entries[0].path
    with store.reader(store.entries[0]) as reader:
        index = reader._open().wide["aux_hidden_state"]
    first, second = (
        slice(int(index.offsets[0, n]), int(index.offsets[0, n] + index.sizes[0, n])) for n in (0, 1)
    )
    content = bytearray(path.read_bytes())
    if first.stop - first.start != second.stop - second.start:
        pytest.skip("the streams differ in length")
    content[first], content[second] = content[second], content[first]
    path.write_bytes(content)
    assert is_detected(store.reader(store.entries[0]))


@contextmanager
def disk_of(num_bytes: int) -> Iterator[None]:
    """Let no file grow beyond ``num_bytes``, as if the disk were full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_an_error_and_the_store_and_its_writer_stay_usable(tmp_path: Path) -> None:
    rng = random.Random(2)
    with StoreWriter(tmp_path, INFO) as writer:
        size = writer.add(SAMPLE).bytes
        for attempt in range(25):
            with (
                disk_of(rng.randrange(size)),
                pytest.raises(OSError, match=r"File too large: '.*writing.*h5'"),
            ):
                writer.add(make_sample(f"lost-{attempt}", TOKENS, INFO))
            assert not list((tmp_path / "writing").iterdir())
        writer.add(make_sample("lost-0", TOKENS, INFO))
    store = Store(tmp_path)
    assert [entry.id for entry in store.entries] == ["s", "lost-0"]
    assert [verify_file(tmp_path / entry.path, entry, store.info) for entry in store.entries] == [[], []]


def test_a_manifest_line_that_does_not_fit_on_the_disk_is_removed(tmp_path: Path) -> None:
    long_ids = [f"{n:04d}" * 600 for n in range(12)]
    with StoreWriter(tmp_path, INFO) as writer:
        for name in long_ids[:10]:
            writer.add(make_sample(name, 3, INFO))
        full = (tmp_path / MANIFEST_NAME).stat().st_size
        with disk_of(full + 100), pytest.raises(OSError, match="disk took only a part of a line"):
            writer.add(make_sample(long_ids[10], 3, INFO))
        assert (tmp_path / MANIFEST_NAME).stat().st_size == full
        writer.add(make_sample(long_ids[11], 3, INFO))
    assert [entry.id for entry in Store(tmp_path).entries] == [*long_ids[:10], long_ids[11]]


def in_child(action: Callable[[], None], context: str = "fork") -> int:
    """Run ``action`` in another process and return its exit code."""
    child = multiprocessing.get_context(context).Process(target=action)
    child.start()
    child.join(60)
    assert child.exitcode is not None
    return child.exitcode


def write_many(root: Path) -> None:
    """Add samples until this process is killed."""
    with StoreWriter(root, INFO) as writer:
        for number in itertools.count(len(writer.done_ids)):
            writer.add(make_sample(f"s{number}", TOKENS, INFO, seed=number))


def kill_at_call(number: int) -> None:
    """Kill this process instead of its ``number``-th system call from now that changes the disk."""
    left = itertools.count(number, -1)

    def deadly(call: Callable) -> Callable:
        def instead(*args: object, **options: object) -> object:
            if next(left) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **options)

        return instead

    for name in ("pwrite", "fsync", "rename", "replace", "ftruncate", "mkdir", "unlink", "open"):
        setattr(os, name, deadly(getattr(os, name)))


def assert_intact(root: Path) -> int:
    """Check that every sample in the manifest reads right; return their number."""
    store = Store(root)
    for number, entry in enumerate(store.entries):
        assert entry.id == f"s{number}"
        assert_stored(store.reader(entry), make_sample(entry.id, TOKENS, INFO, seed=number))
    return len(store.entries)


def test_a_writer_killed_at_any_call_leaves_an_intact_store_that_the_next_writer_continues(
    tmp_path: Path,
) -> None:
    write_store(tmp_path, INFO)
    written = 0
    # A sample takes 58 calls. The delicate ones (fsync, rename, manifest line) begin at the 40th.
    for number in (*range(0, 40, 8), *range(40, 70)):
        assert in_child(lambda number=number: (kill_at_call(number), write_many(tmp_path))) == -signal.SIGKILL
        assert assert_intact(tmp_path) >= written
        written = assert_intact(tmp_path)
    with StoreWriter(tmp_path, INFO) as writer:
        assert len(writer.done_ids) == written
        assert not list((tmp_path / "writing").iterdir())
    assert written >= 1


def test_a_writer_killed_at_random_moments_leaves_an_intact_store(tmp_path: Path) -> None:
    write_store(tmp_path, INFO)
    rng = random.Random(3)
    for _ in range(8):
        child = multiprocessing.get_context("fork").Process(target=write_many, args=(tmp_path,))
        child.start()
        time.sleep(rng.uniform(0.01, 0.2))
        child.kill()
        child.join()
        assert_intact(tmp_path)
    assert_intact(tmp_path)


def read_all(reader: SampleReader) -> None:
    assert_stored(reader, SAMPLE)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_an_open_reader_works_in_a_forked_or_spawned_process(store: Store, context: str) -> None:
    reader = store.reader(store.entries[0])
    reader.read_rows("hidden_state", [(0, 70)])
    children = [
        multiprocessing.get_context(context).Process(target=read_all, args=(reader,))
        for _ in range(2 if context == "fork" else 1)
    ]
    for child in children:
        child.start()
    assert_stored(reader, SAMPLE)
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * len(children)


def test_a_store_can_be_read_while_it_grows(tmp_path: Path) -> None:
    write_store(tmp_path, INFO)

    def grow() -> None:
        with StoreWriter(tmp_path, INFO) as writer:
            for number in range(12):
                writer.add(make_sample(f"s{number}", TOKENS, INFO, seed=number))

    thread = threading.Thread(target=grow)
    thread.start()
    seen = [0]
    while thread.is_alive():
        seen.append(assert_intact(tmp_path))
    thread.join()
    assert seen == sorted(seen)
    assert assert_intact(tmp_path) == 12


def test_an_open_reader_keeps_its_file_when_the_sample_is_written_again(store: Store) -> None:
    entry = store.entries[0]
    reader = store.reader(entry)
    reader.read_small("input_ids")
    (store.root / entry.path).unlink()
    write_store(store.root, INFO, make_sample("s", TOKENS, INFO, seed=5))
    assert_stored(reader, SAMPLE)
