"""The table and the picture of a serving benchmark (serving.json of tools/bench_serving.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from eagle_ds.reporting.figures import HELD_OUT, INK, TRAIN, bucket_name, canvas, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Level = Mapping[str, Any]
WITH, WITHOUT = TRAIN, "#9aa5b1"  # colours of speculation and of plain decoding
HEADINGS = (
    "", "requests", "acceptance", "by position %", "tokens/s", "ratio", "first token ms", "p99",
    "between ms", "p99",
)


def speedup(level: Level, baseline: Sequence[Level]) -> float | None:
    """Return tokens/s of a level / tokens/s without speculation at the same concurrency, if measured."""
    for other in baseline:
        if other["concurrency"] == level["concurrency"]:
            return level["tokens_per_s"] / other["tokens_per_s"]
    return None


def serving_table(result: Mapping[str, Any]) -> str:
    """Format all levels, and their buckets of context length, as text."""
    baseline = result["baseline_levels"]
    rows = [HEADINGS]
    for level in result["levels"]:
        rows.append(_row(f"{level['concurrency']} at once", level, speedup(level, baseline)))
        rows += [_row(f"  {_context(one)}", one, None) for one in level["by_context"]]
    for level in baseline:
        rows.append(_row(f"{level['concurrency']} without", level, None))
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADINGS))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip())
    return "\n".join(lines)


def _row(name: str, figures: Level, ratio: float | None) -> tuple[str, ...]:
    def ms(key: str, which: str) -> str:
        return f"{figures[key][which]:.1f}" if figures[key] else "-"

    length, positions = figures.get("acceptance_length"), figures.get("acceptance_by_position")
    return (
        name, str(figures["requests"]), "-" if length is None else f"{length:.3f}",
        " ".join(f"{100 * a:.0f}" for a in positions) if positions else "-",
        f"{figures['tokens_per_s']:.1f}" if "tokens_per_s" in figures else "",
        "" if ratio is None else f"{ratio:.2f}x",
        ms("first_token_ms", "median"), ms("first_token_ms", "p99"),
        ms("between_tokens_ms", "median"), ms("between_tokens_ms", "p99"),
    )


def _context(bucket: Level) -> str:
    return f"context {bucket_name(bucket['from'], bucket['to'] or float('inf'))}"


def serving_figure(result: Mapping[str, Any]) -> bytes:
    """Draw a serving.json: acceptance by position and by context, tokens/s, and waiting times."""
    figure, (positions, contexts, speeds, waits) = canvas(2, 2, (11, 7.2))
    levels, baseline = result["levels"], result["baseline_levels"]
    _positions(positions, levels)
    _contexts(contexts, levels[0])
    _speeds(speeds, levels, baseline)
    _waits(waits, levels, baseline)
    server = result["server"]
    about = f"{result['num_prompts']} prompts, at most {result['max_new_tokens']} new tokens, greedy"
    title = f"{server['engine']} {server['version']} serving {server['model']}\n{about}"
    figure.suptitle(title, fontsize=11, color=INK)
    return png(figure)


def _positions(axes: Axes, levels: Sequence[Level]) -> None:
    known = [level for level in levels if level.get("acceptance_by_position")]
    for level in known[:1]:
        at = range(1, len(level["acceptance_by_position"]) + 1)
        axes.plot(at, level["acceptance_by_position"], "o-", color=WITH, label="if reached")
        axes.plot(at, level["cumulative_by_position"], "o:", color=WITH, label="of all passes")
        axes.set_xticks(list(at))
        axes.legend()
    title = "acceptance by draft position" + ("" if known else " (not reported)")
    axes.set(title=title, xlabel="draft position", ylim=(0, 1.02))


def _contexts(axes: Axes, level: Level) -> None:
    known = [bucket for bucket in level["by_context"] if "acceptance_length" in bucket]
    names = [bucket_name(one["from"], one["to"] or float("inf")) for one in known]
    bars = axes.bar(names, [one["acceptance_length"] for one in known], 0.6, color=WITH)
    axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
    axes.axhline(1, color=INK, linewidth=0.8, linestyle=":")
    whole = level.get("acceptance_length")
    title = "acceptance length by prompt length" + (f" (all: {whole:.3f})" if whole else " (not reported)")
    axes.set(title=title, xlabel="tokens of the prompt")
    axes.margins(y=0.15)


def _speeds(axes: Axes, levels: Sequence[Level], baseline: Sequence[Level]) -> None:
    ticks = sorted({level["concurrency"] for level in (*levels, *baseline)})
    for shift, some, colour, name in ((-0.2, baseline, WITHOUT, "without"), (0.2, levels, WITH, "with")):
        at = [ticks.index(level["concurrency"]) + shift for level in some]
        bars = axes.bar(at, [level["tokens_per_s"] for level in some], 0.38, color=colour, label=name)
        axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=7)
    axes.set_xticks(range(len(ticks)), [str(tick) for tick in ticks])
    axes.set(title="tokens/s with and without speculation", xlabel="requests at once")
    axes.legend()
    axes.margins(y=0.15)


def _waits(axes: Axes, levels: Sequence[Level], baseline: Sequence[Level]) -> None:
    lines = (("first_token_ms", HELD_OUT, "first token"), ("between_tokens_ms", WITH, "between tokens"))
    for key, colour, name in lines:
        for some, style, suffix in ((levels, "o-", ""), (baseline, "o:", ", without")):
            known = [level for level in some if level[key]]
            if known:
                at = [level["concurrency"] for level in known]
                medians = [level[key]["median"] for level in known]
                axes.plot(at, medians, style, color=colour, label=name + suffix)
    axes.set(title="median waiting time", xlabel="requests at once", ylabel="ms", yscale="log")
    axes.legend()
