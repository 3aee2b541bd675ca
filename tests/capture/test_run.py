"""A capture can be estimated, stopped and continued, and refuses to mix two targets in one store."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from eagle_ds.capture import run as capturing
from eagle_ds.capture.hf import ForwardLimits
from eagle_ds.capture.job import CaptureJob, PendingSample, prepare_capture
from eagle_ds.capture.run import capture, make_batches, predict_seconds
from eagle_ds.data.vocab import count_trained_tokens
from eagle_ds.store.format import SMALL_DTYPES, WIDE_NAMES
from eagle_ds.store.store import Store, StoreWriter
from eagle_ds.store.verification import verify_file
from tests.tiny_targets import save_tiny_llama

LENGTHS = (3, 60, 17, 150, 33, 8)


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("target"))


def chat(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture
def job(target, tmp_path) -> CaptureJob:
    """Six conversations of different lengths, one without an answer."""
    lines = [
        {"id": f"chat/{n}", "messages": chat("q" * n, "answer " * (n % 7 + 1))} for n in LENGTHS
    ]
    lines.append({"id": "unanswered", "messages": [{"role": "user", "content": "hello?"}]})
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    how = {"dtype": "float32", "device": "cpu", "limits": ForwardLimits(300, 128)}
    return CaptureJob(str(target), path, tmp_path / "store", max_length=200, **how)


def contents(root: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Verify every file of a store; return all tensors by sample."""
    store, samples = Store(root), {}
    for entry in store.entries:
        assert verify_file(root / entry.path, entry, store.info) == []
        with store.reader(entry) as reader:
            small = {name: reader.read_small(name) for name in SMALL_DTYPES}
            wide = {name: reader.read_rows(name, [(0, entry.num_tokens)]) for name in WIDE_NAMES}
        samples[entry.id] = small | wide
    return samples


def assert_same(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    for name in left:
        for key in left[name]:
            torch.testing.assert_close(
                left[name][key].float(), right[name][key].float(), rtol=2e-2, atol=2e-2
            )


def test_the_store_holds_every_answered_conversation(job):
    told = []
    prepared = prepare_capture(job)
    assert capture(prepared, told.append) == len(LENGTHS)
    samples = contents(job.store)
    assert set(samples) == {f"chat/{n}" for n in LENGTHS} and prepared.stats.without_answer == 1
    assert sum(told) == prepared.tokens == sum(len(sample["input_ids"]) for sample in samples.values())
    assert Store(job.store).info.aux_layer_ids == (1, 3, 4)
    assert int(count_trained_tokens(Store(job.store), 280).sum()) == prepared.stats.trained_tokens


def test_preparing_and_estimating_write_nothing(job):
    prepared = prepare_capture(job)
    assert not job.store.exists()
    estimate = prepared.estimate()
    assert estimate.raw_bytes == prepared.tokens * 4 * 32 * 2
    assert 0 < estimate.store_bytes <= estimate.raw_bytes
    assert predict_seconds(prepared) > 0 and not job.store.exists()


def test_a_second_run_has_nothing_to_do(job, monkeypatch):
    capture(prepare_capture(job))
    before = (job.store / "manifest.jsonl").read_bytes()
    monkeypatch.setattr(capturing, "load_model", lambda *_: pytest.fail("loaded the target for nothing"))
    again = prepare_capture(job)
    assert (capture(again), again.num_stored, again.pending) == (0, len(LENGTHS), [])
    assert (job.store / "manifest.jsonl").read_bytes() == before


KILLS = {
    "inside a file": ("eagle_ds.store.format.write_header", 2),
    "before the rename": ("eagle_ds.store.writer._rename", 3),
    "before the manifest line": ("eagle_ds.store.writer.StoreWriter._append", 2),
}


@pytest.mark.parametrize("where", KILLS)
def test_a_killed_capture_continues_and_gives_the_store_of_an_uninterrupted_one(job, monkeypatch, where):
    capture(prepare_capture(dataclasses.replace(job, store=job.store.with_name("uninterrupted"))))
    kill_at(job, monkeypatch, *KILLS[where])
    prepared = prepare_capture(job)
    assert 0 < len(prepared.pending) < len(LENGTHS)
    capture(prepared)
    assert_same(contents(job.store), contents(job.store.with_name("uninterrupted")))
    assert list((job.store / "writing").iterdir()) == []


def kill_at(job: CaptureJob, monkeypatch, name: str, call: int) -> None:
    """Run the capture in a child that dies by SIGKILL in the given call of a function."""
    calls = []

    def deadly(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        module, _, attribute = name.rpartition(".")
        owner = StoreWriter if module.endswith("StoreWriter") else __import__(module, fromlist=["x"])
        original = getattr(owner, attribute)
        patch.setattr(owner, attribute, deadly)
        child = os.fork()
        if child == 0:
            capture(prepare_capture(job))
            os._exit(0)
        _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)


def test_a_store_of_another_target_or_other_layers_is_refused(job, tmp_path):
    capture(prepare_capture(job))
    other = save_tiny_llama(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="target_hash is"):
        prepare_capture(dataclasses.replace(job, target=str(other)))
    with pytest.raises(ValueError, match=r"aux_layer_ids is \(1, 3, 4\) there, \(0, 1, 2\) here"):
        prepare_capture(dataclasses.replace(job, aux_layer_ids=(0, 1, 2)))


def test_another_text_under_a_stored_id_is_refused(job):
    capture(prepare_capture(job))
    job.conversations.write_text(
        job.conversations.read_text().replace("answer answer", "one or two answers", 1)
    )
    with pytest.raises(ValueError, match="holds sample chat/3 with"):
        prepare_capture(job)


def test_a_full_disk_gives_one_sentence_and_keeps_what_is_stored(job):
    prepared = prepare_capture(job)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # the longest sample's file is larger
    try:
        with pytest.raises(ValueError, match=r"the disk of .* is full"):
            capture(prepared)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert set(contents(job.store)) < {f"chat/{n}" for n in LENGTHS}
    capture(prepare_capture(job))
    assert len(contents(job.store)) == len(LENGTHS)


def test_too_little_space_is_reported_before_any_work(job, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match=r"0\.0 GB free but the capture needs about"):
        capture(prepare_capture(job))
    assert not job.store.exists()


def test_conversations_that_are_all_skipped_are_an_error(job):
    job.conversations.write_text('{"messages": [{"role": "user", "content": "hello?"}]}\n')
    with pytest.raises(
        ValueError, match=r"nothing to train on: 0 samples.*1 skipped without an answer"
    ):
        prepare_capture(job)


@pytest.mark.parametrize("target", ["models/absent", "/nonexistent", "not a name"])
def test_a_missing_target_is_reported_first(job, target):
    with pytest.raises(ValueError, match="is not a folder here"):
        prepare_capture(dataclasses.replace(job, target=target))


def test_batches_fit_their_limits_and_keep_the_order():
    samples = [PendingSample(0, str(n), n, ()) for n in (500, 260, 120, 110, 60, 40, 39, 10)]
    limits = ForwardLimits(batch_tokens=256, chunk_tokens=128)
    made = list(make_batches(samples, limits))
    assert [sample for batch in made for sample in batch] == samples
    assert [[s.num_tokens for s in batch] for batch in made] == [[500], [260], [120, 110], [60, 40, 39, 10]]


def test_a_bad_line_is_listed_in_the_store_and_does_not_stop_the_rest(job):
    with job.conversations.open("a") as file:
        file.write('{broken\n{"id": "chat/3", "text": "another"}\n')
    prepared = prepare_capture(job)
    assert not job.store.exists() and prepared.intake.reasons == {"not JSON": 1, "id used above": 1}
    assert capture(prepared) == len(LENGTHS)
    listed = [json.loads(line) for line in (job.store / "rejected.jsonl").read_text().splitlines()]
    assert [one["line"] for one in listed] == [8, 9]
    with pytest.raises(ValueError, match="line 8: not valid JSON"):
        prepare_capture(dataclasses.replace(job, strict=True))
    suffixed = prepare_capture(dataclasses.replace(job, duplicates="suffix"))
    assert [sample.id for sample in suffixed.pending] == ["chat/3-2"]
    capture(suffixed)
    assert set(contents(job.store)) == {f"chat/{n}" for n in LENGTHS} | {"chat/3-2"}


def test_a_store_of_other_template_variables_is_refused(job):
    capture(prepare_capture(job))
    assert Store(job.store).info.template_kwargs == {}
    with pytest.raises(ValueError, match=r"template_kwargs is \{\} there, \{'enable_thinking': False\} here"):
        prepare_capture(dataclasses.replace(job, template_kwargs={"enable_thinking": False}))


def test_template_variables_reach_the_captured_tokens_and_the_store(job, target, tmp_path):
    other = shutil.copytree(target, tmp_path / "other")
    template = other / "chat_template.jinja"
    template.write_text(template.read_text() + "{% if loud is defined %}LOUD{% endif %}")
    sizes = []
    for name, variables in (("plain", {}), ("loud", {"loud": True})):
        one = dataclasses.replace(
            job, target=str(other), store=tmp_path / name, template_kwargs=variables, max_length=1000)
        capture(prepare_capture(one))
        assert Store(one.store).info.template_kwargs == variables
        sizes.append({name: len(sample["input_ids"]) for name, sample in contents(one.store).items()})
    assert {name: size - sizes[0][name] for name, size in sizes[1].items()} == dict.fromkeys(sizes[0], 4)
