"""Results of tools/bench_step.py: read its JSON lines, and make tables of time and of memory.

The tables compare each step with that of SpecForge (``PEER``): commit of August 2026, on H200s,
Llama-3.1-8B draft, T = 7. SpecForge's step is forward and backward without the optimizer, and its cost does
not depend on how many rows are trained.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class PeerStep:
    """One measured step of SpecForge."""

    tokens: int
    gpus: int
    layout: str  # as in our result lines, without the ring's mode
    step_ms: float
    peak_gib: float


PEER_MODEL, PEER_TTT_STEPS = "llama3_8b", 7
PEER = (
    PeerStep(32_768, 1, "U1 R1", 2043, 81.6),
    PeerStep(32_768, 4, "U4 R1", 749, 24.5),
    PeerStep(131_072, 4, "U4 R1", 4760, 81.6),
    PeerStep(131_072, 4, "U2 R2", 6180, 81.3),
    PeerStep(131_072, 4, "U1 R4", 6817, 81.4),
)
OUT_OF_MEMORY_FROM = 52_000  # tokens beyond which SpecForge runs out of memory on one GPU


def peer_for(tokens: int, gpus: int, layout: str) -> PeerStep | None:
    """Return SpecForge's step of this length on this many GPUs, in the same layout if measured, or its
    fastest.
    """
    found = [step for step in PEER if (step.tokens, step.gpus) == (tokens, gpus)]
    same = [step for step in found if layout.startswith(step.layout)]
    return (same or sorted(found, key=lambda step: step.step_ms) or [None])[0]


def layout_label(layout: str) -> str:
    """Write the layout of a result line as the pages do: "U4 R1" as U4, "U1 R4 p2p" as R4 p2p, and "U2 R2
    gather" as U2R2 gather. A degree of 1 is left out, except in U1R1.
    """
    found = re.match(r"(U\d+) (R\d+)", layout)
    if found is None:
        return layout
    degrees = [degree for degree in found.groups() if degree not in ("U1", "R1")]
    return "".join(degrees or found.groups()) + layout[found.end():]


HEADINGS = (
    *("shape", "GPUs", "layout", "recompute", "step", "forward / backward / optimizer"),
    *("tokens/s/GPU", "peak memory", "floor", "ratio", "MFU", "SpecForge"),
)


@dataclass(frozen=True)
class Result:
    """One measured step, or one that ran out of memory (``step_ms`` is None).

    If ranks shared a GPU, only ``peak_gib`` is meaningful. Tables and pictures of time use ``is_timed``.
    """

    model: str
    gpus: int
    tokens: int  # of the whole sequence
    documents: int
    fraction: float
    turn: int
    layout: str  # "U2 R2 gather", "U4 R1, one rank alone"
    ttt_steps: int
    settings: str  # what trades time for memory: "recompute full, offload"
    source: str  # "memory" or "store"
    step_ms: float | None
    phases_ms: tuple[float, float, float] = (0.0, 0.0, 0.0)  # forward, backward, optimizer
    data_wait_ms: float = 0.0
    tokens_per_s: float = 0.0  # per GPU
    peak_gib: float = 0.0
    resident_gib: float = 0.0  # part of the peak that is held between steps
    # part of the peak that the forward keeps for the backward; divided by sequence parallelism
    kept_gib: float = 0.0
    floor_ms: float | None = None
    mfu: float | None = None
    shared_gpu: bool = False
    alone: bool = False  # one rank of ``gpus`` ran in a single process, without communication

    @classmethod
    def from_line(cls, line: Mapping[str, Any]) -> Result:
        """Convert one JSON line of the tool. Raises KeyError if a value is missing."""
        documents = line.get("documents", 1)
        settings = f"recompute {line.get('recompute', '?')}"
        settings += ", offload" if line.get("offload_activations") else ""
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
        """Whether the times are those of real hardware."""
        return self.step_ms is not None and not self.shared_gpu

    @property
    def data_parallel(self) -> int:
        """Number of sequences trained at the same time."""
        if not self.layout:
            return 1
        ulysses, ring = (int(degree) for degree in re.findall(r"\d+", self.layout)[:2])
        return self.gpus // (ulysses * ring)

    @property
    def rows(self) -> str:
        """Which rows are trained, for tables and labels."""
        return "all rows" if self.fraction >= 1 else f"{100 * self.fraction:g}% in turns of {self.turn}"

    @property
    def shape(self) -> str:
        """Length and trained rows, for tables and labels."""
        each = short(self.tokens // self.documents)
        return f"{each if self.documents == 1 else f'{self.documents} x {each} packed'}, {self.rows}"

    @property
    def peer(self) -> PeerStep | None:
        """SpecForge's step of the same length on the same number of GPUs, if there is one."""
        ours = self.model, self.ttt_steps, self.documents, self.data_parallel
        if self.alone or ours != (PEER_MODEL, PEER_TTT_STEPS, 1, 1):
            return None
        return peer_for(self.tokens, self.gpus, self.layout)


def read_results(paths: Iterable[Path]) -> list[Result]:
    """Read every line of the files. Raises ValueError for a line that tools/bench_step.py did not write."""
    results = []
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path} does not exist; give files written by tools/bench_step.py --json")
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                results.append(Result.from_line(json.loads(text)))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                found = f"{path}, line {number} is not a result of tools/bench_step.py ({error!r})"
                raise ValueError(f"{found}; give files written by its --json") from error
    if not results:
        raise ValueError("the files hold no results; give files written by tools/bench_step.py --json")
    return results


def markdown(results: Sequence[Result]) -> str:
    """Return a Markdown table with one row per result."""
    rows = [HEADINGS, ["---"] * len(HEADINGS), *map(_row, results)]
    note = "\nOne rank alone: one process does the work of one of these ranks, without communication.\n"
    return _table(rows) + (note if any(result.alone for result in results) else "")


def _row(result: Result) -> Sequence[str]:
    waits = f" (from store, waits {milliseconds(result.data_wait_ms)})" if result.source == "store" else ""
    start = [
        result.shape + waits, str(result.gpus), layout_label(result.layout),
        result.settings.removeprefix("recompute "),
    ]
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
        peer = result.peer
        return f"{milliseconds(peer.step_ms)}, {peer.peak_gib:g} GiB ({layout_label(peer.layout)})"
    alone = (result.model, result.gpus, result.documents) == (PEER_MODEL, 1, 1)
    return "out of memory" if alone and result.tokens > OUT_OF_MEMORY_FROM else ""


def milliseconds(value: float) -> str:
    """Format with a unit, in three or four digits."""
    if value >= 1000:
        return f"{value / 1000:.2f} s"
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms"


def short(tokens: int) -> str:
    """Format as 4K, 128K or 1M; other lengths unchanged."""
    for unit, name in ((1 << 20, "M"), (1 << 10, "K")):
        if tokens >= unit and tokens % unit == 0:
            return f"{tokens // unit}{name}"
    return str(tokens)



MEMORY_HEADINGS = (
    *("shape", "recompute", "P", "layout", "peak", "between steps", "kept for the backward"),
    *("1/P of one GPU's", "ratio", "the rest"),
)
MEMORY_NOTES = """
GiB of the fullest of P ranks.

- Between steps: weights, float32 gradients and the optimizer's state. ZeRO shards the optimizer's state.
- Kept for the backward: hidden states, K_0/V_0 and the activations of the T TTT steps. Sequence parallelism
  divides all of it: it should be 1/P of the figure for one GPU. The ratio says how close it is (1.00: equal).
- The rest: work space of a fixed size (a chunk of the loss, a tile of the MLP), and gradients.
"""


def memory_markdown(results: Sequence[Result]) -> str | None:
    """Return a Markdown table of memory for shapes measured on one GPU and on several, if there are any."""
    groups: dict[tuple[object, ...], dict[str, Result]] = {}
    for result in results:
        if result.kept_gib and result.resident_gib and result.data_parallel == 1:
            key = (result.model, result.shape, result.ttt_steps, result.settings, result.source)
            groups.setdefault(key, {})[result.layout] = result  # of equal results the last one counts
    rows = []
    for group in groups.values():
        rows += _memory_rows(sorted(group.values(), key=lambda result: result.gpus))
    if not rows:
        return None
    return _table([MEMORY_HEADINGS, ["---"] * len(MEMORY_HEADINGS), *rows]) + MEMORY_NOTES


def _memory_rows(group: Sequence[Result]) -> list[Sequence[str]]:
    """Return the rows of one shape; none unless one result has one GPU and another one has several."""
    one = group[0]
    if one.gpus > 1 or group[-1].gpus == 1:
        return []
    return [_memory_row(result, one.kept_gib / result.gpus) for result in group]


def _memory_row(result: Result, ideal: float) -> Sequence[str]:
    rest = result.peak_gib - result.resident_gib - result.kept_gib
    sizes = (result.peak_gib, result.resident_gib, result.kept_gib, ideal)
    settings, layout = result.settings.removeprefix("recompute "), layout_label(result.layout)
    start = (result.shape, settings, str(result.gpus), layout)
    return (*start, *(f"{size:.2f}" for size in sizes), f"{result.kept_gib / ideal:.2f}", f"{rest:.2f}")


def _table(rows: Iterable[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
