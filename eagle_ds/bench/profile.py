"""Break down a step's GPU time: kernels of a Chrome trace by category and by phase, and which of them
overlap.

A kernel's category follows from its name (``CATEGORIES``), with two exceptions that follow from its launch:
every kernel that the head's loss launches is "loss", and every kernel that the optimizer launches is
"optimizer". Communication kernels are always "communication".
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

COMMUNICATION, COPIES = "communication", "copies and fills"
OPTIMIZER, LOSS, OTHER = "optimizer", "loss", "other"

CATEGORIES = (
    (COMMUNICATION, r"nccl"),
    (OPTIMIZER, r"multi_tensor_apply|Adam"),
    ("attention diagonals", r"diagonal"),
    (
        "attention prefix",
        r"sdpa|flash|fmha|cudnn|flex_attention|attention|^_(forward|row_sums|dq|dkv)_kernel"
    ),
    (LOSS, r"^_(label|row)_kernel|[Ss]oft[Mm]ax|logsumexp|nll_loss"),
    ("matmul", r"gemm|nvjet|cutlass|cublas|splitK|gemv|matmul|triton_tem_fused_.*mm"),
    (
        COPIES,
        r"^Mem(cpy|set)|copy_kernel|CatArray|FillFunctor|[Gg]ather|[Ss]catter|indexSelect"
        r"|index_(select|copy|put|add|elementwise)",
    ),
    ("norm", r"(?i)rms_?norm|layer_?norm|rsqrt|^_norm_(forward|backward)_kernel"),
    (
        "elementwise",
        r"elementwise|rotate|swiglu|silu|merge|^_(add|add_rows|take_rows)_kernel|reduce_kernel"
        r"|^triton_(poi|red|per|for)_",
    ),
    (OTHER, r""),
)
"""(category, regular expression to find in the kernel's name). The first match counts. Kernels of this
repository are found by their function's name, kernels made by torch.compile by the operations in their name.
"""

NO_PHASE = "between"  # phase of a kernel that was launched outside every phase


@dataclass(frozen=True)
class Kernel:
    """A kernel, copy or fill on the GPU. Times are microseconds of the trace's clock."""

    name: str
    start: float
    stop: float
    phase: str = NO_PHASE  # during which it was launched
    in_loss: bool = False  # whether the head's loss launched it

    @property
    def category(self) -> str:
        """Category of the kernel: by its launch for loss and optimizer, else by its name."""
        by_name = category_of(self.name)
        if by_name == COMMUNICATION:
            return by_name
        if self.in_loss:
            return LOSS
        return OPTIMIZER if self.phase == "optimizer" else by_name


@dataclass
class Share:
    """GPU time of one category, in microseconds."""

    total: float = 0.0
    count: int = 0
    by_phase: dict[str, float] = field(default_factory=dict)

    def add(self, kernel: Kernel) -> None:
        took = kernel.stop - kernel.start
        self.total, self.count = self.total + took, self.count + 1
        self.by_phase[kernel.phase] = self.by_phase.get(kernel.phase, 0.0) + took


@dataclass(frozen=True)
class Profile:
    """Summary of one step on one GPU: milliseconds and fractions."""

    shares: dict[str, Share]
    span_ms: float  # from the first kernel's start to the last kernel's end
    busy: float  # fraction of the span in which at least one kernel runs
    communication_ms: float  # time in which at least one communication kernel runs
    # fraction of communication_ms in which a computing kernel runs too; 0 without communication
    overlapped: float

    @property
    def total_ms(self) -> float:
        """Sum over all kernels; kernels that run at the same time count twice."""
        return sum(share.total for share in self.shares.values()) / 1e3



def category_of(name: str) -> str:
    """Return the first category whose pattern matches the kernel's name."""
    return next(category for category, pattern in CATEGORIES if re.search(pattern, name))


def summarize(kernels: Sequence[Kernel]) -> Profile:
    """Summarize the kernels of one step. Raises ValueError if there are none."""
    if not kernels:
        raise ValueError("the trace holds no GPU kernel; profile on a GPU and record CUDA activities")
    shares: dict[str, Share] = {}
    for kernel in kernels:
        shares.setdefault(kernel.category, Share()).add(kernel)
    communicating = union((k.start, k.stop) for k in kernels if k.category == COMMUNICATION)
    # Copies and fills (names "Memcpy ...", "Memset ...") do not compute, so they cannot hide communication.
    computes = [k for k in kernels if k.category != COMMUNICATION and not k.name.startswith("Mem")]
    computing = union((k.start, k.stop) for k in computes)
    talk, span = length(communicating), max(k.stop for k in kernels) - min(k.start for k in kernels)
    return Profile(
        dict(sorted(shares.items(), key=lambda item: -item[1].total)),
        span / 1e3,
        length(union((k.start, k.stop) for k in kernels)) / span if span else 1.0,
        talk / 1e3,
        common(communicating, computing) / talk if talk else 0.0,
    )


def table(profile: Profile, phases: Sequence[str]) -> str:
    """Return a Markdown table with one row per category, and a sentence about the whole GPU."""
    lines = [
        f"| category | ms | share | kernels | {' | '.join(phases)} |",
        f"| --- | --- | --- | --- | {' | '.join('---' for _ in phases)} |",
    ]
    for name, share in profile.shares.items():
        parts = " | ".join(f"{share.by_phase.get(phase, 0.0) / 1e3:.2f}" for phase in phases)
        percent = share.total / 10 / profile.total_ms
        lines.append(f"| {name} | {share.total / 1e3:.2f} | {percent:.1f}% | {share.count} | {parts} |")
    kernels = f"{profile.total_ms:.2f} ms of kernels in {profile.span_ms:.2f} ms"
    whole = f"{kernels}; the GPU was busy for {100 * profile.busy:.1f}% of that time"
    if profile.communication_ms:
        hidden = f"{100 * profile.overlapped:.0f}% of it overlapped by computing kernels"
        whole += f"; {profile.communication_ms:.2f} ms of communication, {hidden}"
    return "\n".join([*lines, "", f"{whole}."])


def read_trace(path: Path, phases: Sequence[str], loss_region: str) -> list[Kernel]:
    """Read the GPU work of the last step from a Chrome trace written by torch.profiler.

    A kernel belongs to the CPU range in which it was launched; its correlation number leads to the launch. A
    kernel belongs to the loss only if it was launched by the same thread, because autograd launches from a
    thread of its own.

    Args:
        path: the trace, plain or gzipped.
        phases: names of the ``record_function`` ranges of the phases; the first one starts a step.
        loss_region: name of the range around the head's loss.
    """
    is_gzipped = path.suffix == ".gz"
    with gzip.open(path, "rt", encoding="utf-8") if is_gzipped else path.open(encoding="utf-8") as file:
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
        # The step before may still have kernels running; they were launched before this step began.
        if launch and launch["ts"] < begin:
            continue
        around = [m for m in marks if launch and m["ts"] <= launch["ts"] <= m["ts"] + m["dur"]]
        phase = next((mark["name"] for mark in around if mark["name"] in phases), NO_PHASE)
        in_loss = any(mark["name"] == loss_region and mark["tid"] == launch["tid"] for mark in around)
        kernels.append(Kernel(event["name"], event["ts"], event["ts"] + event["dur"], phase, in_loss))
    return kernels


def union(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Merge intervals into sorted, disjoint ones."""
    joined: list[tuple[float, float]] = []
    for start, stop in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined


def length(intervals: Iterable[tuple[float, float]]) -> float:
    """Return the total length of disjoint intervals."""
    return sum(stop - start for start, stop in intervals)


def common(a: Sequence[tuple[float, float]], b: Sequence[tuple[float, float]]) -> float:
    """Return the length of the intersection of two unions of sorted, disjoint intervals."""
    i = j = 0
    total = 0.0
    while i < len(a) and j < len(b):
        total += max(0.0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        # Advance past the interval that ends first; the other one may meet more intervals.
        if a[i][1] <= b[j][1]:
            i += 1
        else:
            j += 1
    return total
