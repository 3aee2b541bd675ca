"""compare_runs.py finds the largest differences, and refuses runs over other data."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from eagle_ds.reporting.compare import Curve, compare, read_all, write

ROOT = Path(__file__).resolve().parents[2]
STEPS = 20


def run_folder(root: Path, name: str, losses: list[float], **fields: Any) -> Path:
    folder = root / name
    folder.mkdir()
    lines = [
        {"step": n, "loss": loss, "epoch": 0, "tokens": 900 + n, "trained_rows": 70 + n} | fields for n,
        loss in enumerate(losses, 1)
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def falling() -> list[float]:
    return [10.0 - 0.1 * n for n in range(STEPS)]


def test_the_largest_differences_and_their_steps_are_found(tmp_path: Path, falling: list[float]) -> None:
    other = list(falling)
    other[3] += 0.02
    other[19] -= 0.019  # smaller, but relative to a smaller loss
    paths = [
        run_folder(tmp_path, "a", falling), run_folder(tmp_path, "b", other),
        run_folder(tmp_path, "c", falling)
    ]
    a, b, c = compare(read_all(paths))
    assert (b.largest_absolute.step, b.largest_relative.step) == (4, 20)
    assert b.largest_absolute.value == pytest.approx(0.02)
    assert b.largest_relative.value == pytest.approx(0.019 / falling[19])
    assert a.largest_relative.value == c.largest_absolute.value == 0
    written = write([a, b, c], tmp_path / "out")
    document = json.loads(written[0].read_text())
    assert document["reference"] == "a" and document["steps"] == list(range(1, STEPS + 1))
    assert document["runs"][1]["loss"] == other and document["runs"][1]["largest_relative"]["step"] == 20
    assert written[1].read_bytes().startswith(b"\x89PNG")


def test_equal_runs_can_be_drawn(tmp_path: Path, falling: list[float]) -> None:
    paths = [run_folder(tmp_path, name, falling) for name in "ab"]
    assert write(compare(read_all(paths)), tmp_path)[1].read_bytes().startswith(b"\x89PNG")
    assert len(write(compare(read_all(paths[:1])), tmp_path)) == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"trained_rows": 5}, "other data than a at step 1: its trained_rows is 5 instead of 71"),
        ({"tokens": 5}, "tokens is 5"),
        ({"epoch": 1}, "epoch is 1"),
        ({"data_hash": "y"}, "data_hash is y instead of x"),
    ],
)
def test_runs_over_other_data_are_refused(
    tmp_path: Path, falling: list[float], fields: dict[str, Any], message: str
) -> None:
    paths = [run_folder(tmp_path, "a", falling, data_hash="x"), run_folder(tmp_path, "b", falling, **fields)]
    with pytest.raises(ValueError, match=message):
        compare(read_all(paths))


def test_runs_of_different_length_are_refused(tmp_path: Path, falling: list[float]) -> None:
    paths = [run_folder(tmp_path, "a", falling), run_folder(tmp_path, "b", falling[:-3])]
    with pytest.raises(
        ValueError,
        match=r"b has 17 logged steps up to 17, a has 20 up to 20 \(step 18 is in only one of them\)"
    ):
        compare(read_all(paths))


def test_runs_that_cannot_be_read_are_refused(tmp_path: Path, falling: list[float]) -> None:
    good = run_folder(tmp_path, "good", falling)
    (tmp_path / "empty").mkdir()
    for name, said in (("absent", "does not exist"), ("empty", "holds no steps")):
        with pytest.raises(ValueError, match=said):
            read_all([good, tmp_path / name])
    with pytest.raises(ValueError, match="the loss of step 1 is nan"):
        Curve.read(run_folder(tmp_path, "bad", [float("nan")]))
    with pytest.raises(ValueError, match="tell them apart with --labels"):
        read_all([good, good])
    with pytest.raises(ValueError, match="2 labels for 1 runs"):
        read_all([good], ["x", "y"])


def test_the_tools_exit_code_says_whether_the_runs_agree(
    tmp_path: Path, falling: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [
        run_folder(tmp_path, "a", falling), run_folder(tmp_path, "b", [loss * 1.001 for loss in falling])
    ]
    short = run_folder(tmp_path, "short", falling[:5])
    main = runpy.run_path(str(ROOT / "tools/compare_runs.py"))["main"]

    def tool(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["compare_runs.py", *map(str, arguments)])
        code = main()
        said = capsys.readouterr()
        return code, said.out, said.err

    code, out, err = tool(
        *paths, "--out", tmp_path / "out", "--labels", "float32", "bf16", "--max-relative", "0.002"
    )
    assert code == 0, err
    assert "bf16" in out and "1.00e-03" in out and (tmp_path / "out/compare.png").is_file()
    code, _, err = tool(*paths, "--max-relative", "0.0005")
    assert code == 1 and "b differs by 1.00e-03" in err
    code, _, err = tool(paths[0], short)
    assert code == 2 and err.startswith("error: short has 5 logged steps")
    code, _, err = tool(paths[0], "--max-relative", "0.002")
    assert code == 2 and "only one is given" in err
