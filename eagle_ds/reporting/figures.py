"""Pictures of runs, each as the bytes of a PNG: acceptance of drafts side by side, learning curves, speed and memory, and
the losses of several runs."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Line = Mapping[str, Any]  # of log.jsonl or eval.jsonl

COLOURS = ("#9aa5b1", "#2f6fb2", "#d9822b", "#3c9d6b")
SERIES = ("#2f6fb2", "#d9822b", "#3c9d6b", "#8a5cb8", "#c0504d", "#3aa6b9", "#7a6a53", "#5c6b7a")
TRAIN, HELD_OUT, REAL = "#2f6fb2", "#d9822b", "#3c9d6b"
INK, GRID = "#333d47", "#e4e8ec"


def acceptance_figure(result: Mapping[str, Any]) -> bytes:
    """Of an acceptance.json: acceptance length with its interval, acceptance by draft position, by context length, and speed."""
    figure, axes = canvas(2, 2, (11, 7.2))
    drafts = result["drafts"]
    names, colours = [draft["name"] for draft in drafts], COLOURS if len(drafts) > 1 else COLOURS[1:]
    _length_bars(axes[0], drafts, colours, result.get("differences", []))
    for draft, colour in zip(drafts, colours, strict=False):
        positions = range(1, len(draft["acceptance_by_position"]) + 1)
        axes[1].plot(positions, draft["acceptance_by_position"], "o-", color=colour, label=f"{draft['name']}: if reached")
        axes[1].plot(positions, draft["cumulative_by_position"], "o:", color=colour, markersize=3, label=f"{draft['name']}: of all passes")
    axes[1].set(title="acceptance by draft position", xlabel="draft position", ylim=(0, 1.02), xticks=list(positions))
    axes[1].legend()
    _context_bars(axes[2], drafts, colours)
    speeds = ([("plain", result["plain"]["tokens_per_s"], "#c9d1d9")] if result.get("plain") else []) + [
        (name, draft["tokens_per_s"], colour) for name, draft, colour in zip(names, drafts, colours, strict=False)
    ]
    bars = axes[3].barh([name for name, _, _ in speeds], [value for _, value, _ in speeds], color=[colour for _, _, colour in speeds])
    axes[3].bar_label(bars, fmt="%.1f", padding=3)
    axes[3].invert_yaxis()
    axes[3].set(title="decoding speed (transformers, one prompt at a time)", xlabel="tokens/s")
    axes[3].margins(x=0.12)
    where = f"{result['num_prompts']} prompts, {result['num_draft_tokens']} draft tokens a pass, {result['dtype']}, {result['device']}"
    figure.suptitle(f"Acceptance on {result['target']}\n{where}", fontsize=11, color=INK)
    return png(figure)


def _length_bars(axes: Axes, drafts: Sequence[Line], colours: Sequence[str], differences: Sequence[Line]) -> None:
    for i, (draft, colour) in enumerate(zip(drafts, colours, strict=False)):
        value, interval = draft["acceptance_length"], draft["interval"]
        axes.bar(i, value, width=0.55, color=colour)
        axes.errorbar(i, value, [[value - interval["low"]], [interval["high"] - value]], color=INK, capsize=5, linewidth=1.2)
        axes.annotate(f"{value:.2f}", (i, interval["high"]), (0, 4), textcoords="offset points", ha="center", color=INK)
    axes.axhline(1, color=INK, linewidth=0.8, linestyle=":")
    title = "acceptance length (tokens per target pass)"
    if differences:
        gain = differences[0]
        title += f"\ngain {gain['value']:+.2f}, {100 * gain['level']:.0f}% interval [{gain['low']:+.2f}, {gain['high']:+.2f}], paired"
    top = 1.15 * max(draft["interval"]["high"] for draft in drafts)
    axes.set(title=title, xticks=range(len(drafts)), xlim=(-0.6, len(drafts) - 0.4), ylim=(0, top))
    axes.set_xticklabels([draft["name"] for draft in drafts])


def _context_bars(axes: Axes, drafts: Sequence[Line], colours: Sequence[str]) -> None:
    edges = sorted({(bucket["from"], bucket["to"] or float("inf")) for draft in drafts for bucket in draft["by_context"]})
    width = 0.8 / max(len(drafts), 1)
    for i, (draft, colour) in enumerate(zip(drafts, colours, strict=False)):
        values = {bucket["from"]: bucket["acceptance_length"] for bucket in draft["by_context"]}
        at = [edges.index(edge) + (i - (len(drafts) - 1) / 2) * width for edge in edges if edge[0] in values]
        bars = axes.bar(at, [values[low] for low, _ in edges if low in values], width * 0.92, color=colour, label=draft["name"])
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
    axes.set(title="acceptance length by context length", xlabel="tokens of context", xticks=range(len(edges)))
    axes.set_xticklabels([_bucket(low, high) for low, high in edges])
    axes.axhline(1, color=INK, linewidth=0.8, linestyle=":")
    axes.margins(y=0.15)


def _bucket(low: float, high: float) -> str:
    def short(tokens: float) -> str:
        return f"{tokens / 1024:.0f}K" if tokens >= 1024 else f"{tokens:.0f}"

    return f"{short(low)}+" if high == float("inf") else f"{short(low)}-{short(high)}"


def learning_figure(train: Sequence[Line], held_out: Sequence[Line]) -> bytes:
    """Loss and KL, accuracy and acceptance of every TTT step, acceptance length: training smoothed, held-out as points."""
    figure, axes = canvas(2, 2, (11, 7.2))
    for name, style in (("loss", "-"), ("kl", "--")):
        _curve(axes[0], train, lambda line, name=name: line[name], TRAIN, f"{name}, training", style)
        _points(axes[0], held_out, lambda line, name=name: line[name], HELD_OUT, f"{name}, held out", style)
    axes[0].set(title="loss (soft cross-entropy) and KL", xlabel="step")
    axes[0].legend()
    for axis, name, title in ((axes[1], "accuracy", "accuracy by TTT step"), (axes[2], "acceptance", "acceptance by TTT step")):
        _by_ttt_step(axis, train, held_out, name)
        axis.set(title=f"{title} (line: training, o: held out)", xlabel="step", ylim=(0, None))
    _curve(axes[3], train, lambda line: line["simulated_length"], TRAIN, "simulated, training")
    _points(axes[3], held_out, lambda line: line["simulated_length"], HELD_OUT, "simulated, held out")
    real = [line for line in held_out if "accept_length" in line]
    if real:
        _points(axes[3], real, lambda line: line["accept_length"], REAL, "real decoding, held out")
    axes[3].set(title="acceptance length", xlabel="step")
    axes[3].legend()
    return png(figure)


def speed_figure(train: Sequence[Line]) -> bytes:
    """Throughput, where the time of a step goes, learning rate with gradient norm, memory."""
    figure, axes = canvas(2, 2, (11, 6.4))
    _curve(axes[0], train, lambda line: line["tokens_per_s"], TRAIN, "tokens/s")
    axes[0].set(title="throughput (context tokens per second)", xlabel="step", ylim=(0, None))
    steps = _steps(train)
    waits = np.array([line["data_wait_s"] for line in train])
    whole = np.array([line["step_s"] for line in train])
    axes[1].fill_between(steps, waits, whole, color=TRAIN, alpha=0.35, linewidth=0, label="computing")
    axes[1].fill_between(steps, 0, waits, color=HELD_OUT, alpha=0.8, linewidth=0, label="waiting for data")
    axes[1].set(title="seconds per step", xlabel="step", ylim=(0, 1.2 * whole.max()))
    axes[1].legend(ncol=2, loc="upper right")
    _curve(axes[2], train, lambda line: line["grad_norm"], TRAIN, "gradient norm")
    other = axes[2].twinx()
    other.plot(steps, [line["lr"] for line in train], color=HELD_OUT, label="learning rate")
    other.set_ylim(0, None)
    other.tick_params(labelsize=8, colors=HELD_OUT)
    other.spines[:].set_visible(False)
    axes[2].set(title="gradient norm (left), learning rate (right)", xlabel="step", ylim=(0, None))
    axes[3].plot(steps, [line["peak_gib"] for line in train], color=TRAIN)
    axes[3].set(title="peak memory of the fullest process, GiB", xlabel="step", ylim=(0, 1.2 * max(line["peak_gib"] for line in train)))
    return png(figure)


def comparison_figure(steps: Sequence[int], runs: Sequence[tuple[str, Sequence[float], Sequence[float]]]) -> bytes:
    """Loss of each run, and its relative difference from the first on a log scale. ``runs``: (label, losses, differences)."""
    figure, (losses, differences) = canvas(1, 2, (11, 4.2))
    for i, (label, values, relative) in enumerate(runs):
        colour = SERIES[i % len(SERIES)]
        losses.plot(steps, values, color=colour, linewidth=2.4 - 1.6 * i / max(len(runs) - 1, 1), label=label)
        if i and any(relative):
            shown = [value or float("nan") for value in relative]  # a log scale has no zero
            differences.plot(steps, shown, ".-", color=colour, linewidth=1, markersize=3, label=label)
    losses.set(title="loss", xlabel="step")
    losses.legend()
    same = [label for label, _, relative in runs[1:] if not any(relative)]
    note = f"\nno difference at any step: {', '.join(same)}" if same else ""
    differences.set(title=f"difference from {runs[0][0]}, relative{note}", xlabel="step")
    if len(same) < len(runs) - 1:
        differences.set_yscale("log")
        differences.legend()
    return png(figure)


def _by_ttt_step(axes: Axes, train: Sequence[Line], held_out: Sequence[Line], name: str) -> None:
    from matplotlib import colormaps

    count = len((train or held_out)[0][name])
    for k in range(count):
        colour = colormaps["viridis"](0.9 * k / max(count - 1, 1))
        _curve(axes, train, lambda line, k=k: line[name][k], colour, f"k={k}", raw=False)
        _points(axes, held_out, lambda line, k=k: line[name][k], colour, None if train else f"k={k}", "")
    axes.legend(ncol=2, fontsize=7)


def _curve(
    axes: Axes, lines: Sequence[Line], value: Callable[[Line], float], colour: Any, label: str | None, style: str = "-", raw: bool = True
) -> None:
    """A smoothed curve, over its faint raw values."""
    if not lines:
        return
    values = np.array([value(line) for line in lines], float)
    if raw and len(values) > 10:
        axes.plot(_steps(lines), values, color=colour, alpha=0.2, linewidth=0.8)
    axes.plot(_steps(lines), smooth(values), style, color=colour, linewidth=1.6, label=label)


def _points(
    axes: Axes, lines: Sequence[Line], value: Callable[[Line], float], colour: Any, label: str | None, style: str = "-"
) -> None:
    axes.plot(_steps(lines), [value(line) for line in lines], f"o{style}", color=colour, markersize=4, linewidth=1, label=label)


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred mean over about a twentieth of the curve, over half of that at its ends."""
    half = len(values) // 40
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    first, last = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def _steps(lines: Sequence[Line]) -> list[int]:
    return [line["step"] for line in lines]


def canvas(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """A figure of the house's look, made without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns).flat)
    for one in axes:
        one.grid(color=GRID, linewidth=0.8)
        one.set_axisbelow(True)
        one.spines[["top", "right"]].set_visible(False)
        one.spines[["left", "bottom"]].set_color("#b8c0c8")
        one.tick_params(labelsize=8, colors=INK)
    return figure, axes


def png(figure: Figure) -> bytes:
    """The picture's bytes, its texts in the house's sizes."""
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
