"""The bar chart of a run of tools/bench_io.py."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from eagle_ds.reporting.figures import GRID, INK

OURS, OTHERS = "#2f6fb2", "#b8c0c8"


def io_figure(document: Mapping[str, Any]) -> bytes:
    """PNG: size, write speed and read time of each format, at the longest length that was measured."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    longest = max(record["num_tokens"] for record in document["measurements"])
    records = [record for record in document["measurements"] if record["num_tokens"] == longest]
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = (
        ("file size, % of raw", [100 * (1 - record["saved"]) for record in records], "%.1f", "linear"),
        ("written, MB/s per core", [record["raw_bytes"] / 1e6 / record["write"]["cpu_s"] for record in records], "%.0f", "log"),
        (f"one rank of {records[0]['ranks']} reads its rows, s", [record["read_warm"]["wall_s"] for record in records], "%.2f", "log"),
    )
    for axes, (title, values, form, scale) in zip(figure.subplots(1, 3, sharey=True), panels, strict=True):
        _bars(axes, title, [record["title"] for record in records], values, form, scale)
    where = f"{longest // 1024}K tokens, H = {document['width']}, {document['hardware']}, {document['date']}"
    figure.suptitle(where, fontsize=11, color=INK)
    stream = io.BytesIO()
    figure.savefig(stream, dpi=110)
    return stream.getvalue()


def _bars(axes: Any, title: str, names: Sequence[str], values: Sequence[float], form: str, scale: str) -> None:
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
    if not axes.yaxis_inverted():
        axes.invert_yaxis()
