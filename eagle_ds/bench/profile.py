"""Where a step's GPU time goes: the kernels of a Chrome trace by category and phase, and what runs beside what.

A kernel's category follows from its name (``CATEGORIES``), save for two that follow from where it was launched: all that
the head's loss launches is loss, all that the optimizer launches is optimizer. Communication is communication anywhere.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COMMUNICATION, COPIES, OPTIMIZER, LOSS, OTHER = "communication", "copies and fills", "optimizer", "loss", "other"

CATEGORIES = (
    (COMMUNICATION, r"nccl"),
    (OPTIMIZER, r"multi_tensor_apply|Adam"),
    ("attention diagonals", r"diagonal"),
    ("attention prefix", r"sdpa|flash|fmha|cudnn|flex_attention|attention|^_(forward|row_facts|dq|dkv)_kernel"),
    (LOSS, r"^_(label|row)_kernel|[Ss]oft[Mm]ax|logsumexp|nll_loss"),
    ("matmul", r"gemm|nvjet|cutlass|cublas|splitK|gemv|matmul|triton_tem_fused_.*mm"),
    (COPIES, r"^Mem(cpy|set)|copy_kernel|CatArray|FillFunctor|[Gg]ather|[Ss]catter|index_(select|copy|put|add|elementwise)|indexSelect"),
    ("norm", r"(?i)rms_?norm|layer_?norm|rsqrt|^_norm_(forward|backward)_kernel"),
    ("elementwise", r"elementwise|rotate|swiglu|silu|merge|^_(add|add_rows|take_rows)_kernel|reduce_kernel|^triton_(poi|red|per|for)_"),
    (OTHER, r""),
)
"""(category, part of a kernel's name as a regular expression), the first that matches. A kernel of this repository is found
by its function's name, one that torch.compile made by the operations in it."""

NO_PHASE = "between"


@dataclass(frozen=True)
class Kernel:
    """One piece of work on the GPU. Times in microseconds, of the trace's clock."""

    name: str
    start: float
    stop: float
    phase: str = NO_PHASE  # during which it was launched
    in_loss: bool = False  # whether the head's loss launched it

    @property
    def category(self) -> str:
        """By name, else by launch."""
        by_name = category_of(self.name)
        if by_name == COMMUNICATION:
            return by_name
        if self.in_loss:
            return LOSS
        return OPTIMIZER if self.phase == "optimizer" else by_name


@dataclass
class Share:
    """What one category took. Microseconds."""

    total: float = 0.0
    count: int = 0
    by_phase: dict[str, float] = field(default_factory=dict)

    def add(self, kernel: Kernel) -> None:
        took = kernel.stop - kernel.start
        self.total, self.count = self.total + took, self.count + 1
        self.by_phase[kernel.phase] = self.by_phase.get(kernel.phase, 0.0) + took


@dataclass(frozen=True)
class Profile:
    """Of one step on one GPU. Milliseconds, and fractions."""

    shares: dict[str, Share]
    span_ms: float  # from the first kernel's start to the last one's end
    busy: float  # of the span: at least one kernel runs
    communication_ms: float  # at least one communication kernel runs
    overlapped: float  # of that: a computing kernel runs beside it; 0 without communication

    @property
    def total_ms(self) -> float:
        """Of all kernels, also where two run at once."""
        return sum(share.total for share in self.shares.values()) / 1e3

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "gpu_ms": {name: round(share.total / 1e3, 3) for name, share in self.shares.items()},
            "span_ms": round(self.span_ms, 3),
            "busy": round(self.busy, 4),
            "communication_ms": round(self.communication_ms, 3),
            "communication_overlapped": round(self.overlapped, 4),
        }


def category_of(name: str) -> str:
    """The first category whose pattern the kernel's name matches."""
    return next(category for category, pattern in CATEGORIES if re.search(pattern, name))


def summarize(kernels: Sequence[Kernel]) -> Profile:
    """Raises ValueError if there is no kernel."""
    if not kernels:
        raise ValueError("the trace holds no GPU kernel; profile on a GPU, with CUDA activities recorded")
    shares: dict[str, Share] = {}
    for kernel in kernels:
        shares.setdefault(kernel.category, Share()).add(kernel)
    communicating = union((k.start, k.stop) for k in kernels if k.category == COMMUNICATION)
    computing = union((k.start, k.stop) for k in kernels if k.category != COMMUNICATION and not k.name.startswith("Mem"))
    talk, span = length(communicating), max(k.stop for k in kernels) - min(k.start for k in kernels)
    return Profile(
        dict(sorted(shares.items(), key=lambda item: -item[1].total)),
        span / 1e3,
        length(union((k.start, k.stop) for k in kernels)) / span if span else 1.0,
        talk / 1e3,
        common(communicating, computing) / talk if talk else 0.0,
    )


def table(profile: Profile, phases: Sequence[str]) -> str:
    """Markdown: a row a category with its milliseconds, also by ``phases``, and what the GPU did as a whole."""
    lines = [
        f"| category | ms | share | kernels | {' | '.join(phases)} |",
        f"| --- | --- | --- | --- | {' | '.join('---' for _ in phases)} |",
    ]
    for name, share in profile.shares.items():
        parts = " | ".join(f"{share.by_phase.get(phase, 0.0) / 1e3:.2f}" for phase in phases)
        lines.append(f"| {name} | {share.total / 1e3:.2f} | {share.total / 10 / profile.total_ms:.1f}% | {share.count} | {parts} |")
    whole = f"{profile.total_ms:.2f} ms of kernels in {profile.span_ms:.2f} ms, during {100 * profile.busy:.1f}% of which the GPU was busy"
    if profile.communication_ms:
        whole += f"; {profile.communication_ms:.2f} ms of communication, {100 * profile.overlapped:.0f}% of it beside computing kernels"
    return "\n".join([*lines, "", f"{whole}."])


def read_trace(path: Path, phases: Sequence[str], loss_region: str) -> list[Kernel]:
    """The GPU work of the last step in a Chrome trace that torch.profiler wrote, plain or gzipped.

    ``phases`` and ``loss_region`` are names of ``record_function`` ranges on the CPU; a kernel belongs to the range in which
    it was launched (its correlation number leads to the launch), on the very thread for the loss: autograd has its own.
    """
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    marks = [event for event in events if event.get("cat") == "user_annotation"]
    begin = max((mark["ts"] for mark in marks if mark["name"] == phases[0]), default=0)
    launches = {
        event["args"]["correlation"]: event
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    kernels = []
    for event in events:
        if event.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        launch = launches.get(event.get("args", {}).get("correlation"))
        if launch and launch["ts"] < begin:
            continue
        around = [mark for mark in marks if launch and mark["ts"] <= launch["ts"] <= mark["ts"] + mark["dur"]]
        phase = next((mark["name"] for mark in around if mark["name"] in phases), NO_PHASE)
        in_loss = any(mark["name"] == loss_region and mark["tid"] == launch["tid"] for mark in around)
        kernels.append(Kernel(event["name"], event["ts"], event["ts"] + event["dur"], phase, in_loss))
    return kernels


def union(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Sorted and disjoint."""
    joined: list[tuple[float, float]] = []
    for start, stop in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined


def length(intervals: Iterable[tuple[float, float]]) -> float:
    """Of disjoint intervals."""
    return sum(stop - start for start, stop in intervals)


def common(a: Sequence[tuple[float, float]], b: Sequence[tuple[float, float]]) -> float:
    """Length of what two unions share."""
    i = j = 0
    total = 0.0
    while i < len(a) and j < len(b):
        total += max(0.0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] <= b[j][1]:
            i += 1
        else:
            j += 1
    return total
