"""tools/serve_draft.py with engines that are small Python programs: checks, start, health, signals, death."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from eagle_ds.drafts.export import ExportSettings, export_draft
from eagle_ds.evaluation.engine import without_speculation
from eagle_ds.store.manifest import StoreInfo, write_store_info
from eagle_ds.target.identity import tokenizer_hash
from eagle_ds.target.info import TargetInfo
from tests.draft_cases import LAYERS, PLAIN, random_draft, recipe_for, write_run
from tests.tiny_targets import save_tiny_llama
from tools import export_draft as export_tool
from tools import serve_draft

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "serve_draft.py"
# An engine: it writes its arguments into its log, answers /health after a while, and has a child process.
SERVER = """
import http.server, os, subprocess, sys, time
print("arguments", sys.argv[1:], flush=True)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
if "--die" in sys.argv:
    print("loading weights\\nRuntimeError: the weights do not fit", flush=True)
    sys.exit(7)
time.sleep(0.5)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("target"))


@pytest.fixture
def run_dir(tmp_path: Path, target: Path) -> Path:
    """Make a run with its draft exported, and the store.json that it was trained on."""
    recipe = recipe_for(PLAIN, tmp_path, str(target))
    draft = random_draft()
    write_run(tmp_path, draft, recipe)
    settings = ExportSettings(str(target), LAYERS, TargetInfo.from_folder(target))
    export_draft(draft, tmp_path / "run" / "draft", settings)
    (tmp_path / "store").mkdir()
    info = StoreInfo("target", "hash", tokenizer_hash(target), 32, LAYERS, 280)
    write_store_info(tmp_path / "store", info)
    return tmp_path / "run"


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Install a program as an engine, as far as importlib.metadata and python -m can tell."""

    def install(version: str) -> None:
        site = tmp_path / "site"
        shutil.rmtree(site, ignore_errors=True)
        (site / "sglang").mkdir(parents=True)
        (site / "sglang" / "launch_server.py").write_text(SERVER)
        facts = site / f"sglang-{version}.dist-info"
        facts.mkdir()
        (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sglang\nVersion: {version}\n")
        monkeypatch.setenv("PYTHONPATH", f"{site}{os.pathsep}{ROOT}")

    install("0.5.17")
    return install


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, engine: object) -> Callable[..., int]:
    """Run the tool in this process and return its exit code."""

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["serve_draft", *map(str, arguments)])
        return serve_draft.main()

    return run


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def served(*arguments: object) -> Iterator[subprocess.Popen]:
    """Run the tool as a process of its own."""
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def read_until(process: subprocess.Popen, text: str) -> str:
    """Read the tool's output up to the line with ``text``."""
    said = ""
    for line in process.stdout:
        said += line
        if text in line:
            return said
    raise AssertionError(f"{text!r} was not printed:\n{said}")


def child_of(log: Path) -> int:
    return int(next(line.split()[1] for line in log.read_text().splitlines() if line.startswith("child")))


def is_running(pid: int) -> bool:
    """Whether a process runs. A zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def assert_gone(pid: int) -> None:
    for _ in range(300):
        if not is_running(pid):
            return
        time.sleep(0.1)
    raise AssertionError(f"process {pid} still runs")


# -- serving -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_server_and_all_of_its_processes(
    run_dir: Path, engine: object, number: int, code: int
) -> None:
    port = free_port()
    with served(run_dir, "--port", port, "--", "--tp", "4") as process:
        said = read_until(process, "ready after")
        assert f"http://127.0.0.1:{port}" in said
        assert urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
        log = run_dir / f"serve_{port}.log"
        child = child_of(log)
        assert is_running(child)
        process.send_signal(number)
        assert "stopped" in process.stdout.read()
        assert process.wait(60) == code
    assert_gone(child)
    # The engine was started with the arguments that were printed.
    given = log.read_text().splitlines()[0].removeprefix("arguments ")
    assert given == str([
        "--model-path", json.loads((run_dir / "recipe.json").read_text())["target"]["model"],
        "--dtype", "bfloat16", "--speculative-algorithm", "EAGLE3",
        "--speculative-draft-model-path", str(run_dir / "draft"), "--speculative-num-steps", "3",
        "--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", "4",
        "--host", "127.0.0.1", "--port", str(port), "--tp", "4",
    ])  # fmt: skip
    printed = said.replace("\\\n", " ").split()
    end = printed.index("--tp") + 2
    assert str(printed[printed.index("--model-path") : end]) == given


def test_a_server_that_dies_shows_its_last_lines_and_leaves_no_process(
    run_dir: Path, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    assert call(run_dir, "--port", port, "--", "--die") == 1
    said = capsys.readouterr().err
    assert "error: the server ended with exit code 7; the last lines of" in said
    assert "RuntimeError: the weights do not fit" in said
    assert_gone(child_of(run_dir / f"serve_{port}.log"))


def test_a_server_that_does_not_answer_in_time_is_ended(
    run_dir: Path, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    assert call(run_dir, "--port", port, "--wait", "0") == 1
    assert "was not ready after 0 s" in capsys.readouterr().err
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)


def test_print_shows_both_commands_and_starts_nothing(
    run_dir: Path, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(run_dir.iterdir())
    assert call(run_dir, "--print", "--num-steps", 5, "--port", 30123, "--", "--tp", "2") == 0
    sglang, vllm = capsys.readouterr().out.split("vllm:\n")
    assert "--speculative-num-draft-tokens 6" in sglang and "--port 30123" in sglang and "--tp 2" in sglang
    assert "'{\"method\": \"eagle3\"" in vllm and "--port 8000" in vllm and "--tp" not in vllm
    assert sorted(run_dir.iterdir()) == before


def test_the_target_alone_is_served_with_the_same_flags() -> None:
    flags = ["python", "-m", "sglang.launch_server", "--model-path", "t", "--speculative-num-steps", "3"]
    assert without_speculation([*flags, "--context-length", "9"]) == [*flags[:5], "--context-length", "9"]
    vllm = ["vllm", "serve", "t", "--dtype", "bfloat16", "--speculative-config", "{}"]
    assert without_speculation(vllm) == vllm[:5]


# -- refusals ------------------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    return last


def test_a_port_in_use_is_refused(run_dir: Path, call: Callable[..., int], capsys) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert call(run_dir, "--port", port) == 1
    assert f"nothing can listen on 127.0.0.1:{port} (Address already in use)" in refused(capsys)
    assert not list(run_dir.glob("serve_*"))


@pytest.mark.parametrize("port", [0, 99999])
def test_a_port_out_of_range_is_refused(run_dir: Path, call: Callable[..., int], capsys, port: int) -> None:
    assert call(run_dir, "--port", port) == 1
    assert f"--port {port} is out of range; give 1 to 65535" in refused(capsys)


def test_a_flag_of_the_engine_without_the_dashes_says_where_it_belongs(
    run_dir: Path, call: Callable[..., int], capsys
) -> None:
    with pytest.raises(SystemExit):
        call(run_dir, "--print", "--tp", 4)
    assert "unrecognized arguments: --tp 4; write flags of the engine after --" in capsys.readouterr().err


def test_an_untested_version_is_refused_and_the_tested_ones_are_named(
    run_dir: Path, call: Callable[..., int], engine: Callable[[str], None], capsys
) -> None:
    engine("0.4.1")
    assert call(run_dir, "--port", free_port()) == 1
    assert "sglang 0.4.1 was not tested; tested were 0.5.17, 0.5.20, 0.5.23" in refused(capsys)
    assert call(run_dir, "--port", free_port(), "--any-version", "--", "--die") == 1
    assert "sglang 0.4.1, log in" in capsys.readouterr().out


def test_an_engine_that_is_not_installed_is_refused(run_dir: Path, call: Callable[..., int], capsys) -> None:
    assert call(run_dir, "--engine", "vllm", "--port", free_port()) == 1
    said = refused(capsys)
    assert "vllm is not installed" in said and "--python of its environment" in said
    assert call(run_dir, "--python", run_dir / "no-python") == 1
    assert "cannot be run" in refused(capsys)


def test_a_run_without_an_export_says_how_to_make_one(
    run_dir: Path, call: Callable[..., int], capsys
) -> None:
    shutil.rmtree(run_dir / "draft")
    assert call(run_dir) == 1
    assert f"has no exported draft; run tools/export_draft.py {run_dir} first" in refused(capsys)


def test_a_target_of_another_vocabulary_is_refused(
    run_dir: Path, call: Callable[..., int], tmp_path: Path, capsys
) -> None:
    other = save_tiny_llama(tmp_path / "other", vocab_size=300)
    assert call(run_dir, "--target", other) == 1
    assert "made for a target with vocab_size 280" in refused(capsys)


def test_a_target_of_another_tokenizer_is_refused(
    run_dir: Path, call: Callable[..., int], tmp_path: Path, capsys
) -> None:
    other = save_tiny_llama(tmp_path / "other", kind="plain")
    assert call(run_dir, "--target", other) == 1
    assert "the tokenizer or chat template of" in refused(capsys)


def test_an_export_names_its_tokenizer_wherever_it_lies(
    run_dir: Path, call: Callable[..., int], tmp_path: Path, target: Path, capsys, monkeypatch
) -> None:
    moved = tmp_path / "elsewhere" / "deep" / "draft"
    monkeypatch.setattr(sys, "argv", ["export_draft", str(run_dir), "--out", str(moved)])
    assert export_tool.main() == 0
    other = save_tiny_llama(tmp_path / "other", kind="plain")
    assert call(moved, "--print", "--target", other) == 1
    assert "has another tokenizer or chat template than the target of" in refused(capsys)
    assert call(moved, "--print", "--target", target) == 0


@pytest.mark.parametrize(
    ("ids", "message"),
    [([1, 2, 9], "ascending layer outputs within 0..7"), ([1, 2, 4], "but its run was trained on [1, 2, 5]")],
)
def test_wrong_layer_ids_are_refused(
    run_dir: Path, call: Callable[..., int], capsys, ids: list[int], message: str
) -> None:
    path = run_dir / "draft" / "config.json"
    config = json.loads(path.read_text())
    config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] = ids
    path.write_text(json.dumps(config))
    assert call(run_dir) == 1
    assert message in refused(capsys)


def test_a_draft_outside_a_run_needs_its_target(
    run_dir: Path, call: Callable[..., int], tmp_path: Path, target: Path, capsys
) -> None:
    moved = tmp_path / "elsewhere" / "deep" / "draft"
    shutil.copytree(run_dir / "draft", moved)
    assert call(moved, "--print") == 1
    assert "give --target" in refused(capsys)
    assert call(moved, "--print", "--target", target) == 0


def test_a_draft_in_vllms_form_is_not_given_to_sglang(
    run_dir: Path, call: Callable[..., int], capsys
) -> None:
    path = run_dir / "draft" / "config.json"
    config = json.loads(path.read_text()) | {"architectures": ["Eagle3LlamaForCausalLM"]}
    path.write_text(json.dumps(config))
    assert call(run_dir) == 1
    assert "serve it with --engine vllm" in refused(capsys)
    assert call(run_dir, "--engine", "vllm", "--print") == 0
    assert "sglang: " in capsys.readouterr().out


def test_an_export_older_than_the_best_checkpoint_is_named(
    run_dir: Path, call: Callable[..., int], capsys
) -> None:
    assert call(run_dir, "--print") == 0
    assert "warning" not in capsys.readouterr().err
    later = (run_dir / "draft" / "config.json").stat().st_mtime + 60
    os.utime(run_dir / "best" / "draft_state.safetensors", (later, later))
    assert call(run_dir, "--print") == 0
    assert "is newer than the export" in capsys.readouterr().err


def test_serving_beyond_the_trained_length_is_noted(
    run_dir: Path, call: Callable[..., int], target: Path, capsys
) -> None:
    short = random_draft(type(PLAIN)(**PLAIN.__dict__ | {"trained_length": 512}))
    settings = ExportSettings(str(target), LAYERS, TargetInfo.from_folder(target))
    export_draft(short, run_dir / "draft", settings)
    assert call(run_dir, "--print") == 0
    assert "was trained on up to 512 tokens and is served up to" in capsys.readouterr().err
    assert call(run_dir, "--print", "--plain") == 0
    assert "note" not in capsys.readouterr().err  # the draft is not served
