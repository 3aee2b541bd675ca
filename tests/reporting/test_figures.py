"""The comparison of runs stays readable: every run has a style of its own, and the legend covers no curve."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from eagle_ds.reporting import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LAYOUTS = ("1", "U2", "R2 gather", "R2 p2p", "U2R2 gather", "U2R2 p2p", "U4", "R4 gather", "R4 p2p")


def comparison_of(labels: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Figure:
    """Draw two steps of runs with these labels, and return the figure instead of its bytes."""
    drawn: list[Figure] = []
    monkeypatch.setattr(figures, "png", drawn.append)
    runs = [(label, [2.0, 1.0], [1e-8 * i, 2e-8 * i]) for i, label in enumerate(labels)]
    figures.comparison_figure([1, 2], runs)
    return drawn[0]


def test_every_run_has_a_colour_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    losses, differences = comparison_of(LAYOUTS, monkeypatch).axes
    colours = {line.get_label(): line.get_color() for line in losses.lines}
    assert len(set(colours.values())) == len(colours) == len(LAYOUTS)
    assert {line.get_label(): line.get_color() for line in differences.lines} == {
        label: colours[label] for label in LAYOUTS[1:]
    }


def test_runs_beyond_the_number_of_colours_have_another_line_style(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = tuple(f"run {i}" for i in range(30))
    for axes in comparison_of(labels, monkeypatch).axes:
        styles = {(line.get_color(), line.get_linestyle()) for line in axes.lines}
        assert len(styles) == len(axes.lines)


def test_the_legend_of_a_comparison_names_all_runs_outside_the_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = comparison_of(LAYOUTS, monkeypatch)
    figure.draw_without_rendering()  # computes the layout
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(LAYOUTS)
    below = figure.legends[0].get_window_extent()
    for axes in figure.axes:
        assert axes.get_legend() is None
        assert not below.overlaps(axes.get_tightbbox())
    assert below.x0 >= 0 and below.x1 <= figure.bbox.width
