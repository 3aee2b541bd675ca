"""Pictures of runs, each as the bytes of a PNG: acceptance, learning, speed and memory, comparison."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Line = Mapping[str, Any]
"""A line of log.jsonl or eval.jsonl, or the entry of a draft in acceptance.json."""

COLOURS = ("#9aa5b1", "#2f6fb2", "#d9822b", "#3c9d6b")  # of drafts; the first one is the baseline
SERIES = (
    *("#2f6fb2", "#d9822b", "#3c9d6b", "#8a5cb8", "#c0504d"),
    *("#3aa6b9", "#7a5230", "#d46ea8", "#a3a02c", "#1f2933"),
)
LINE_STYLES = ("-", "--", ":")  # the second one is used once all colours of SERIES are, and so on
TRAIN, HELD_OUT, REAL = "#2f6fb2", "#d9822b", "#3c9d6b"
INK, GRID = "#333d47", "#e4e8ec"


def acceptance_figure(result: Line) -> bytes:
    """Draw an acceptance.json: acceptance length, acceptance by draft position and by context, and speed."""
    figure, (lengths, positions, contexts, speeds) = canvas(2, 2, (11, 7.2))
    drafts = result["drafts"]
    colours = COLOURS if len(drafts) > 1 else COLOURS[1:]
    _length_bars(lengths, result, colours)
    _position_curves(positions, drafts, colours)
    _context_bars(contexts, drafts, colours)
    _speed_bars(speeds, result, colours)
    where = f"{result['num_draft_tokens']} draft tokens per pass, {result['dtype']}, {result['device']}"
    title = f"Acceptance on {result['target']}\n{result['num_prompts']} prompts, {where}"
    figure.suptitle(title, fontsize=11, color=INK)
    return png(figure)


def _length_bars(axes: Axes, result: Line, colours: Sequence[str]) -> None:
    drafts, ends = result["drafts"], ("low", "high")
    values = _values(drafts, "acceptance_length")
    low, high = (np.array([draft["interval"][end] for draft in drafts]) for end in ends)
    names, error = [draft["name"] for draft in drafts], [values - low, high - values]
    bars = axes.bar(names, values, 0.55, color=colours[: len(drafts)], yerr=error, ecolor=INK, capsize=5)
    axes.bar_label(bars, fmt="%.2f", padding=4, color=INK)
    axes.axhline(1, color=INK, linewidth=0.8, linestyle=":")
    title = "acceptance length (tokens per target pass)"
    for gain in result.get("differences", [])[:1]:
        interval = f"{100 * gain['level']:.0f}% interval [{gain['low']:+.2f}, {gain['high']:+.2f}]"
        title += f"\ngain {gain['value']:+.2f}, {interval}, paired"
    axes.set(title=title, xlim=(-0.6, len(drafts) - 0.4), ylim=(0, 1.15 * high.max()))


def _position_curves(axes: Axes, drafts: Sequence[Line], colours: Sequence[str]) -> None:
    for draft, colour in zip(drafts, colours, strict=False):
        name, if_reached = draft["name"], draft["acceptance_by_position"]
        of_all, positions = draft["cumulative_by_position"], list(range(1, len(if_reached) + 1))
        axes.plot(positions, if_reached, "o-", color=colour, label=f"{name}: if reached")
        axes.plot(positions, of_all, "o:", color=colour, markersize=3, label=f"{name}: of all passes")
        axes.set_xticks(positions)
    axes.set(title="acceptance by draft position", xlabel="draft position", ylim=(0, 1.02))
    axes.legend()


def _context_bars(axes: Axes, drafts: Sequence[Line], colours: Sequence[str]) -> None:
    buckets = [bucket for draft in drafts for bucket in draft["by_context"]]
    edges = sorted({(bucket["from"], bucket["to"] or float("inf")) for bucket in buckets})
    width = 0.8 / max(len(drafts), 1)
    for i, (draft, colour) in enumerate(zip(drafts, colours, strict=False)):
        values = {bucket["from"]: bucket["acceptance_length"] for bucket in draft["by_context"]}
        # The bars of one bucket stand next to each other, centred on the bucket's tick.
        shift = (i - (len(drafts) - 1) / 2) * width
        at = [tick + shift for tick, (low, _) in enumerate(edges) if low in values]
        heights = [values[low] for low, _ in edges if low in values]
        bars = axes.bar(at, heights, width * 0.92, color=colour, label=draft["name"])
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
    axes.set(title="acceptance length by context length", xlabel="tokens of context")
    axes.set_xticks(range(len(edges)), [bucket_name(low, high) for low, high in edges])
    axes.axhline(1, color=INK, linewidth=0.8, linestyle=":")
    axes.margins(y=0.15)


def bucket_name(low: float, high: float) -> str:
    """Name a range of context lengths, for example 512-1K. An infinite ``high`` gives 32K+."""
    first, last = (f"{n / 1024:.0f}K" if n >= 1024 else f"{n:.0f}" for n in (low, high))
    return f"{first}+" if high == float("inf") else f"{first}-{last}"


def _speed_bars(axes: Axes, result: Line, colours: Sequence[str]) -> None:
    plain = result.get("plain")
    rows = [("plain", plain["tokens_per_s"], "#c9d1d9")] if plain else []
    for draft, colour in zip(result["drafts"], colours, strict=False):
        rows.append((draft["name"], draft["tokens_per_s"], colour))
    names, values, fills = zip(*rows, strict=True)
    axes.bar_label(axes.barh(names, values, color=fills), fmt="%.1f", padding=3)
    axes.invert_yaxis()
    together = result.get("batch", 1)
    prompts = "one prompt" if together == 1 else f"{together} prompts"
    axes.set(title=f"decoding speed (transformers, {prompts} at a time)", xlabel="tokens/s")
    axes.margins(x=0.12)


def learning_figure(train: Sequence[Line], held_out: Sequence[Line]) -> bytes:
    """Draw loss and KL, accuracy and acceptance of every TTT step, and acceptance length.

    Training is a smoothed line over its raw values, held-out data are points.
    """
    figure, (losses, accuracy, acceptance, lengths) = canvas(2, 2, (11, 7.2))
    for name, style in (("loss", "-"), ("kl", "--")):
        _curve(losses, train, name, color=TRAIN, label=f"{name}, training", linestyle=style)
        _points(losses, held_out, name, color=HELD_OUT, label=f"{name}, held out", linestyle=style)
    losses.set(title="loss (soft cross-entropy) and KL", xlabel="step")
    losses.legend()
    _by_ttt_step(accuracy, train, held_out, "accuracy")
    _by_ttt_step(acceptance, train, held_out, "acceptance")
    _curve(lengths, train, "simulated_length", color=TRAIN, label="simulated, training")
    _points(lengths, held_out, "simulated_length", color=HELD_OUT, label="simulated, held out")
    if real := [line for line in held_out if "accept_length" in line]:
        _points(lengths, real, "accept_length", color=REAL, label="real decoding, held out")
    lengths.set(title="acceptance length", xlabel="step")
    lengths.legend()
    return png(figure)


def speed_figure(train: Sequence[Line]) -> bytes:
    """Draw throughput, time per step and wait for data, gradient norm with learning rate, and memory."""
    figure, (throughput, seconds, norms, memory) = canvas(2, 2, (11, 6.4))
    _curve(throughput, train, "tokens_per_s", color=TRAIN, label="tokens/s")
    throughput.set(title="throughput (context tokens per second)", xlabel="step", ylim=(0, None))
    steps, waits, whole = (_values(train, name) for name in ("step", "data_wait_s", "step_s"))
    seconds.fill_between(steps, waits, whole, color=TRAIN, alpha=0.35, linewidth=0, label="computing")
    seconds.fill_between(steps, 0, waits, color=HELD_OUT, alpha=0.8, linewidth=0, label="waiting for data")
    seconds.set(title="seconds per step", xlabel="step", ylim=(0, 1.2 * whole.max()))
    seconds.legend(ncol=2, loc="upper right")
    _curve(norms, train, "grad_norm", color=TRAIN, label="gradient norm")
    rates = norms.twinx()
    rates.plot(steps, _values(train, "lr"), color=HELD_OUT, label="learning rate")
    rates.set_ylim(0, None)
    rates.tick_params(labelsize=8, colors=HELD_OUT)
    rates.spines[:].set_visible(False)
    norms.set(title="gradient norm (left), learning rate (right)", xlabel="step", ylim=(0, None))
    peaks = _values(train, "peak_gib")
    memory.plot(steps, peaks, color=TRAIN)
    title = "peak memory of the fullest process, GiB"
    memory.set(title=title, xlabel="step", ylim=(0, 1.2 * peaks.max()))
    return png(figure)


def comparison_figure(
    steps: Sequence[int], runs: Sequence[tuple[str, Sequence[float], Sequence[float]]]
) -> bytes:
    """Draw the loss of each run, and its relative difference from the first run on a log scale.

    Args:
        steps: optimizer steps, the same for all runs.
        runs: (label, losses, relative differences), one value per step.
    """
    figure, (losses, differences) = canvas(1, 2, (11, 4.6))
    for i, (label, values, relative) in enumerate(runs):
        style = _series_style(i)
        # Later lines are thinner, so that equal curves all stay visible.
        losses.plot(steps, values, linewidth=2.4 - 1.6 * i / max(len(runs) - 1, 1), label=label, **style)
        if i and any(relative):
            shown = [value or float("nan") for value in relative]  # a log scale has no zero
            differences.plot(steps, shown, marker=".", linewidth=1, markersize=3, label=label, **style)
    losses.set(title="loss", xlabel="step")
    same = [label for label, _, relative in runs[1:] if not any(relative)]
    note = f"\nno difference at any step: {', '.join(same)}" if same else ""
    differences.set(title=f"difference from {runs[0][0]}, relative{note}", xlabel="step")
    if len(same) < len(runs) - 1:
        differences.set_yscale("log")
    legend_below(losses, columns=5)
    return png(figure)


def _series_style(index: int) -> dict[str, str]:
    """Return colour and line style of a series. No two of the first 30 are equal."""
    lap, colour = divmod(index, len(SERIES))
    return {"color": SERIES[colour], "linestyle": LINE_STYLES[lap % len(LINE_STYLES)]}


def _by_ttt_step(axes: Axes, train: Sequence[Line], held_out: Sequence[Line], name: str) -> None:
    from matplotlib import colormaps

    count = len((train or held_out)[0][name])
    for k in range(count):
        colour, label = colormaps["viridis"](0.9 * k / max(count - 1, 1)), f"k={k}"
        _curve(axes, train, name, k, color=colour, label=label)
        _points(axes, held_out, name, k, color=colour, label=None if train else label, linestyle="none")
    axes.set(title=f"{name} by TTT step (line: training, o: held out)", xlabel="step", ylim=(0, None))
    axes.legend(ncol=2, fontsize=7)


def _curve(axes: Axes, lines: Sequence[Line], name: str, k: int | None = None, **style: Any) -> None:
    """Draw a smoothed curve; values that are not of one TTT step also appear raw, as a faint line."""
    if not lines:
        return
    steps, values = _values(lines, "step"), _values(lines, name, k)
    if k is None and len(values) > 10:
        axes.plot(steps, values, color=style["color"], alpha=0.2, linewidth=0.8)
    axes.plot(steps, smooth(values), linewidth=1.6, **style)


def _points(axes: Axes, lines: Sequence[Line], name: str, k: int | None = None, **style: Any) -> None:
    steps, values = _values(lines, "step"), _values(lines, name, k)
    axes.plot(steps, values, marker="o", markersize=4, linewidth=1, **style)


def _values(lines: Sequence[Line], name: str, k: int | None = None) -> np.ndarray:
    """Return one value per line, of TTT step ``k`` where the line has a list."""
    return np.array([line[name] if k is None else line[name][k] for line in lines], float)


def smooth(values: np.ndarray) -> np.ndarray:
    """Return the centred mean over about a twentieth of the curve; the window is halved at both ends."""
    half = len(values) // 40
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    first, last = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def canvas(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """Return a figure of ``size`` inches and its axes, in the project's style, without pyplot's global state.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = list(figure.subplots(rows, columns).flat)
    for one in axes:
        one.grid(color=GRID, linewidth=0.8)
        one.set_axisbelow(True)
        one.spines[["top", "right"]].set_visible(False)
        one.spines[["left", "bottom"]].set_color("#b8c0c8")
        one.tick_params(labelsize=8, colors=INK)
    return figure, axes


def legend_below(axes: Axes, columns: int = 4) -> None:
    """Place the legend of ``axes``, valid for all panels, below them; inside, it would cover curves."""
    handles = axes.get_legend_handles_labels()
    axes.figure.legend(*handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)


def png(figure: Figure) -> bytes:
    """Set the text sizes of the project's style and return the picture's bytes."""
    for axes in figure.axes:
        axes.title.set(fontsize=10, color=INK)
        axes.xaxis.label.set(fontsize=8, color=INK)
        if legend := axes.get_legend():
            legend.set_frame_on(False)
            for text in legend.get_texts():
                text.set(fontsize=min(text.get_fontsize(), 8), color=INK)
    stream = io.BytesIO()
    figure.savefig(stream, dpi=110)
    return stream.getvalue()
