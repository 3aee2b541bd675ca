"""A report needs no other file, shows what the run's files say, and is made from the files that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eagle_ds.evaluation.acceptance import Measurement, Prompt
from eagle_ds.evaluation.decoding import Decoded, DecodeSettings, Divergence, Round
from eagle_ds.reporting.figures import acceptance_figure, smooth
from eagle_ds.reporting.report import Run, training_seconds, write_report
from tests.draft_cases import PLAIN, recipe_for

PNG = b"\x89PNG"


def step_line(step: int) -> dict[str, Any]:
    curves = {"loss": 9.0 - step / 10, "kl": 3.0 - step / 10, "simulated_length": 1 + step / 50}
    return {"step": step, "trained_rows": 9, "accuracy": [0.1, 0.05], "acceptance": [0.2, 0.1], **curves}


def train_line(step: int) -> dict[str, Any]:
    speed = {"tokens_per_s": 1234.0, "tokens": 99, "step_s": 2.0, "data_wait_s": 0.5, "peak_gib": 1.5}
    return step_line(step) | {"lr": 1e-4, "grad_norm": 1.0, "epoch": 0} | speed


def decoded(gains: list[int], divergence: Divergence | None = None) -> Decoded:
    rounds = [Round(500 * i, min(gain, 3), gain - 1, gain) for i, gain in enumerate(gains)]
    return Decoded([0] * (1 + sum(gains)), 1.0, rounds, divergence=divergence)


def acceptance() -> dict[str, Any]:
    gone = Divergence(1, 2, 3, gap=0.0625, plain_margin=0.1, spacing=0.0625)
    drafts = {
        "untrained": [decoded([1, 1]), decoded([1, 1])], "trained": [decoded([3, 2]), decoded([2, 2], gone)]
    }
    measured = Measurement(
        DecodeSettings(8, 3), [Prompt("a", (1,)), Prompt("b", (2,))], [Decoded([0] * 5, 1.0)] * 2, drafts
    )
    where = {"target": "org/<target>", "dtype": "bfloat16", "device": "cpu", "prompts_file": "chats.jsonl"}
    return where | measured.summary()


def write_run(folder: Path) -> Path:
    folder.mkdir()
    recipe = recipe_for(PLAIN, folder.parent, "org/<target>", sliding_window=64)
    (folder / "recipe.json").write_text(recipe.model_dump_json())
    (folder / "log.jsonl").write_text("".join(json.dumps(train_line(step)) + "\n" for step in range(1, 21)))
    (folder / "eval.jsonl").write_text("".join(json.dumps(step_line(step)) + "\n" for step in (0, 10, 20)))
    (folder / "acceptance.json").write_text(json.dumps(acceptance()))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with its report."""
    folder = write_run(tmp_path_factory.mktemp("report") / "run")
    assert write_report(folder) == folder / "report.html"
    return folder


def test_a_report_needs_no_other_file(reported: Path) -> None:
    page = (reported / "report.html").read_text()
    assert page.count("data:image/png;base64,iVBOR") == 3
    assert not re.search(r"(src|href)=.?https?:|<script", page)
    assert "<target>" not in page and "org/&lt;target&gt;" in page
    assert not list(reported.glob(".report*"))


def test_a_report_shows_the_measured_figures(reported: Path) -> None:
    page = (reported / "report.html").read_text()
    assert "1.00 → 2.25" in page and "+1.25" in page  # acceptance length and its gain
    assert "1.00 → 1.40" in page and "3.00 → 1.00" in page  # simulated length and KL, held out
    assert "1,234" in page and "25.0 % of the time" in page and "1.5 GiB" in page
    assert "largest logit gap 0.0625" in page
    assert "&quot;rope_theta&quot;: 10000.0" in page


def test_a_report_shows_how_to_serve(reported: Path) -> None:
    page = (reported / "report.html").read_text()
    for words in (
        "--speculative-algorithm EAGLE3", f"--speculative-draft-model-path {reported}/draft",
        "--speculative-num-draft-tokens 3"
    ):
        assert words in page
    assert "--speculative-draft-window-size 63" in page
    assert "vllm serve" in page and f"{reported}/draft&quot;" in page and "tools/export_draft.py" in page
    assert "--vllm" not in page  # both engines load the same folder


def test_draft_positions_that_are_seldom_accepted_are_not_served(run: Path) -> None:
    assert Run.read(run).num_steps == 2
    (run / "acceptance.json").unlink()
    assert Run.read(run).num_steps == 3


@pytest.mark.parametrize(
    "absent",
    [("acceptance.json",), ("eval.jsonl", "acceptance.json"), ("log.jsonl",), ("log.jsonl", "eval.jsonl")]
)
def test_a_report_is_made_from_the_files_that_exist(run: Path, absent: tuple[str, ...]) -> None:
    for name in absent:
        (run / name).unlink()
    page = write_report(run).read_text()
    assert ("--baseline untrained" in page) == ("acceptance.json" in absent)


def test_an_incomplete_line_is_skipped_and_a_repeated_step_counts_once(run: Path) -> None:
    with (run / "log.jsonl").open("a") as stream:
        stream.write(json.dumps(train_line(20) | {"loss": 5.0}) + "\n" + '{"step": 21, "lo')
    lines = Run.read(run).train
    assert [line["step"] for line in lines] == list(range(1, 21)) and lines[-1]["loss"] == 5.0


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda run: (run / "recipe.json").unlink(), "is not a run folder"),
        (lambda run: [path.unlink() for path in run.iterdir() if path.name != "recipe.json"], "train first"),
        (lambda run: (run / "log.jsonl").write_text("nonsense\n"), "line 1 is not a record of a step"),
        (lambda run: (run / "acceptance.json").write_text("{"), "not valid JSON"),
    ],
)
def test_a_folder_that_cannot_be_reported_is_refused(run: Path, break_it: Any, message: str) -> None:
    break_it(run)
    with pytest.raises(ValueError, match=message):
        write_report(run)
    assert not (run / "report.html").exists()


def test_training_seconds_count_every_step_between_two_lines() -> None:
    assert training_seconds([train_line(10), train_line(20), train_line(25)]) == 50.0


def test_a_single_draft_can_be_drawn() -> None:
    found = acceptance()
    alone = found | {"drafts": found["drafts"][1:], "differences": [], "plain": None}
    assert acceptance_figure(found).startswith(PNG) and acceptance_figure(alone).startswith(PNG)


def test_smoothing_keeps_the_length_and_constants() -> None:
    assert np.allclose(smooth(np.full(137, 2.5)), 2.5)
    assert smooth(np.array([1.0, 3.0])).tolist() == [1.0, 3.0]
