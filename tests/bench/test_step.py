"""A timed step is the trainer's step, and works on the same rows from memory and from HDF5 files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest

from eagle_ds.bench.flops import data_sheet_tflops, model_flops
from eagle_ds.bench.sources import StoreSource
from eagle_ds.bench.synthetic_data import default_samples, random_store
from eagle_ds.estimate.devices import Device
from eagle_ds.estimate.sequences import document_in_turns, sharding_for
from eagle_ds.estimate.step_time import floor_seconds
from eagle_ds.estimate.tensor_sizes import draft_parameters
from eagle_ds.sharding.sequence import Document
from eagle_ds.store.store import StoreWriter
from tests.bench.step_ranks import time_both
from tests.gloo_pool import GlooPool, free_port
from tests.training.tiny_run import H, Tiny

ROOT = Path(__file__).resolve().parents[2]
TOKENS = 96
TIMEOUT_S = 600  # for hangs only: at least ten times what the slowest command takes on an idle machine


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Tiny recipes; a timed step needs neither their target nor their store."""
    tiny = Tiny(tmp_path_factory.mktemp("tiny"))
    (tiny.root / "ds_stage1.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    return tiny


@pytest.fixture(scope="module")
def pool() -> Iterator[GlooPool]:
    with GlooPool(2) as workers:
        yield workers


@pytest.mark.parametrize(
    "layout", [
        {"parallel__ulysses": 2}, {"parallel__ring": 2, "parallel__ring_mode": "p2p"},
        {"data__read_processes": 1}
    ]
)
def test_memory_and_store_give_batches_of_the_same_rows(
    pool: GlooPool, tiny: Tiny, tmp_path: Path, layout: dict
) -> None:
    recipe = tiny.recipe(data__max_length=TOKENS, data__pack_tokens=2 * TOKENS, **layout)
    for times, same in pool.run(time_both, 2, recipe, document_in_turns(TOKENS, 0.5, 16), tmp_path):
        assert all(same)
        memory, store = times
        assert memory.step_ms > memory.forward_ms > 0 and memory.backward_ms > 0 and memory.optimizer_ms > 0
        assert memory.data_wait_ms < 0.1 * memory.step_ms and store.data_wait_ms > 0
        parts = store.data_wait_ms, store.forward_ms, store.backward_ms, store.optimizer_ms
        # Each part is that of the slower rank, and so is the whole step.
        assert sum(parts) / 2 < store.step_ms <= sum(parts) * (1 + 1e-6)


def test_a_random_store_is_kept_extended_and_checked(tiny: Tiny, tmp_path: Path) -> None:
    recipe, document = tiny.recipe(), document_in_turns(TOKENS, 0.5, 16)
    first = random_store(tmp_path, recipe, document, 2, dtype="bfloat16")
    assert len(first) == 2 and {e.trained_spans for e in first.entries} == {document.trained_spans}
    assert first.info.hidden_size == H and first.info.aux_layer_ids == recipe.target.aux_ids
    before = [(tmp_path / entry.path).stat().st_mtime_ns for entry in first.entries]
    more = random_store(tmp_path, recipe, document, 3, dtype="bfloat16")
    assert len(more) == 3 and [
        (tmp_path / entry.path).stat().st_mtime_ns for entry in more.entries[:2]
    ] == before
    ids = [more.reader(entry).read_small("input_ids").tolist() for entry in more.entries]
    assert ids[0] != ids[1] != ids[2]
    with StoreWriter(tmp_path, more.info):  # another process has it open for writing
        assert len(random_store(tmp_path, recipe, document, 3, dtype="bfloat16")) == 3
    message = "48 trained, but this benchmark times 96 tokens with 96 trained; give another folder"
    with pytest.raises(ValueError, match=message):
        random_store(tmp_path, recipe, Document(TOKENS, ((0, TOKENS),)), 3, dtype="bfloat16")
    with pytest.raises(ValueError, match="dtype"):
        random_store(tmp_path, recipe, document, 3, dtype="float32")


def test_a_store_that_cannot_fill_a_step_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    recipe, document = tiny.recipe(data__max_length=TOKENS), document_in_turns(TOKENS, 0.5, 16)
    store = random_store(tmp_path, recipe, document, 2, dtype="float32")
    with pytest.raises(ValueError, match="holds 2 samples, but one step takes 3"):
        StoreSource(store, recipe, sharding_for(recipe, [document] * 3), Mock(**{"topology.dp": 1}), None)


def test_there_are_samples_for_two_different_steps() -> None:
    shapes = ((4096, 1), (65_536, 1), (131_072, 1), (4096, 32), (131_072, 4))
    assert [default_samples(tokens, per_step) for tokens, per_step in shapes] == [4, 4, 2, 64, 8]


def test_the_models_flops_depend_on_the_shape_and_not_on_the_layout(tiny: Tiny) -> None:
    document = document_in_turns(4096, 0.5, 512)
    alone, spread = tiny.recipe(), tiny.recipe(parallel__ulysses=2, parallel__ring=2)
    flops = [model_flops(recipe, sharding_for(recipe, [document])) for recipe in (alone, spread)]
    assert flops[0] == pytest.approx(flops[1], rel=1e-12)


@pytest.mark.parametrize("steps", [1, 3])
def test_the_models_flops_equal_a_count_by_hand(tiny: Tiny, steps: int) -> None:
    """98 query rows read tokens 1 to 98 at step 0, and one more at each further step, up to the last one, 99.
    """
    recipe = tiny.recipe(training__ttt_steps=steps)
    sharding = sharding_for(recipe, [Document(100, ((0, 100),))])
    parts, rows, tokens = draft_parameters(recipe), 98, 98 if steps == 1 else 99
    assert sharding.num_queries == rows and sharding.target_rows(0) == ((1, 1 + tokens),)
    # One half of the input; eight query heads of width 4, two KV heads of width 4 for keys and for values.
    q, kv = H * 8 * 4, H * 2 * 2 * 4
    first = 100 * (parts["fc"] + 2 * kv)  # K_0 and V_0 read both halves
    projected = tokens * (q + kv * (steps > 1)) + rows * (steps * q + (steps - 1) * kv)
    weights = first + projected + rows * steps * (H * 8 * 4 + parts["mlp"] + parts["lm_head"])
    pairs = steps * sum(p + 1 for p in range(rows)) + rows * sum(range(steps))
    assert model_flops(recipe, sharding) == 6 * weights + 12 * pairs * 8 * 4 + 2 * tokens * parts["lm_head"]


def test_the_floor_counts_slightly_more_than_the_models_flops(tiny: Tiny) -> None:
    recipe = tiny.recipe()
    sharding = sharding_for(recipe, [document_in_turns(4096, 1.0)])
    at_one_rate = Device("one TFLOP/s", 1, 1, 1, 1)
    assert 0.8 < model_flops(recipe, sharding) / (
        1e12 * sum(floor_seconds(recipe, sharding, at_one_rate).values())
    ) < 1


def test_peaks_come_from_the_data_sheets() -> None:
    names = ("NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-80GB", "Voodoo 2")
    assert [data_sheet_tflops(name) for name in names] == [989, 989, 756, 312, None]


def test_the_tool_times_a_sweep_from_memory_and_store(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.json"
    recipe.write_text(tiny.recipe().model_dump_json())
    options = [
        "--sweep", "64:1", "128:1", "128:0.5", "--turn", "16",
        "--steps", "1", "--ttt-steps", "2", "--sample-memory"
    ]
    files = [
        "--from-store", str(tmp_path / "stores"), "--out",
        str(tmp_path / "out"), "--profile", str(tmp_path / "trace.json")
    ]
    command = [sys.executable, "tools/bench_step.py", "--recipe", str(recipe), *options, *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(text) for text in (tmp_path / "out" / "steps.jsonl").read_text().splitlines()]
    assert [(line["tokens"], line["fraction"], line["source"]) for line in lines] == [
        (tokens, fraction, source) for tokens, fraction in (
            (64, 1), (128, 1), (128, 0.5)
        ) for source in ("memory", "store")
    ]
    for line in lines[1::2]:
        assert line["data_wait_ms"] > 0 and line["read_ms"] > 0
        assert "slower_than_memory" in line and "backward_gib" in line
        assert line["ttt_steps"] == 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "fraction.png", "length.png", "steps.jsonl", "steps.md"
    ]
    assert sorted(path.name for path in (tmp_path / "stores").iterdir()) == [
        *(f"tiny-{shape}-float32" for shape in ("128-0.5-in-16", "128-all", "64-all")),
    ]
    assert json.loads((tmp_path / "128-0.5-trace.json").read_text())["traceEvents"] and (
        tmp_path / "128-0.5-trace.md"
    ).is_file()
    assert "writing 4 random samples of 64 tokens" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--from-store", "{folder}/file/x"],
            "--from-store {folder}/file/x: {folder}/file is a file, where a folder was expected"
        ),
        (
            ["--trained-fraction", "0"],
            "a trained fraction of 0 is out of range; use one above 0 and at most 1"
        ),
    ],
)
def test_the_tool_refuses_impossible_options_in_one_line(
    options: list[str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    command = [
        sys.executable, "tools/bench_step.py", "--model", "smollm2",
        *(option.format(folder=tmp_path) for option in options)
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert message.format(folder=tmp_path) in done.stderr


def test_ranks_that_share_a_device_report_it(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.json"
    recipe.write_text(tiny.recipe().model_dump_json())
    launcher = [
        sys.executable, "-m", "torch.distributed.run",
        "--nproc_per_node", "2", "--master_port", str(free_port())
    ]
    options = [
        "--recipe", str(recipe), "--share-gpu", "--seq", "64",
        "--ulysses", "2", "--steps", "1", "--ttt-steps", "2"
    ]
    command = [*launcher, "tools/bench_step.py", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 ranks share each device and exchange tensors through host memory" in done.stderr
    line = json.loads(done.stdout)
    assert line["resident_gib"] == line["kept_gib"] == 0  # measured on GPUs alone
    assert line["shared_gpu"] and line["gpus"] == 2 and line["layout"] == "U2 R1" and "floor_ms" not in line


def test_out_of_memory_on_one_rank_ends_all_and_keeps_earlier_lines(tiny: Tiny, tmp_path: Path) -> None:
    """The other rank waits in a collective for the one that left; the launcher ends it."""
    recipe = tmp_path / "tiny.json"
    recipe.write_text(tiny.recipe().model_dump_json())
    launcher = [
        sys.executable, "-m", "torch.distributed.run",
        "--nproc_per_node", "2", "--master_port", str(free_port())
    ]
    options = [
        "--recipe", str(recipe), "--sweep", "64", "128", "64",
        "--ulysses", "2", "--steps", "1", "--ttt-steps", "2"
    ]
    command = [*launcher, "tests/bench/launched_bench_step.py", "1", *options, "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode != 0
    text = next(line for line in done.stderr.splitlines() if line.startswith("error (rank 1): "))
    assert "out of memory (CUDA out of memory. Tried to allocate 2.00 GiB.): " in text
    assert "): by prediction a sequence of 128 tokens with " in text
    assert "GiB a GPU on ulysses 2 * ring 1; " in text and "tokens would fit; " in text
    assert "--training" not in text  # the advice names options of this tool
    lines_file = tmp_path / "out" / "steps.jsonl"
    assert f"; the lines of earlier shapes are in {lines_file}; the launcher ends the other ranks" in text
    assert [
        json.loads(line)["tokens"] for line in (tmp_path / "out" / "steps.jsonl").read_text().splitlines()
    ] == [64]
