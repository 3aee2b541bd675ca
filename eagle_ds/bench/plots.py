"""Pictures of benchmark results, each as the bytes of a PNG.

Steps of tools/bench_step.py against length, trained fraction and number of GPUs; file formats of
tools/bench_io.py.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eagle_ds.bench.results import (
    PEER,
    PEER_MODEL,
    Result,
    layout_label,
    markdown,
    memory_markdown,
    short,
)
from eagle_ds.reporting.figures import GRID, INK, SERIES, canvas, legend_below, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PEER_COLOUR, PEER_MARKS = "#98a2ad", "x+12"

Series = dict[str, list[Result]]


def write_results(results: Sequence[Result], folder: Path) -> list[Path]:
    """Write ``steps.md``, and ``memory.md`` and pictures if there are enough results. Return the files."""
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
    """Draw step time and peak memory against sequence length; None unless some curve has two lengths.

    One curve per number of GPUs, layout, trained rows, settings and source.
    """
    unpacked = [result for result in results if result.documents == 1]
    def key(r: Result) -> tuple[str, ...]:
        return _gpus(r.gpus), layout_label(r.layout), r.rows, r.settings, r.source

    series = _series(unpacked, key, lambda r: r.tokens)
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
    """Draw step time and peak memory against the trained fraction; None unless some curve has two fractions.
    """
    series = _series(results, _all_but_fraction, lambda r: r.fraction)
    if not series:
        return None
    figure, (time, memory) = canvas(1, 2, (12, 4.6))
    _curves(time, memory, series, lambda r: 100 * r.fraction)
    peers = {result.peer for curve in series.values() for result in curve if result.peer}
    for peer in sorted(peers, key=lambda step: step.step_ms):
        label = f"SpecForge, {short(peer.tokens)}, {layout_label(peer.layout)}"
        time.axhline(peer.step_ms / 1e3, color=PEER_COLOUR, linestyle=":", label=label)
        memory.axhline(peer.peak_gib, color=PEER_COLOUR, linestyle=":", label=label)
    for axes in (time, memory):
        axes.set_xlabel("trained rows, % of all")
        axes.set_xlim(left=0)
    time.set_yscale("log")  # curves of a million tokens and of 128K share the axes
    _finish(time, memory)
    return png(figure)


def scaling_figure(results: Sequence[Result]) -> bytes | None:
    """Draw time, efficiency and memory by number of GPUs; None unless some curve has two numbers.

    Each point is the fastest layout of its shape, settings and number of GPUs (strong scaling).
    """
    fastest: dict[Hashable, Result] = {}
    # From slow to fast, so that the fastest step of each key is the last one stored.
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
            marks.append((result.gpus, share, f"{share:.0f}% {layout_label(result.layout)}"))
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
    legend_below(time)
    return png(figure)


def _write_apart(axes: Axes, marks: Sequence[tuple[float, float, str]]) -> None:
    """Write texts next to their points (x, y). Texts at the same x are moved up until they do not overlap."""
    above: dict[float, float] = {}
    for x, y, text in sorted(marks):
        # The efficiency axis is in percent; 2.4 of it is the height of a line of text.
        above[x] = max(above.get(x, 0.0) + 2.4, y)
        style = {"textcoords": "offset points", "fontsize": 7, "color": INK, "va": "center"}
        axes.annotate(text, (x, above[x]), (7, 0), annotation_clip=False, **style)


def _scaled(result: Result) -> tuple[str, ...]:
    return result.model, result.shape, result.settings, f"T = {result.ttt_steps}", result.source


def _all_but_fraction(result: Result) -> tuple[str, ...]:
    length = short(result.tokens // result.documents)
    if result.documents > 1:
        length = f"{result.documents} x {length}"
    how = layout_label(result.layout), f"turns of {result.turn}", result.settings, result.source
    return length, _gpus(result.gpus), *how


def _gpus(count: int) -> str:
    return f"{count} GPU{'s' * (count > 1)}"


def _series(
    results: Iterable[Result], key: Callable[[Result], tuple[str, ...]], x: Callable[[Result], float]
) -> Series:
    """Group timed results into curves of at least two points, sorted along ``x``, by label.

    Of results with the same key and x, the last one counts. A label contains only those words of the keys
    that differ between curves, or the first two words if there is a single curve.
    """
    groups: dict[tuple[str, ...], dict[float, Result]] = {}
    for result in _timed(results):
        groups.setdefault(key(result), {})[x(result)] = result
    curves = {}
    for name, places in groups.items():
        if len(places) > 1:
            curves[name] = [places[at] for at in sorted(places)]
    columns = enumerate(zip(*curves, strict=True))
    differing = {i for i, words in columns if len(set(words)) > 1} or {0, 1}
    label = {name: ", ".join(word for i, word in enumerate(name) if i in differing) for name in curves}
    return {label[name]: curve for name, curve in curves.items()}


def _curves(time: Axes, memory: Axes, series: Series, x: Callable[[Result], float]) -> None:
    for colour, (label, curve) in zip(_colours(series), series.items(), strict=True):
        time.plot([x(r) for r in curve], [_seconds(r) for r in curve], "o-", color=colour, label=label)
        memory.plot([x(r) for r in curve], [r.peak_gib for r in curve], "o-", color=colour, label=label)
        floors = [(x(r), r.floor_ms / 1e3) for r in curve if r.floor_ms]
        if floors:
            time.plot(*zip(*floors, strict=True), "--", color=colour, linewidth=1)


def _peer_marks(time: Axes, memory: Axes, gpus: set[int], lengths: Sequence[int]) -> None:
    within = [step for step in PEER if step.gpus in gpus and lengths[0] <= step.tokens <= lengths[-1]]
    places = dict.fromkeys((step.gpus, step.layout) for step in PEER)
    for (count, layout), mark in zip(places, PEER_MARKS, strict=True):
        steps = [step for step in within if (step.gpus, step.layout) == (count, layout)]
        if not steps:
            continue
        style = {"marker": mark, "linestyle": "", "color": PEER_COLOUR}
        style |= {"markersize": 9, "markeredgewidth": 1.8}
        at = [step.tokens for step in steps]
        label = f"SpecForge, {_gpus(count)}, {layout_label(layout)}"
        time.plot(at, [step.step_ms / 1e3 for step in steps], label=label, **style)
        memory.plot(at, [step.peak_gib for step in steps], label=label, **style)


def _finish(time: Axes, memory: Axes) -> None:
    time.set_title("seconds a step (dashed: the floor)")
    memory.set_title("peak memory of the fullest GPU, GiB")
    memory.set_ylim(bottom=0)
    if time.get_yscale() != "log":
        time.set_ylim(bottom=0)
    legend_below(memory)


def _timed(results: Iterable[Result]) -> list[Result]:
    return [result for result in results if result.is_timed]


def _seconds(result: Result) -> float:
    assert result.step_ms is not None
    return result.step_ms / 1e3


def _colours(series: Series) -> list[str]:
    return [SERIES[i % len(SERIES)] for i in range(len(series))]


OURS, OTHERS = "#2f6fb2", "#b8c0c8"


def io_figure(document: Mapping[str, Any]) -> bytes:
    """Draw size, write speed and read time of each format, at the longest length in ``document`` (io.json).
    """
    from matplotlib.figure import Figure

    longest = max(record["num_tokens"] for record in document["measurements"])
    records = [record for record in document["measurements"] if record["num_tokens"] == longest]
    names = [record["title"] for record in records]
    sizes = [100 * (1 - record["saved"]) for record in records]
    speeds = [record["raw_bytes"] / 1e6 / record["write"]["cpu_s"] for record in records]
    seconds = [record["read_warm"]["wall_s"] for record in records]
    reading = f"one rank of {records[0]['ranks']} reads its rows, s"
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3, sharey=True)
    _bars(left, "file size, % of raw", names, sizes, "%.1f", "linear")
    _bars(middle, "written, MB/s per core", names, speeds, "%.0f", "log")
    _bars(right, reading, names, seconds, "%.2f", "log")
    left.invert_yaxis()  # the first format on top; the panels share the axis
    where = f"{document['width']}, {document['hardware']}, {document['date']}"
    figure.suptitle(f"{longest // 1024}K tokens, H = {where}", fontsize=11, color=INK)
    stream = io.BytesIO()
    figure.savefig(stream, dpi=110)
    return stream.getvalue()


def _bars(
    axes: Axes, title: str, names: Sequence[str], values: Sequence[float], form: str, scale: str
) -> None:
    colours = [OURS if name.startswith("our") else OTHERS for name in names]
    axes.bar_label(axes.barh(names, values, color=colours), fmt=form, padding=3, fontsize=9, color=INK)
    axes.set_xscale(scale)
    axes.set_title(title, fontsize=10, color=INK)
    axes.margins(x=0.2)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(OTHERS)
    axes.tick_params(labelsize=8, colors=INK)
