"""What the peer takes for the same shapes, to stand beside ours: SpecForge, August 2026, on H200s, Llama-3.1-8B draft, T = 7.

Its step is forward + backward, without the optimizer, and costs the same whatever is trained.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PeerStep:
    """One measured step."""

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
OUT_OF_MEMORY_FROM = 52_000  # tokens, on one GPU


def peer_for(tokens: int, gpus: int, layout: str) -> PeerStep | None:
    """The peer's step of this length on as many GPUs: in the same layout if that was measured, else its fastest."""
    found = [step for step in PEER if (step.tokens, step.gpus) == (tokens, gpus)]
    same = [step for step in found if layout.startswith(step.layout)]
    return (same or sorted(found, key=lambda step: step.step_ms) or [None])[0]
