"""A capture on several devices deals the samples out evenly and ends when a process fails."""

from __future__ import annotations

import queue
from types import SimpleNamespace

import pytest

from eagle_ds.capture import parallel
from eagle_ds.capture.run import CaptureEstimate, CaptureJob, Planned
from eagle_ds.store.store import SampleEntry


def test_every_sample_goes_to_one_device_and_the_long_ones_to_all(tmp_path):
    todo = [Planned(0, str(n), n, ()) for n in range(100, 0, -1)]
    plan = CaptureEstimate(CaptureJob("t", tmp_path, tmp_path, 128), tmp_path, None, None, None, None, todo, 0)
    shares = parallel.shares_of(plan, ["cuda:0", "cuda:1", "cuda:2"])
    assert [share.job.device for share in shares] == ["cuda:0", "cuda:1", "cuda:2"]
    assert sorted(sample.num_tokens for share in shares for sample in share.todo) == list(range(1, 101))
    assert max(share.tokens for share in shares) - min(share.tokens for share in shares) <= 100


def results(*items) -> queue.Queue:
    filled = queue.Queue()
    for item in items:
        filled.put(item)
    return filled


def test_what_a_process_raised_is_raised_here():
    entry = SampleEntry("a", "a.h5", 1, 1, ((0, 1),), 10)
    waiting = results(entry, ValueError("no such device"))
    assert parallel.next_result(waiting, []) == entry
    with pytest.raises(ValueError, match="no such device"):
        parallel.next_result(waiting, [])


def test_a_process_that_died_without_a_word_is_noticed(monkeypatch):
    monkeypatch.setattr(parallel, "POLL_S", 0.01)
    with pytest.raises(ChildProcessError, match="died with exit code -9"):
        parallel.next_result(results(), [SimpleNamespace(exitcode=0), SimpleNamespace(exitcode=-9)])
