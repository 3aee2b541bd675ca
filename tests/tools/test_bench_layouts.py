"""tools/bench_layouts.py trains the same draft under several layouts, from the same start on the same data.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from eagle_ds.bench.synthetic_data import Playground, Sizes
from eagle_ds.config.recipe import load_recipe
from eagle_ds.store.store import Store

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "bench_layouts.py"
TIMEOUT_S = 800  # for hangs only: at least ten times what the slowest run takes on an idle machine


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_layouts", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up annotations there
    spec.loader.exec_module(module)
    return module


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


def test_layouts_are_parsed(tool: ModuleType) -> None:
    read = {text: tool.read_layout(text) for text in (
        "1", "U4", "R2:p2p", "U2R2:gather", "1/float32", "U2R2/bfloat16"
    )}
    assert [layout.processes for layout in read.values()] == [1, 4, 2, 4, 1, 4]
    assert read["U2R2:gather"].parallel == {"ulysses": 2, "ring": 2, "ring_mode": "gather"}
    assert (read["1/float32"].name, read["1/float32"].dtype, read["U4"].dtype) == (
        "1_float32", "float32", None
    )
    assert all(tool.read_layout(text) for text in tool.LAYOUTS)
    for text in ("", "U", "4", "R2:ring", "U2:p2p", "R2U2", "1/float16"):
        with pytest.raises(ValueError, match="is not a layout; write 1, U4"):
            tool.read_layout(text)


def test_the_tokens_follow_the_targets_choice(tmp_path: Path) -> None:
    place = Playground(tmp_path, Sizes(hidden=64, vocab=50, tokens=200, samples=2))
    place.make_data()
    store = Store(place.store)
    reader = store.reader(store.entries[1])
    ids, labels = reader.read_small("input_ids"), reader.read_small("target_token_id")
    assert (labels[:-1] == ids[1:]).float().mean() > 0.8  # nine of ten tokens
    assert [entry.num_trained / entry.num_tokens for entry in store.entries] == [0.5, 1.0]
    recipe = load_recipe(place.write_recipe("x", {"ulysses": 2}, "float32", 7))
    assert recipe.training.max_steps == 7 and recipe.parallel.ulysses == 2
    assert recipe.run_dir == tmp_path / "x"


def test_runs_learn_and_are_compared(tmp_path: Path) -> None:
    small = ["--device", "cpu", "--steps", "6", "--tokens", "48", "--hidden", "32", "--max-relative", "1e-4"]
    done = run("--out", str(tmp_path), *small, "--layouts", "1", "R2:p2p")
    assert done.returncode == 0, done.stderr
    compared = json.loads((tmp_path / "compare.json").read_text())
    assert compared["steps"] == [1, 2, 3, 4, 5, 6] and [
        found["label"] for found in compared["runs"]
    ] == ["1", "R2 p2p"]
    assert all(found["last_loss"] < found["first_loss"] for found in compared["runs"])


def test_layouts_that_cannot_run_or_be_compared_are_refused(tool: ModuleType) -> None:
    assert [layout.name for layout in tool.choose_layouts(None, 2)] == ["1", "U2", "R2_gather", "R2_p2p"]
    assert len(tool.choose_layouts(["1/float32", "1/bfloat16"], 1)) == 2
    with pytest.raises(ValueError, match="layout U8 needs 8 processes, but 4 fit here"):
        tool.choose_layouts(["1", "U8"], 4)
    for texts in (["U2"], None):  # one GPU fits one layout
        with pytest.raises(ValueError, match="leaves nothing to compare"):
            tool.choose_layouts(texts, 2 if texts else 1)


def test_processes_that_share_a_gpu_are_started_by_torch(tool: ModuleType) -> None:
    """DeepSpeed's launcher starts no more processes than there are GPUs."""
    assert "deepspeed.launcher.runner" in tool.launcher(4, 29_600, share_gpu=False)
    command = tool.launcher(4, 29_600, share_gpu=True)
    assert command[1:] == ["-m", "torch.distributed.run", "--nproc_per_node", "4", "--master_port", "29600"]


def test_an_unknown_layout_is_refused(tmp_path: Path) -> None:
    refused = run("--out", str(tmp_path / "x"), "--layouts", "4U")
    assert refused.returncode == 2 and "error: 4U is not a layout" in refused.stderr


def test_an_output_folder_that_cannot_be_made_is_refused_first(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused = run("--out", str(tmp_path / "file" / "x"), "--device", "cpu")
    assert refused.returncode == 2
    assert refused.stderr.startswith(
        f"error: --out {tmp_path}/file/x: {tmp_path}/file is a file, where a folder was expected"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_reported(tmp_path: Path) -> None:
    refused = run("--out", str(tmp_path / "x"), "--device", "cuda", "--share-gpu")
    assert refused.returncode == 2 and refused.stderr.startswith(
        "error: --device cuda: torch sees no GPU here"
    )
    assert not (tmp_path / "x").exists()
