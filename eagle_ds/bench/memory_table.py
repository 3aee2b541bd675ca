"""Memory of a rank against the number of ranks that share a sequence, with its ratio to one rank's share of what one GPU holds."""

from __future__ import annotations

from collections.abc import Sequence

from eagle_ds.bench.results import Result

HEADINGS = ("shape", "recompute", "P", "layout", "peak", "between steps", "kept for the backward", "1/P of one GPU's", "ratio", "the rest")
NOTES = """
GiB of the fullest rank. Between steps: weights, float32 gradients, and the optimizer's state, which ZeRO shards by itself. Kept for
the backward: hidden states, K_0/V_0 and what the T steps leave of the rank's rows; sequence parallelism shards all of it. The rest:
work space of a fixed size (a chunk of the loss, a tile of the MLP), and gradients.
"""


def memory_markdown(results: Sequence[Result]) -> str | None:
    """A table with a row for each layout of shapes that were measured on one GPU and on several; None if none was."""
    groups: dict[tuple[object, ...], dict[str, Result]] = {}
    for result in results:
        if result.kept_gib and result.resident_gib and result.data_parallel == 1:
            key = (result.model, result.shape, result.ttt_steps, result.settings, result.source)
            groups.setdefault(key, {})[result.layout] = result  # of equal ones the last measured counts
    rows = [row for group in groups.values() for row in _rows(sorted(group.values(), key=lambda r: r.gpus))]
    if not rows:
        return None
    return "".join(f"| {' | '.join(row)} |\n" for row in (HEADINGS, ["---"] * len(HEADINGS), *rows)) + NOTES


def _rows(group: Sequence[Result]) -> list[Sequence[str]]:
    one = group[0]
    if one.gpus > 1 or group[-1].gpus == 1:
        return []
    return [_row(result, one.kept_gib / result.gpus) for result in group]


def _row(result: Result, ideal: float) -> Sequence[str]:
    rest = result.peak_gib - result.resident_gib - result.kept_gib
    sizes = (result.peak_gib, result.resident_gib, result.kept_gib, ideal)
    start = (result.shape, result.settings.removeprefix("recompute "), str(result.gpus), result.layout)
    return (*start, *(f"{size:.2f}" for size in sizes), f"{result.kept_gib / ideal:.2f}", f"{rest:.2f}")
