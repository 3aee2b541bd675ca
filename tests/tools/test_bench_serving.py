"""tools/bench_serving.py against servers of known behaviour: files, table, comparison, and refusals."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.evaluation.fake_servers import FakeServer, serving
from tests.tiny_targets import save_tiny_llama
from tools import bench_serving

Call = Callable[..., int]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("target"))


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    turns = [
        [{"role": "user", "content": "why? " * (i + 1)}, {"role": "assistant", "content": "yes"}]
        for i in range(6)
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"id": f"c{i}", "messages": t}) + "\n" for i, t in enumerate(turns)))
    return path


@pytest.fixture
def servers(target: Path) -> Iterator[tuple[FakeServer, FakeServer]]:
    """With speculation and without."""
    drafted, plain = FakeServer(model=str(target)), FakeServer(model=str(target), drafts=0)
    with serving(drafted), serving(plain):
        yield drafted, plain


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, chats: Path, tmp_path: Path) -> Call:
    """Run the tool with few prompts and return its exit code."""
    few = ("--prompts", chats, "--num-prompts", 6, "--max-new-tokens", 19, "--concurrency", "1,4")

    def run(*arguments: object) -> int:
        given = ["bench_serving", *few, "--out", tmp_path / "out", *arguments]
        monkeypatch.setattr(sys, "argv", [str(argument) for argument in given])
        return bench_serving.main()

    return run


def result(tmp_path: Path, name: str = "out") -> dict:
    return json.loads((tmp_path / name / "serving.json").read_text())


def test_a_server_is_measured_with_and_without_speculation(
    servers: tuple[FakeServer, FakeServer], call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drafted, plain = servers
    assert call("--url", drafted.url, "--baseline-url", plain.url, "--check-greedy") == 0
    found = result(tmp_path)
    assert [level["concurrency"] for level in found["levels"]] == [1, 4]
    assert [level["concurrency"] for level in found["baseline_levels"]] == [1, 4]
    assert found["server"]["num_draft_tokens"] == 3 and found["baseline"]["num_draft_tokens"] == 0
    assert found["greedy"] == []
    assert (tmp_path / "out" / "serving.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "sglang 0.5.17 at http" in printed and "3 draft tokens per pass" in printed
    assert "0 of 6 answers differ" in printed
    row = next(line for line in printed.splitlines() if line.startswith("4 at once  "))
    # Speculation makes 8 passes where plain decoding makes 19.
    assert row.split()[4:8] == ["2.571", "100", "29", "100"]
    assert float(row.split("x")[0].split()[-1]) > 1
    assert any(line.startswith("  context 0-256") for line in printed.splitlines())


def test_one_server_after_the_other_gives_the_same_comparison(
    servers: tuple[FakeServer, FakeServer], call: Call, tmp_path: Path
) -> None:
    drafted, plain = servers
    assert call("--url", plain.url, "--out", tmp_path / "plain") == 0
    baseline = tmp_path / "plain" / "serving.json"
    assert call("--url", drafted.url, "--baseline", baseline, "--check-greedy") == 0
    assert result(tmp_path)["baseline_levels"] == result(tmp_path, "plain")["levels"]


def test_a_difference_that_is_no_near_tie_fails_after_everything_is_written(
    servers: tuple[FakeServer, FakeServer], call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drafted, plain = servers
    drafted.other_token_at, drafted.gap = 5, 1.5
    assert call("--url", drafted.url, "--baseline-url", plain.url, "--check-greedy") == 1
    assert "6 of 6 answers differ from those without speculation, 0 at a near tie" in capsys.readouterr().out
    assert len(result(tmp_path)["greedy"]) == 12 and result(tmp_path)["greedy"][0]["gap"] == 1.5
    drafted.gap = 0.1
    assert call("--url", drafted.url, "--baseline-url", plain.url, "--check-greedy") == 0
    assert "6 at a near tie" in capsys.readouterr().out


def acceptance(servers: tuple[FakeServer, FakeServer], tmp_path: Path, call: Call, gained: int) -> Path:
    """Write an acceptance.json of the prompts of an earlier run."""
    assert call("--url", servers[0].url, "--out", tmp_path / "first") == 0
    counts = {"gained": {"draft": gained}, "passes": {"draft": 7}}
    prompts = [one | counts for one in result(tmp_path, "first")["prompts"]]
    tree = {"drafts": [{"name": "draft"}], "num_draft_tokens": 3, "max_new_tokens": 19, "prompts": prompts}
    path = tmp_path / "acceptance.json"
    path.write_text(json.dumps(tree))
    return path


@pytest.mark.parametrize(("gained", "code", "said"), [(18, 0, ": agrees"), (16, 1, ": DIFFERS")])
def test_acceptance_is_compared_with_that_of_eval_acceptance(
    servers: tuple[FakeServer, FakeServer], call: Call, tmp_path: Path, gained: int, code: int, said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = acceptance(servers, tmp_path, call, gained)
    assert call("--url", servers[0].url, "--compare", path) == code
    printed = capsys.readouterr().out
    assert "acceptance length on 6 prompts: served 2.571" in printed and said in printed
    assert result(tmp_path)["agreement"]["agrees"] == (code == 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--concurrency", "0,4"], "--concurrency 0,4 is no list of numbers"),
        (["--concurrency", "7"], "--concurrency 7 needs as many prompts"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0 is out of range; give 1 or more"),
        (["--max-new-tokens", "5000"], "a context of 4096; lower --max-new-tokens"),
        (["--num-prompts", "0"], "--num-prompts 0 is out of range"),
        (["--baseline-url", "{url}"], "uses speculation; serve the target alone there"),
        (["--target", "{tmp}/other"], "has another tokenizer or chat template than"),
        (["--url", "localhost:30000"], "write it with http://"),
        (["--max-new-tokens", "4090"], "prompt c0 has "),
        (["--check-greedy"], "needs answers without speculation"),
        (["--baseline", "{tmp}/none.json"], "cannot read"),
        (["--baseline", "{tmp}/odd.json"], "odd.json is no serving.json"),
        (["--compare", "{tmp}/odd.json"], "has no drafts"),
        (["--target", "{tmp}"], "has no config.json"),
        (["--prompts", "{tmp}/none.jsonl"], "does not exist"),
        (["--url", "http://127.0.0.1:9"], "cannot be reached"),
        (["--out", "{tmp}/odd.json"], "is a file, where a folder was expected"),
    ],
)
def test_bad_input_is_refused_before_a_prompt_is_sent(
    arguments: list[str], message: str, servers: tuple[FakeServer, FakeServer], call: Call, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "odd.json").write_text("{}")
    if arguments[-1] == "{tmp}/other":
        save_tiny_llama(tmp_path / "other", kind="plain")
    given = [one.format(tmp=tmp_path, url=servers[0].url) for one in arguments]
    assert call("--url", servers[0].url, *given) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ") and message in said
    assert not servers[0].requests and not (tmp_path / "out").exists()


def test_a_baseline_that_used_speculation_or_other_prompts_is_refused(
    servers: tuple[FakeServer, FakeServer], call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drafted, plain = servers
    assert call("--url", drafted.url, "--out", tmp_path / "drafted") == 0
    assert call("--url", plain.url, "--baseline", tmp_path / "drafted" / "serving.json") == 1
    assert "was measured with speculation" in capsys.readouterr().err
    few = ("--concurrency", "1", "--num-prompts", 5, "--out", tmp_path / "plain")
    assert call("--url", plain.url, *few) == 0
    few = tmp_path / "plain" / "serving.json"
    assert call("--url", drafted.url, "--baseline", few) == 1
    assert "was not measured at concurrency 4" in capsys.readouterr().err
    assert call("--url", drafted.url, "--baseline", few, "--concurrency", "1") == 1
    assert "has other prompts" in capsys.readouterr().err


def test_a_server_that_dies_leaves_the_finished_levels_on_disk(
    servers: tuple[FakeServer, FakeServer], call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    servers[0].fail_after = 9  # level 1: one request to warm up, then six
    assert call("--url", servers[0].url) == 1
    assert "answered 500" in capsys.readouterr().err
    assert [level["concurrency"] for level in result(tmp_path)["levels"]] == [1]
