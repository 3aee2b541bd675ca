"""The JSON lines of tools/bench_step.py, read back: typed, grouped, and as a table."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eagle_ds.bench.peer import OUT_OF_MEMORY_FROM, PEER_MODEL, PEER_TTT_STEPS, PeerStep, peer_for

HEADINGS = (
    *("shape", "GPUs", "layout", "recompute", "step", "forward / backward / optimizer", "tokens/s/GPU", "peak memory"),
    *("floor", "ratio", "MFU", "the peer"),
)


@dataclass(frozen=True)
class Result:
    """One measured step, or one that ran out of memory (``step_ms`` None).

    Where ranks shared a GPU only ``peak_gib`` means anything: ``is_timed`` is what tables and pictures of time go by.
    """

    model: str
    gpus: int
    tokens: int  # of the whole sequence
    documents: int
    fraction: float
    turn: int
    layout: str  # "U2 R2 gather", "U4 R1, one rank alone"
    ttt_steps: int
    settings: str  # what costs time to save memory: "recompute full, offload"
    source: str  # "memory" or "store"
    step_ms: float | None
    phases_ms: tuple[float, float, float] = (0.0, 0.0, 0.0)  # forward, backward, optimizer
    data_wait_ms: float = 0.0
    tokens_per_s: float = 0.0  # a GPU
    peak_gib: float = 0.0
    resident_gib: float = 0.0  # of it, what lies there between steps
    kept_gib: float = 0.0  # of it, what a forward leaves for the backward: what sequence parallelism shards
    floor_ms: float | None = None
    mfu: float | None = None
    shared_gpu: bool = False
    alone: bool = False  # one rank of ``gpus`` in a single process, without communication

    @classmethod
    def from_line(cls, line: Mapping[str, Any]) -> Result:
        """Raises KeyError for a line that is none of ours."""
        documents = line.get("documents", 1)
        settings = f"recompute {line.get('recompute', '?')}" + (", offload" if line.get("offload_activations") else "")
        shape = cls(
            model=line["model"],
            gpus=line["gpus"],
            tokens=line["tokens"],
            documents=documents,
            fraction=line["fraction"],
            turn=line["turn"],
            layout=line.get("layout", "") + (", one rank alone" if "alone_of" in line else ""),
            ttt_steps=line.get("ttt_steps", PEER_TTT_STEPS),
            settings=settings,
            source=line.get("source", "memory"),
            step_ms=None,
            shared_gpu=line.get("shared_gpu", False),
            alone="alone_of" in line,
        )
        if "error" in line:
            return shape
        measured = {
            "step_ms": line["step_ms"],
            "phases_ms": (line["forward_ms"], line["backward_ms"], line["optimizer_ms"]),
            "data_wait_ms": line.get("data_wait_ms", 0.0),
            "tokens_per_s": line["tokens_per_s_per_gpu"],
            "peak_gib": line["peak_gib"],
            "resident_gib": line.get("resident_gib", 0.0),
            "kept_gib": line.get("kept_gib", 0.0),
            "floor_ms": line.get("floor_ms"),
            "mfu": line.get("mfu"),
        }
        return cls(**{**shape.__dict__, **measured})

    @property
    def is_timed(self) -> bool:
        """Whether its times are those of hardware at work."""
        return self.step_ms is not None and not self.shared_gpu

    @property
    def data_parallel(self) -> int:
        """Sequences trained at once."""
        ulysses, ring = (int(degree) for degree in re.findall(r"\d+", self.layout)[:2]) if self.layout else (self.gpus, 1)
        return self.gpus // (ulysses * ring)

    @property
    def rows(self) -> str:
        """Which rows are trained, in words."""
        return "all rows" if self.fraction >= 1 else f"{100 * self.fraction:g}% in turns of {self.turn}"

    @property
    def shape(self) -> str:
        """Length and trained rows, in words."""
        each = short(self.tokens // self.documents)
        return f"{each if self.documents == 1 else f'{self.documents} x {each} packed'}, {self.rows}"

    @property
    def peer(self) -> PeerStep | None:
        """The peer's step of the same length on as many GPUs."""
        if self.alone or (self.model, self.ttt_steps, self.documents, self.data_parallel) != (PEER_MODEL, PEER_TTT_STEPS, 1, 1):
            return None
        return peer_for(self.tokens, self.gpus, self.layout)


def read_results(paths: Iterable[Path]) -> list[Result]:
    """Every line of the files. Raises ValueError for one that is no result of tools/bench_step.py."""
    results = []
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path} does not exist; give files written by tools/bench_step.py --json")
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                results.append(Result.from_line(json.loads(text)))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                found = f"{path}, line {number} is no result of tools/bench_step.py ({error!r})"
                raise ValueError(f"{found}; give files written by its --json") from error
    if not results:
        raise ValueError("the files hold no result; give files written by tools/bench_step.py --json")
    return results


def markdown(results: Sequence[Result]) -> str:
    """A table, a row a result."""
    rows = [HEADINGS, ["---"] * len(HEADINGS), *map(_row, results)]
    note = "\nOne rank alone: the work of one rank of so many, done in a single process, without communication.\n"
    return "".join(f"| {' | '.join(row)} |\n" for row in rows) + (note if any(result.alone for result in results) else "")


def _row(result: Result) -> Sequence[str]:
    waits = f" (from store, waits {milliseconds(result.data_wait_ms)})" if result.source == "store" else ""
    start = [result.shape + waits, str(result.gpus), result.layout, result.settings.removeprefix("recompute ")]
    if result.step_ms is None:
        return [*start, "out of memory", "", "", "", "", "", "", _peer(result)]
    if result.shared_gpu:
        return [*start, "ranks share a GPU", "", "", f"{result.peak_gib:.1f} GiB", "", "", "", ""]
    return [
        *start,
        milliseconds(result.step_ms),
        " / ".join(milliseconds(phase) for phase in result.phases_ms),
        f"{result.tokens_per_s:,.0f}",
        f"{result.peak_gib:.1f} GiB",
        milliseconds(result.floor_ms) if result.floor_ms else "",
        f"{result.step_ms / result.floor_ms:.2f}" if result.floor_ms else "",
        f"{100 * result.mfu:.1f}%" if result.mfu else "",
        _peer(result),
    ]


def _peer(result: Result) -> str:
    if result.peer:
        return f"{milliseconds(result.peer.step_ms)}, {result.peer.peak_gib:g} GiB ({result.peer.layout})"
    alone = (result.model, result.gpus, result.documents) == (PEER_MODEL, 1, 1)
    return "out of memory" if alone and result.tokens > OUT_OF_MEMORY_FROM else ""


def milliseconds(value: float) -> str:
    """With its unit, in three or four digits."""
    if value >= 1000:
        return f"{value / 1000:.2f} s"
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms"


def short(tokens: int) -> str:
    """4K, 128K, 1M; other lengths as they are."""
    for unit, name in ((1 << 20, "M"), (1 << 10, "K")):
        if tokens >= unit and tokens % unit == 0:
            return f"{tokens // unit}{name}"
    return str(tokens)
