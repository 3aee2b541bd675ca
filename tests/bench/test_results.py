"""Results read from JSON lines give tables and pictures, each if there are enough results for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from eagle_ds.bench import plots
from eagle_ds.bench.plots import fraction_figure, length_figure, scaling_figure, write_results
from eagle_ds.bench.results import (
    Result,
    layout_label,
    markdown,
    memory_markdown,
    milliseconds,
    peer_for,
    read_results,
    short,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[2]
PNG = b"\x89PNG"
TIMEOUT_S = 300  # for hangs only: at least ten times what the command takes on an idle machine


def line(
    tokens: int = 131_072, gpus: int = 4, layout: str = "U4 R1", step_ms: float = 2400.0, **changes: Any
) -> dict[str, Any]:
    """Return a line as the tool writes it."""
    phases = {
        "data_wait_ms": 0.0, "forward_ms": 0.4 * step_ms,
        "backward_ms": 0.59 * step_ms, "optimizer_ms": 0.01 * step_ms
    }
    rates = {
        "tokens_per_s_per_gpu": 13653, "trained_rows_per_s": 54613,
        "floor_ms": 0.9 * step_ms, "ratio_to_floor": 1.11, "mfu": 0.5
    }
    start = {
        "model": "llama3_8b", "gpus": gpus, "fraction": 1.0, "turn": 512,
        "tokens": tokens, "documents": 1, "trained_rows": tokens
    }
    how = {"layout": layout, "ttt_steps": 7, "recompute": "full", "step_ms": step_ms, "peak_gib": 18.5}
    return start | how | phases | rates | changes


def results(*lines: dict[str, Any]) -> list[Result]:
    return [Result.from_line(one) for one in lines]


LENGTHS = [line(n << 10, step_ms=ms) for n, ms in ((32, 330), (64, 900), (128, 2400))]
FRACTIONS = [line(fraction=f, step_ms=2400 * f + 60) for f in (0.1, 0.5)] + [line()]
SCALING = [
    line(gpus=1, layout="U1 R1", step_ms=9500),
    line(gpus=2, layout="U2 R1", step_ms=4900),
    line(gpus=2, layout="U1 R2 gather", step_ms=4800),
    line(),
    line(gpus=4, layout="U2 R1", step_ms=4900),  # two sequences at once: not strong scaling
]
OUT_OF_MEMORY = {
    **{name: line()[name] for name in (
        "model", "fraction", "turn", "tokens", "documents", "ttt_steps", "recompute"
    )},
    "gpus": 1,
    "layout": "U1 R1",
    "error": "out of memory",
    "detail": "tried to allocate 40 GiB",
}


def test_a_picture_is_drawn_only_if_there_are_enough_results() -> None:
    for draw, lines in ((length_figure, LENGTHS), (fraction_figure, FRACTIONS), (scaling_figure, SCALING)):
        assert draw(results(*lines, OUT_OF_MEMORY)).startswith(PNG)
        assert draw(results(line(), OUT_OF_MEMORY)) is None
        assert draw([]) is None


def test_tables_and_pictures_are_written(tmp_path: Path) -> None:
    file = tmp_path / "steps.jsonl"
    file.write_text(
        "".join(json.dumps(one) + "\n" for one in [*LENGTHS, *FRACTIONS, *SCALING, OUT_OF_MEMORY])
    )
    written = write_results(read_results([file]), tmp_path / "out")
    assert [path.name for path in written] == ["steps.md", "length.png", "fraction.png", "scaling.png"]


def test_the_table_shows_measurements_next_to_those_of_specforge() -> None:
    store = line(source="store", data_wait_ms=3.0, offload_activations=True)
    packed = line(documents=32, fraction=0.25, gpus=1, layout="U1 R1")
    rows = markdown(results(line(), store, packed, OUT_OF_MEMORY)).splitlines()[2:]
    assert rows[0] == (
        "| 128K, all rows | 4 | U4 | full | 2.40 s | 960 ms / 1.42 s / 24.0 ms | 13,653 | 18.5 GiB "
        "| 2.16 s | 1.11 | 50.0% | 4.76 s, 81.6 GiB (U4) |"
    )
    assert "| 128K, all rows (from store, waits 3.0 ms) | 4 | U4 | full, offload |" in rows[1]
    assert rows[2].startswith("| 32 x 4K packed, 25% in turns of 512 | 1 |") and rows[2].endswith("|  |")
    assert "| out of memory |" in rows[3] and rows[3].endswith("| out of memory |")  # ours, and SpecForge's


def test_ranks_that_shared_a_gpu_show_their_memory_but_no_times() -> None:
    shared = [one | {"shared_gpu": True} for one in SCALING]
    assert scaling_figure(results(*shared)) is None and scaling_figure(
        results(*SCALING[:3], *shared[3:])
    ).startswith(PNG)
    assert length_figure(results(*LENGTHS[:1], *(one | {"shared_gpu": True} for one in LENGTHS[1:]))) is None
    row = markdown(results(line(shared_gpu=True))).splitlines()[2]
    assert row == "| 128K, all rows | 4 | U4 | full | ranks share a GPU |  |  | 18.5 GiB |  |  |  |  |"


def test_one_rank_alone_is_labelled_and_left_out_of_scaling() -> None:
    alone = [one | {"alone_of": one["gpus"], "alone_rank": 0} for one in SCALING]
    assert scaling_figure(results(SCALING[0], *alone[1:])) is None
    assert length_figure(
        results(*(one | {"alone_of": 4, "alone_rank": 0} for one in LENGTHS))
    ).startswith(PNG)
    table = markdown(results(alone[3]))
    assert "| 4 | U4, one rank alone | full | 2.40 s |" in table and "without communication" in table
    assert "4.76 s" not in table  # SpecForge's step
    assert "without communication" not in markdown(results(line()))


def test_scaling_compares_equal_settings_only() -> None:
    assert scaling_figure(results(SCALING[0], SCALING[1] | {"recompute": "selective"})) is None


def test_the_memory_of_a_rank_is_compared_with_its_share() -> None:
    def on(gpus: int, layout: str, kept: float, **changes: Any) -> dict[str, Any]:
        return line(gpus=gpus, layout=layout, peak_gib=9.0 + kept, resident_gib=7.0, kept_gib=kept, **changes)

    lines = [
        on(4, "U4 R1", 2.1, shared_gpu=True), on(1, "U1 R1", 7.0), on(1, "U1 R1", 8.0), on(2, "U2 R1", 4.4)
    ]
    others = [on(4, "U2 R1", 4.4), on(4, "U4 R1", 9.0, recompute="none"), line(), OUT_OF_MEMORY]
    # None of these has a row: two sequences at once; no result on one GPU; no memory figures; no memory.
    rows = memory_markdown(results(*lines, *others)).splitlines()[2:5]
    assert rows == [
        "| 128K, all rows | full | 1 | U1R1 | 17.00 | 7.00 | 8.00 | 8.00 | 1.00 | 2.00 |",
        "| 128K, all rows | full | 2 | U2 | 13.40 | 7.00 | 4.40 | 4.00 | 1.10 | 2.00 |",
        "| 128K, all rows | full | 4 | U4 | 11.10 | 7.00 | 2.10 | 2.00 | 1.05 | 2.00 |",
    ]
    assert memory_markdown(results(*others)) is None and memory_markdown(results(*SCALING)) is None


def test_the_step_of_specforge_has_the_same_layout_or_is_its_fastest() -> None:
    assert peer_for(131_072, 4, "U1 R4 p2p").step_ms == 6817
    assert peer_for(131_072, 4, "U8 R1").step_ms == 4760
    assert peer_for(131_072, 2, "U2 R1") is None


def test_the_layout_gives_the_number_of_sequences_at_once() -> None:
    assert [result.data_parallel for result in results(*SCALING)] == [1, 1, 1, 1, 2]


def test_layouts_are_written_as_on_the_pages() -> None:
    lines = ("U4 R1", "U1 R4 gather", "U1 R2 p2p", "U2 R2 gather", "U16 R1, one rank alone", "U1 R1", "")
    assert [layout_label(text) for text in lines] == [
        "U4", "R4 gather", "R2 p2p", "U2R2 gather", "U16, one rank alone", "U1R1", ""
    ]


def test_legends_name_specforge_and_layouts_as_the_pages_do(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(plots, "png", drawn.append)
    one_gpu = [line(gpus=1, layout="U1 R1", fraction=f, step_ms=9500 * f) for f in (0.1, 1.0)]
    length_figure(results(*LENGTHS))
    fraction_figure(results(*FRACTIONS, *one_gpu))
    scaling_figure(results(*SCALING))
    legends = [[text.get_text() for text in figure.legends[0].get_texts()] for figure in drawn]
    assert legends[0] == [
        "4 GPUs, U4", "SpecForge, 4 GPUs, U4", "SpecForge, 4 GPUs, U2R2", "SpecForge, 4 GPUs, R4"
    ]
    assert legends[1] == ["4 GPUs, U4", "1 GPU, U1R1", "SpecForge, 128K, U4"]
    marks = [text.get_text() for text in drawn[2].axes[1].texts]
    assert marks == ["99% R2 gather", "99% U4"]


def test_numbers_are_formatted_briefly() -> None:
    assert [short(n) for n in (4096, 131_072, 1 << 20, 1000)] == ["4K", "128K", "1M", "1000"]
    assert [milliseconds(ms) for ms in (3.14159, 333.3, 1510.0, 10_910.0)] == [
        "3.1 ms", "333 ms", "1.51 s", "10.91 s"
    ]


@pytest.mark.parametrize("text", ["nonsense", "{}", "[]", '{"model": "llama3_8b", "gpus": 4}', ""])
def test_a_file_without_results_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "steps.jsonl"
    file.write_text(text and text + "\n")
    with pytest.raises(ValueError, match="give files written by"):
        read_results([file])


def test_the_tool_draws_without_a_gpu(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(one) + "\n" for one in SCALING[:2]))
    (tmp_path / "b.jsonl").write_text(json.dumps(SCALING[3]) + "\n")

    def plot(*files: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "tools/bench_step.py"), "--plot", *files, "--out", "pictures"]
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )

    done = plot("a.jsonl", "b.jsonl")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["scaling.png", "steps.md"]
    refused = plot("c.jsonl")
    assert refused.returncode == 1 and refused.stderr.startswith("error: ")
