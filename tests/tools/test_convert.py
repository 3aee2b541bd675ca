"""A conversion keeps every sample bit for bit, survives bad files and a kill, and reports what it did."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from eagle_ds.convert import Completer, Reason, iter_source, masks
from eagle_ds.convert import run as conversion
from eagle_ds.convert.options import ConvertOptions
from eagle_ds.convert.worker import Job, Outcome, Worker, run_jobs
from eagle_ds.data.chat import ChatEncoder, load_tokenizer
from eagle_ds.data.conversations import Intake
from eagle_ds.store.store import Store, StoreInfo, StoreWriter
from eagle_ds.store.writer import SampleFiles
from tests.peer_files import (
    AUX_IDS,
    FLAGS,
    GROUPED_MAP,
    HIDDEN,
    VOCAB,
    Features,
    features,
    specforge_dict,
    write_conversations,
    write_grouped_hdf5,
    write_modelopt,
    write_specforge,
    write_speculators,
)
from tests.tiny_targets import save_tiny_llama

TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert_ckpt_to_hdf5.py"


NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so nothing is refused")


@pytest.fixture(scope="session")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("convert_ckpt_to_hdf5", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tool: ModuleType, monkeypatch: pytest.MonkeyPatch):
    """Run the tool in this process, on one worker unless told otherwise; the exit code."""

    def call(*arguments: str | Path) -> int:
        workers = [] if "--workers" in arguments else ["--workers", "1"]
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments), *workers])
        return tool.main()

    return call


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("target"), torch_dtype="bfloat16")


def stored(root: Path, name: str) -> Features:
    store = Store(root)
    (entry,) = [entry for entry in store.entries if entry.id == name]
    with store.reader(entry) as reader:
        whole = [(0, entry.num_tokens)]
        small = [reader.read_small(field).long() for field in ("input_ids", "loss_mask")]
        return Features(
            *small, reader.read_rows("aux_hidden_state", whole), reader.read_rows("hidden_state", whole)
        )


def assert_same(found: Features, made: Features) -> None:
    for field in ("input_ids", "loss_mask", "aux", "last"):
        assert torch.equal(getattr(found, field), getattr(made, field)), field


def rejects(root: Path) -> dict[str, str]:
    """File name -> reason, as in rejected.jsonl."""
    lines = [json.loads(line) for line in (root / "rejected.jsonl").read_text().splitlines()]
    assert all(line["detail"] for line in lines)
    return {Path(line["path"]).name: line["reason"] for line in lines}


# -- what is stored ------------------------------------------------------------------------------------------


def test_a_tree_of_plain_and_gzipped_files_arrives_bit_for_bit(
    tmp_path: Path, run, capsys: pytest.CaptureFixture[str]
) -> None:
    made = {number: features(70 + 13 * number, seed=number) for number in range(8)}
    for number, sample in made.items():
        write_specforge(tmp_path / "src", number, sample, gzipped=number % 2 == 1)
    assert run(tmp_path / "src", tmp_path / "dst", *FLAGS, "--workers", "2") == 0
    for number, sample in made.items():
        assert_same(stored(tmp_path / "dst", f"rows_0-5000/data_{number}"), sample)
    info = Store(tmp_path / "dst").info
    assert (
        info.target, info.aux_layer_ids, info.hidden_size, info.vocab_size
    ) == ("tiny", AUX_IDS, HIDDEN, VOCAB)
    assert (tmp_path / "dst" / "rejected.jsonl").read_text() == ""
    printed = capsys.readouterr().out
    assert "converted now" in printed and "saved against raw" in printed and "MB/s" in printed


def test_model_optimizer_and_mapped_hdf5_files_arrive_bit_for_bit(tmp_path: Path, run) -> None:
    made = [features(40, seed=1), features(41, seed=2)]
    (tmp_path / "src").mkdir()
    write_modelopt(tmp_path / "src", "conv-1", made[0])
    assert run(tmp_path / "src", tmp_path / "a", *FLAGS) == 0
    assert_same(stored(tmp_path / "a", "conv-1"), made[0])
    write_grouped_hdf5(tmp_path / "dump.h5", made)
    assert run(tmp_path / "dump.h5", tmp_path / "b", *FLAGS, "--map", GROUPED_MAP) == 0
    assert_same(stored(tmp_path / "b", "dump/s1"), made[1])


def test_float16_is_kept_unless_a_cast_is_asked_for(tmp_path: Path, run) -> None:
    made = features(30, dtype=torch.float16)
    write_specforge(tmp_path / "src", 0, made)
    assert run(tmp_path / "src", tmp_path / "kept", *FLAGS) == 0
    assert_same(stored(tmp_path / "kept", "rows_0-5000/data_0"), made)
    assert run(tmp_path / "src", tmp_path / "cast", *FLAGS, "--cast", "bfloat16") == 0
    assert torch.equal(stored(tmp_path / "cast", "rows_0-5000/data_0").last, made.last.bfloat16())


# -- speculators: final norm, mask and head from the target --------------------------------------------------


CHATS = [
    ("What is two and two?", "It is four."),
    ("And a banana?", "A banana is a berry, and an answer."),
    ("Why?", "Because."),
]


def capture_like_speculators(target: Path, root: Path, chats: Path) -> dict[int, dict[str, torch.Tensor]]:
    """Run the target on every conversation and store its states as speculators does; return the true ones."""
    from transformers import LlamaForCausalLM

    root.mkdir()
    model = LlamaForCausalLM.from_pretrained(target, dtype=torch.bfloat16).eval()
    encoder = ChatEncoder(load_tokenizer(target), 4096)
    truth, before = {}, []
    model.model.norm.register_forward_pre_hook(lambda module, inputs: before.append(inputs[0]))
    for number, line in enumerate(chats.read_text().splitlines()):
        encoded = encoder.encode(json.loads(line))
        ids = torch.from_numpy(encoded.input_ids).long()
        with torch.no_grad():
            out = model(ids[None], output_hidden_states=True)
        aux = [out.hidden_states[layer + 1][0] for layer in AUX_IDS]
        write_speculators(root, 7 - number, ids, torch.stack([*aux, before[-1][0]], 1))
        mask = torch.from_numpy(encoded.loss_mask).long()
        logits = out.hidden_states[-1][0].float() @ model.lm_head.weight.float().T
        made = Features(ids, mask, torch.cat(aux, -1), out.hidden_states[-1][0])
        truth[7 - number] = {"made": made, "before": before[-1][0], "logits": logits}
    return truth


def test_speculators_files_get_the_targets_norm_mask_and_token(tmp_path: Path, run, target: Path) -> None:
    chats = write_conversations(tmp_path / "chats.jsonl", CHATS)
    truth = capture_like_speculators(target, tmp_path / "src", chats)
    flags = ["--target", target, "--dataset", chats, "--aux-layer-ids", "1,3,4"]
    assert run(tmp_path / "src", tmp_path / "dst", *flags) == 0
    for number, expected in truth.items():
        assert_same(stored(tmp_path / "dst", f"hs_{number}"), expected["made"])
        store = Store(tmp_path / "dst")
        (entry,) = [entry for entry in store.entries if entry.id == f"hs_{number}"]
        reader = store.reader(entry)
        assert torch.equal(reader.read_small("target_token_id").long(), expected["logits"].argmax(-1))
        torch.testing.assert_close(
            reader.read_small("target_logsumexp"), torch.logsumexp(expected["logits"], -1)
        )
    info = store.info
    assert info.target_hash and info.tokenizer_hash and info.head_size == VOCAB


def test_conversations_are_indexed_alike_by_any_number_of_workers(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chats = write_conversations(tmp_path / "chats.jsonl", CHATS * 3)
    alone = masks.ConversationMasks.index(chats, target, 4096)
    monkeypatch.setattr(masks, "BATCH_LINES", 2)
    monkeypatch.setattr(masks, "ProcessPoolExecutor", lambda workers, context: ThreadPoolExecutor(workers))
    together = masks.ConversationMasks.index(chats, target, 4096, workers=3)
    assert np.array_equal(alone.keys, together.keys) and np.array_equal(
        alone.offsets, together.offsets
    ) and len(alone.keys) == 9
    chats.write_text(chats.read_text() + '{"id": "x", "messages": [{"content": "no role"}]}\n')
    with pytest.raises(ValueError, match=r"chats.jsonl, line 10: a message has the keys"):
        masks.ConversationMasks.index(chats, target, 4096, workers=3)
    intake = Intake(strict=False)
    others = masks.ConversationMasks.index(chats, target, 4096, workers=3, intake=intake)
    assert np.array_equal(others.keys, alone.keys)
    assert [(one.line, one.id, one.reason) for one in intake.rejected] == [(10, "x", "no role or content")]


def test_bad_conversations_are_listed_and_the_template_gets_its_variables(
    tmp_path: Path, run, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chats = write_conversations(tmp_path / "chats.jsonl", CHATS)
    capture_like_speculators(target, tmp_path / "src", chats)
    no_text = '{"messages": [{"role": "user", "content": "\\ud800"}]}'
    chats.write_text("{broken\n" + chats.read_text() + no_text)
    flags = ["--target", target, "--dataset", chats, "--aux-layer-ids", "1,3,4"]
    assert run(tmp_path / "src", tmp_path / "strict", *flags, "--strict") == 1
    assert "chats.jsonl, line 1: not valid JSON" in capsys.readouterr().err
    assert run(tmp_path / "src", tmp_path / "dst", *flags, "--template-kwargs", '{"tone": "kind"}') == 0
    assert "2 rejected" in capsys.readouterr().out
    listed = (tmp_path / "dst" / "rejected_conversations.jsonl").read_text().splitlines()
    assert [json.loads(line)["line"] for line in listed] == [1, 5]
    assert Store(tmp_path / "dst").info.template_kwargs == {"tone": "kind"}
    assert run(tmp_path / "src", tmp_path / "dst", *flags) == 1  # other variables than the store's
    assert run(tmp_path / "src", tmp_path / "dst", *flags, "--template-kwargs", "[]") == 1


def test_a_sample_that_no_conversation_renders_to_is_rejected(tmp_path: Path, run, target: Path) -> None:
    chats = write_conversations(tmp_path / "chats.jsonl", CHATS)
    capture_like_speculators(target, tmp_path / "src", chats)
    write_conversations(chats, CHATS[1:])
    assert run(
        tmp_path / "src", tmp_path / "dst", "--target", target, "--dataset", chats, "--aux-layer-ids", "1,3,4"
    ) == 3
    assert rejects(tmp_path / "dst") == {"hs_7.safetensors": "loss mask"}
    assert len(Store(tmp_path / "dst")) == 2


@pytest.mark.parametrize("strict", [[], ["--strict"]], ids=["all", "strict"])
def test_a_conversion_that_rejects_every_file_leaves_no_store(tmp_path: Path, run, strict: list[str]) -> None:
    made = features(40, seed=1)
    broken = replace(made, last=torch.full_like(made.last, float("nan")))
    write_specforge(tmp_path / "src", 0, broken)
    assert run(tmp_path / "src", tmp_path / "dst", *FLAGS, *strict) == (4 if strict else 3)
    assert [path.name for path in (tmp_path / "dst").iterdir()] == ["rejected.jsonl"]
    assert list(rejects(tmp_path / "dst")) == ["data_0.ckpt"]
    write_specforge(tmp_path / "src", 0, made)
    assert run(tmp_path / "src", tmp_path / "dst", *FLAGS) == 0
    write_specforge(tmp_path / "src", 0, broken)
    write_specforge(tmp_path / "src", 1, broken)
    assert run(tmp_path / "src", tmp_path / "dst", *FLAGS) == 3
    assert len(Store(tmp_path / "dst")) == 1, "a store of an earlier conversion is kept"


def test_states_from_the_wrong_side_of_the_final_norm_are_rejected(tmp_path: Path, run, target: Path) -> None:
    """States from before the norm would train a draft on noise; the norm's own weight reveals them."""
    chats = write_conversations(tmp_path / "chats.jsonl", CHATS)
    truth = capture_like_speculators(target, tmp_path / "spec", chats)[7]
    flags = ["--target", target, "--aux-layer-ids", "1,3,4", "--skip-head"]
    write_specforge(tmp_path / "src", 0, truth["made"])
    write_specforge(tmp_path / "src", 1, replace(truth["made"], last=truth["before"]))
    assert run(tmp_path / "src", tmp_path / "dst", *flags) == 3
    assert rejects(tmp_path / "dst") == {"data_1.ckpt": "final norm"}
    assert run(tmp_path / "src", tmp_path / "taken", *flags, "--final-norm", "skip") == 0
    (tmp_path / "src" / "rows_0-5000" / "data_0.ckpt").unlink()
    assert run(tmp_path / "src", tmp_path / "applied", *flags, "--final-norm", "apply") == 0
    assert_same(stored(tmp_path / "applied", "rows_0-5000/data_1"), truth["made"])


# -- what is rejected ----------------------------------------------------------------------------------------


def spoiled_tree(root: Path) -> int:
    """Write a tree with one file of each fault and four good ones; return the number of files."""
    for number in range(4):
        write_specforge(root, number, features(50, seed=number))
    os.truncate(write_specforge(root, 10, features(50)), 3000)
    path = write_specforge(root, 11, features(50), gzipped=True)
    os.truncate(path, path.stat().st_size - 20)
    tensors = specforge_dict(features(50))
    tensors["hidden_state"][0, 3, 3] = float("nan")
    folder = root / "rows_0-5000"
    torch.save(tensors, folder / "data_12.ckpt")
    torch.save({"input_ids": tensors["input_ids"]}, folder / "data_13.ckpt")
    write_specforge(root, 14, features(50, hidden=16))
    write_specforge(root, 15, features(0))
    write_specforge(root, 16, features(50, dtype=torch.float32))
    write_specforge(root, 3, features(50, seed=3), gzipped=True)
    return 12


REASONS = {
    "data_10.ckpt": "truncated",
    "data_11.ckpt.gz": "truncated",
    "data_12.ckpt": "NaN or Inf",
    "data_13.ckpt": "missing key",
    "data_14.ckpt": "hidden size differs",
    "data_15.ckpt": "no tokens",
    "data_16.ckpt": "dtype",
    "data_3.ckpt.gz": "duplicate id",
}


def test_bad_files_are_listed_with_their_reasons_and_do_not_stop_the_others(
    tmp_path: Path, run, capsys: pytest.CaptureFixture[str]
) -> None:
    spoiled_tree(tmp_path / "src")
    assert run(tmp_path / "src", tmp_path / "dst", *FLAGS) == 3
    assert rejects(tmp_path / "dst") == REASONS
    assert {
        entry.id for entry in Store(tmp_path / "dst").entries
    } == {f"rows_0-5000/data_{number}" for number in range(4)}
    printed = " ".join(capsys.readouterr().out.split())
    assert "8 rejected: 2 truncated" in printed and "rejected.jsonl" in printed


def test_strict_stops_at_the_first_bad_file(tmp_path: Path, run) -> None:
    for number in range(6):
        path = write_specforge(tmp_path / "src", number, features(50, seed=number))
        if number == 2:
            os.truncate(path, 3000)
    assert run(tmp_path / "src", tmp_path / "dst", *FLAGS, "--strict") == 4
    assert len(Store(tmp_path / "dst")) == 2


def test_a_tree_of_bad_files_only_lists_them_all(tmp_path: Path, run) -> None:
    for number in range(12):
        os.truncate(write_specforge(tmp_path / "src", number, features(50)), 100)
    assert run(tmp_path / "src", tmp_path / "dst", *FLAGS) == 3
    assert len(rejects(tmp_path / "dst")) == 12


def test_a_repaired_file_is_converted_by_the_next_run(tmp_path: Path, run) -> None:
    path = write_specforge(tmp_path / "src", 0, features(50))
    write_specforge(tmp_path / "src", 1, features(50, seed=1))
    os.truncate(path, 1000)
    assert run(tmp_path / "src", tmp_path / "dst", *FLAGS) == 3
    write_specforge(tmp_path / "src", 0, features(50))
    assert run(tmp_path / "src", tmp_path / "dst") == 0  # the store says now what the flags said
    assert len(Store(tmp_path / "dst")) == 2 and rejects(tmp_path / "dst") == {}


class DyingWorker(Worker):
    """A worker that is killed while it converts one item, as by the out-of-memory killer."""

    def run(self, job: Job, files: SampleFiles) -> Outcome:
        if job.item.id.endswith("data_2"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().run(job, files)


def test_a_killed_worker_loses_only_the_file_it_was_at(tmp_path: Path) -> None:
    for number in range(6):
        write_specforge(tmp_path / "src", number, features(20, seed=number))
    info = StoreInfo("tiny", "", "", HIDDEN, AUX_IDS, VOCAB)
    with StoreWriter(tmp_path / "dst", info, workers=1):
        worker = DyingWorker(tmp_path / "dst", info, Completer(), verify=False, encoders=1)
        outcomes = list(run_jobs([Job(item) for item in iter_source(tmp_path / "src")], worker, 2))
    assert len(outcomes) == 6
    (lost,) = [outcome.rejected for outcome in outcomes if outcome.rejected]
    assert lost.reason == Reason.WORKER and "data_2" in lost.path and "exit code -9" in lost.detail


# -- what may be deleted -------------------------------------------------------------------------------------


def test_sources_are_deleted_only_after_their_copies_were_compared(tmp_path: Path, run) -> None:
    spoiled_tree(tmp_path / "src")
    assert run(tmp_path / "src", tmp_path / "dst", *FLAGS, "--delete-source") == 3
    assert {path.name for path in (tmp_path / "src").rglob("*.*")} == set(REASONS)
    assert_same(stored(tmp_path / "dst", "rows_0-5000/data_3"), features(50, seed=3))


def test_a_file_of_groups_is_deleted_once_all_its_samples_are_stored(tmp_path: Path, run) -> None:
    path = write_grouped_hdf5(tmp_path / "dump.h5", [features(9), features(11)])
    assert run(path, tmp_path / "dst", *FLAGS, "--map", GROUPED_MAP, "--delete-source") == 0
    assert not path.exists() and len(Store(tmp_path / "dst")) == 2


def flip_a_stored_bit(root: Path, name: str = "hidden_state") -> None:
    import h5py

    path = next((root / "samples").glob("*/*.h5"))
    with h5py.File(path, "r", locking=False) as file:
        offset = file[name].id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[offset + 100] ^= 1
    path.write_bytes(content)


def test_a_copy_that_differs_keeps_its_source(tmp_path: Path, run, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_specforge(tmp_path / "src", 0, features(50))
    write = SampleFiles.write

    def spoil(self: SampleFiles, sample):
        entry = write(self, sample)
        flip_a_stored_bit(tmp_path / "dst")
        return entry

    monkeypatch.setattr(SampleFiles, "write", spoil)
    assert run(tmp_path / "src", tmp_path / "dst", *FLAGS, "--delete-source") == 5
    assert path.exists() and rejects(tmp_path / "dst") == {"data_0.ckpt": "read-back differs"}
    assert len(Store(tmp_path / "dst")) == 0  # no manifest line: the next run writes it again
    monkeypatch.undo()


def test_verify_compares_what_an_earlier_run_stored(tmp_path: Path, run) -> None:
    write_specforge(tmp_path / "src", 0, features(50))
    assert run(tmp_path / "src", tmp_path / "dst", *FLAGS) == 0
    assert run(tmp_path / "src", tmp_path / "dst", "--verify") == 0
    flip_a_stored_bit(tmp_path / "dst", "aux_hidden_state")
    assert run(tmp_path / "src", tmp_path / "dst", "--verify", "--delete-source") == 5
    assert len(list((tmp_path / "src").rglob("*.ckpt"))) == 1
    write_specforge(tmp_path / "src", 0, features(50, seed=9))  # another source under the same id
    assert run(tmp_path / "src", tmp_path / "dst", "--verify") == 5


# -- stopping and continuing ---------------------------------------------------------------------------------


def test_a_conversion_killed_at_any_moment_continues_where_it_was(tmp_path: Path, run) -> None:
    made = {number: features(600, seed=number, hidden=128) for number in range(24)}
    for number, sample in made.items():
        write_specforge(tmp_path / "src", number, sample)
    command = [
        sys.executable, str(TOOL), str(tmp_path / "src"), str(tmp_path / "dst"), *FLAGS, "--workers", "2"
    ]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    manifest = tmp_path / "dst" / "manifest.jsonl"
    while not manifest.exists() or manifest.stat().st_size == 0:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = len(Store(tmp_path / "dst"))
    assert 0 < before < 24
    wait_for_lock(tmp_path / "dst")
    assert run(tmp_path / "src", tmp_path / "dst", "--verify") == 0
    assert len(Store(tmp_path / "dst")) == 24 and not list((tmp_path / "dst" / "writing").iterdir())
    assert manifest.read_text().count("\n") == 24
    assert_same(stored(tmp_path / "dst", "rows_0-5000/data_23"), made[23])


def wait_for_lock(root: Path) -> None:
    """The lock lives as long as any process that inherited it."""
    import fcntl

    with (root / "writer.lock").open("a") as file:
        for _ in range(500):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                time.sleep(0.01)
    raise AssertionError("a killed conversion left a process that holds the store")


def test_a_full_disk_stops_with_one_sentence_and_keeps_what_was_converted(
    tmp_path: Path, run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(4):
        write_specforge(tmp_path / "src", number, features(50, seed=number))
    write = SampleFiles.write

    def fill(self: SampleFiles, sample):
        if sample.id.endswith("data_2"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, sample)

    with monkeypatch.context() as patch:
        patch.setattr(SampleFiles, "write", fill)
        assert run(tmp_path / "src", tmp_path / "dst", *FLAGS) == 6
    assert "No space left on device" in capsys.readouterr().err
    assert len(Store(tmp_path / "dst")) == 2
    assert run(tmp_path / "src", tmp_path / "dst") == 0 and len(Store(tmp_path / "dst")) == 4


def test_an_interrupt_ends_cleanly(
    tmp_path: Path, run, tool: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        write_specforge(tmp_path / "src", number, features(50, seed=number))

    def interrupt(*_: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tool, "progress_line", interrupt)
        assert run(tmp_path / "src", tmp_path / "dst", *FLAGS, "--workers", "2") == 130
    assert run(tmp_path / "src", tmp_path / "dst") == 0 and len(Store(tmp_path / "dst")) == 4


# -- checks and predictions before the work ------------------------------------------------------------------


def test_a_dry_run_predicts_the_size_and_writes_nothing(tmp_path: Path, run) -> None:
    for number in range(6):
        write_specforge(
            tmp_path / "src", number, features(1024, seed=number, hidden=256), gzipped=number % 2 == 0
        )
    arguments = ConvertOptions(
        tmp_path / "src", tmp_path / "dst", target_name="t", aux_layer_ids=AUX_IDS, vocab_size=VOCAB
    )
    summary, prediction = conversion.predict_conversion(arguments)
    assert run(tmp_path / "src", tmp_path / "dst", *FLAGS, "--dry-run") == 0
    assert not (tmp_path / "dst").exists()
    done = conversion.convert(arguments)
    assert summary.found == done.converted == 6
    assert prediction.raw_bytes == pytest.approx(done.raw_bytes, rel=0.05)
    assert prediction.stored_bytes == pytest.approx(done.stored_bytes, rel=0.05)
    assert prediction.seconds > 0


def words_of(capsys: pytest.CaptureFixture[str]) -> str:
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return " ".join(text.split())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "give --target with the target's folder"),
        (["--target-name", "x", "--vocab-size", "9"], "or else --aux-layer-ids"),
        ([*FLAGS[:3], "1,2", *FLAGS[4:]], "the files hold 3 aux layers, expected [1, 2]"),
        ([*FLAGS, "--workers", "0"], "--workers is 0"),
        ([*FLAGS, "--dataset", "x.jsonl"], "--dataset needs --target"),
        pytest.param([*FLAGS, "--head-device", "cuda"], "no CUDA device", marks=NO_GPU),
        ([*FLAGS, "--cast", "float16", "--delete-source"], "--cast loses bits"),
        (["--target", "nowhere/at/all"], "nowhere/at/all"),
        ([*FLAGS, "--map", "nonsense"], "NAME=PATH"),
    ],
)
def test_wrong_flags_are_refused_in_one_sentence(
    tmp_path: Path, run, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    write_specforge(tmp_path / "src", 0, features(5))
    assert run(tmp_path / "src", tmp_path / "dst", *flags) == 1
    assert words in words_of(capsys)


def test_the_user_is_asked_for_what_a_format_lacks(
    tmp_path: Path, run, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_speculators(tmp_path, 0, torch.zeros(9, dtype=torch.int64), torch.randn(9, 4, HIDDEN).bfloat16())
    assert run(tmp_path / "hs_0.safetensors", tmp_path / "dst", *FLAGS) == 1
    assert "before the target's final norm; give the target with --target" in words_of(capsys)
    assert run(tmp_path / "hs_0.safetensors", tmp_path / "dst", "--target", target) == 1
    assert "no loss mask; give the conversations they were captured from with --dataset" in words_of(capsys)


def test_a_store_with_other_info_or_inside_the_source_is_refused(
    tmp_path: Path, run, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_specforge(tmp_path / "src", 0, features(5))
    assert run(tmp_path / "src", tmp_path / "src" / "dst", *FLAGS) == 1
    assert "lies inside the source" in words_of(capsys)
    assert run(tmp_path / "src", tmp_path / "dst", *FLAGS) == 0
    capsys.readouterr()
    assert run(tmp_path / "src", tmp_path / "dst", "--target-name", "another") == 1
    assert "made from other data: target is 'tiny' there, 'another' here" in words_of(capsys)
    other = save_tiny_llama(tmp_path / "wide", hidden_size=64)
    assert run(tmp_path / "src", tmp_path / "dst3", "--target", other) == 1
    assert "the files have hidden size 32" in words_of(capsys)


# -- memory --------------------------------------------------------------------------------------------------

MEASURE = """
import resource, sys
from pathlib import Path
from eagle_ds.convert.run import convert
from eagle_ds.convert.options import ConvertOptions
import torch
torch.set_num_threads(1)
root, known = Path(sys.argv[1]), {"target_name": "t", "aux_layer_ids": (1, 2, 3), "vocab_size": 280}
def run(name):
    convert(ConvertOptions(root / name, root / f"{name}.out", workers=1, **known))
run("small")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run("large")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_each_worker_holds_less_than_two_samples_in_memory(tmp_path: Path) -> None:
    made = features(8192, hidden=512)
    for number, gzipped in enumerate((False, True, True)):
        write_specforge(tmp_path / "small", number, features(8), gzipped)
        write_specforge(tmp_path / "large", number, made, gzipped, level=1)
    environment = {**os.environ, "PYTHONPATH": str(TOOL.parents[1])}
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    measured = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert int(measured.stdout.split()[-1]) < 2 * (made.aux.nbytes + made.last.nbytes)


def test_the_help_lists_every_exit_code() -> None:
    text = TOOL.read_text()
    assert all(f"\n  {code}  " in text for code in (0, 1, 2, 3, 4, 5, 6, 130))
