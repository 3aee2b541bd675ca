"""Pictures of measured steps, each as the bytes of a PNG: against length, against trained fraction, and by number of GPUs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from eagle_ds.bench.memory_table import memory_markdown
from eagle_ds.bench.peer import PEER, PEER_MODEL
from eagle_ds.bench.results import Result, markdown, short
from eagle_ds.reporting.figures import INK, SERIES, canvas, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PEER_COLOUR, PEER_MARKS = "#98a2ad", "x+12"

Series = dict[str, list[Result]]


def write_results(results: Sequence[Result], folder: Path) -> list[Path]:
    """``steps.md``, and ``memory.md`` and each picture that the results suffice for. Returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, table in (("steps", markdown(results)), ("memory", memory_markdown(results))):
        if table:
            written.append(folder / f"{name}.md")
            written[-1].write_text(table, encoding="utf-8")
    for name, draw in (("length", length_figure), ("fraction", fraction_figure), ("scaling", scaling_figure)):
        if picture := draw(results):
            written.append(folder / f"{name}.png")
            written[-1].write_bytes(picture)
    return written


def length_figure(results: Sequence[Result]) -> bytes | None:
    """Step time and peak memory against sequence length, a curve for each layout, trained rows and settings; None without two lengths."""
    alone = [result for result in results if result.documents == 1]
    series = _series(alone, lambda r: (_gpus(r.gpus), r.layout, r.rows, r.settings, r.source), lambda r: r.tokens)
    if not series:
        return None
    figure, (time, memory) = canvas(1, 2, (12, 4.6))
    _curves(time, memory, series, lambda r: r.tokens)
    drawn = [result for curve in series.values() for result in curve]
    lengths = sorted({result.tokens for result in drawn})
    if {result.model for result in drawn} == {PEER_MODEL}:
        _peer_marks(time, memory, {result.gpus for result in drawn}, lengths)
    for axes in (time, memory):
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [short(tokens) for tokens in lengths])
        axes.minorticks_off()
        axes.set_xlabel("tokens of the sequence")
    time.set_yscale("log")
    _finish(time, memory)
    return png(figure)


def fraction_figure(results: Sequence[Result]) -> bytes | None:
    """Step time and peak memory against the trained fraction of the rows; None unless some curve has two fractions."""
    series = _series(results, _all_but_fraction, lambda r: r.fraction)
    if not series:
        return None
    figure, (time, memory) = canvas(1, 2, (12, 4.6))
    _curves(time, memory, series, lambda r: 100 * r.fraction)
    peers = {result.peer for curve in series.values() for result in curve if result.peer}
    for peer in sorted(peers, key=lambda step: step.step_ms):
        label = f"the peer, {short(peer.tokens)}, {peer.layout}"
        time.axhline(peer.step_ms / 1e3, color=PEER_COLOUR, linestyle=":", label=label)
        memory.axhline(peer.peak_gib, color=PEER_COLOUR, linestyle=":", label=label)
    for axes in (time, memory):
        axes.set_xlabel("trained rows, % of all")
        axes.set_xlim(left=0)
    time.set_yscale("log")  # a million tokens beside 128K
    _finish(time, memory)
    return png(figure)


def scaling_figure(results: Sequence[Result]) -> bytes | None:
    """Strong scaling: the fastest step of each shape and setting by number of GPUs, its efficiency and memory; None without two
    numbers of GPUs."""
    fastest: dict[Hashable, Result] = {}
    for result in sorted(_timed(results), key=lambda r: -_seconds(r)):
        if result.data_parallel == 1 and not result.alone:
            fastest[(*_scaled(result), result.gpus)] = result
    series = _series(list(fastest.values()), _scaled, lambda r: r.gpus)
    if not series:
        return None
    figure, (time, efficiency, memory) = canvas(1, 3, (15, 4.6))
    lowest, marks = 100.0, []
    for colour, (label, curve) in zip(_colours(series), series.items(), strict=True):
        gpus, seconds = [r.gpus for r in curve], [_seconds(r) for r in curve]
        ideal = [seconds[0] * gpus[0] / n for n in gpus]
        time.plot(gpus, seconds, "o-", color=colour, label=label)
        time.plot(gpus, ideal, ":", color=colour)
        shares = [100 * best / real for best, real in zip(ideal, seconds, strict=True)]
        efficiency.plot(gpus, shares, "o-", color=colour, label=label)
        memory.plot(gpus, [r.peak_gib for r in curve], "o-", color=colour, label=label)
        lowest = min(lowest, *shares)
        for result, share in zip(curve[1:], shares[1:], strict=True):
            marks.append((result.gpus, share, f"{share:.0f}% {result.layout}"))
    _write_apart(efficiency, marks)
    counts = sorted({result.gpus for curve in series.values() for result in curve})
    for axes in (time, efficiency, memory):
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
        axes.margins(x=0.12)
        axes.set_xlabel("GPUs")
    time.set(title="seconds a step (dotted: ideal)", yscale="log")
    memory.set(title="peak memory of the fullest GPU, GiB", ylim=(0, None))
    efficiency.axhline(100, color=INK, linewidth=0.8, linestyle=":")
    efficiency.set(title="efficiency, % of ideal", ylim=(min(50, lowest - 5), 110))
    _legend_below(time)
    return png(figure)


def _write_apart(axes: Axes, marks: Sequence[tuple[float, float, str]]) -> None:
    """Texts beside their points (x, y), those of one x at least as far apart as a line is high (in %)."""
    above: dict[float, float] = {}
    for x, y, text in sorted(marks):
        above[x] = max(above.get(x, 0.0) + 2.4, y)
        axes.annotate(text, (x, above[x]), (7, 0), textcoords="offset points", fontsize=7, color=INK, va="center", annotation_clip=False)


def _scaled(result: Result) -> tuple[str, ...]:
    return result.model, result.shape, result.settings, f"T = {result.ttt_steps}", result.source


def _all_but_fraction(result: Result) -> tuple[str, ...]:
    length = f"{result.documents} x {short(result.tokens // result.documents)}" if result.documents > 1 else short(result.tokens)
    return length, _gpus(result.gpus), result.layout, f"turns of {result.turn}", result.settings, result.source


def _gpus(count: int) -> str:
    return f"{count} GPU{'s' * (count > 1)}"


def _series(results: Iterable[Result], key: Callable[[Result], tuple[str, ...]], x: Callable[[Result], float]) -> Series:
    """Timed results by label, each curve sorted along ``x`` with at least two places; of equal ones the last measured counts.

    A label says of ``key`` only what differs from curve to curve, or its first two words where there is but one curve.
    """
    groups: dict[tuple[str, ...], dict[float, Result]] = {}
    for result in _timed(results):
        groups.setdefault(key(result), {})[x(result)] = result
    curves = {name: [places[at] for at in sorted(places)] for name, places in groups.items() if len(places) > 1}
    differing = {i for i, words in enumerate(zip(*curves, strict=True)) if len(set(words)) > 1} or {0, 1}
    return {", ".join(word for i, word in enumerate(name) if i in differing): curve for name, curve in curves.items()}


def _curves(time: Axes, memory: Axes, series: Series, x: Callable[[Result], float]) -> None:
    for colour, (label, curve) in zip(_colours(series), series.items(), strict=True):
        time.plot([x(r) for r in curve], [_seconds(r) for r in curve], "o-", color=colour, label=label)
        memory.plot([x(r) for r in curve], [r.peak_gib for r in curve], "o-", color=colour, label=label)
        floors = [(x(r), r.floor_ms / 1e3) for r in curve if r.floor_ms]
        if floors:
            time.plot(*zip(*floors, strict=True), "--", color=colour, linewidth=1)


def _peer_marks(time: Axes, memory: Axes, gpus: set[int], lengths: Sequence[int]) -> None:
    within = [step for step in PEER if step.gpus in gpus and lengths[0] <= step.tokens <= lengths[-1]]
    for (count, layout), mark in zip(dict.fromkeys((step.gpus, step.layout) for step in PEER), PEER_MARKS, strict=True):
        steps = [step for step in within if (step.gpus, step.layout) == (count, layout)]
        if not steps:
            continue
        style = {"marker": mark, "linestyle": "", "color": PEER_COLOUR, "markersize": 9, "markeredgewidth": 1.8}
        at, label = [step.tokens for step in steps], f"the peer, {_gpus(count)}, {layout}"
        time.plot(at, [step.step_ms / 1e3 for step in steps], label=label, **style)
        memory.plot(at, [step.peak_gib for step in steps], label=label, **style)


def _finish(time: Axes, memory: Axes) -> None:
    time.set_title("seconds a step (dashed: the floor)")
    memory.set_title("peak memory of the fullest GPU, GiB")
    memory.set_ylim(bottom=0)
    if time.get_yscale() != "log":
        time.set_ylim(bottom=0)
    _legend_below(memory)


def _legend_below(axes: Axes) -> None:
    """What all panels show, beneath them: inside it would hide curves."""
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)


def _timed(results: Iterable[Result]) -> list[Result]:
    return [result for result in results if result.is_timed]


def _seconds(result: Result) -> float:
    assert result.step_ms is not None
    return result.step_ms / 1e3


def _colours(series: Series) -> list[str]:
    return [SERIES[i % len(SERIES)] for i in range(len(series))]
