"""A capture on several devices gives every sample to exactly one of them, in shares of similar size."""

from __future__ import annotations

from eagle_ds.capture.devices import split_samples
from eagle_ds.capture.job import CaptureJob, PendingSample, PreparedCapture


def test_each_sample_goes_to_one_device_and_long_samples_are_spread_over_all(tmp_path):
    pending = [PendingSample(0, str(n), n, ()) for n in range(100, 0, -1)]
    job = CaptureJob("t", tmp_path, tmp_path, 128)
    prepared = PreparedCapture(job, tmp_path, None, None, None, None, pending, 0)
    shares = split_samples(prepared, ["cuda:0", "cuda:1", "cuda:2"])
    assert [share.job.device for share in shares] == ["cuda:0", "cuda:1", "cuda:2"]
    assert sorted(sample.num_tokens for share in shares for sample in share.pending) == list(range(1, 101))
    assert max(share.tokens for share in shares) - min(share.tokens for share in shares) <= 100
