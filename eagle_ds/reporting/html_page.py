"""Parts of the HTML pages that reports and previews write. A page is one file and loads nothing."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence

STYLE = """
:root { --ink: #1f2933; --soft: #65717d; --line: #e3e8ec; --tile: #f6f8fa; --accent: #2f6fb2; }
body { font: 15px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; color: var(--ink); }
body { max-width: 1080px; margin: 2.2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.55rem; margin: 0 0 .2rem; } summary { cursor: pointer; color: var(--accent); }
h2 { font-size: 1.12rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--line); }
p.sub, .note { color: var(--soft); margin: .2rem 0 1rem; } img { width: 100%; height: auto; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: .8rem; }
.tile, pre { background: var(--tile); border: 1px solid var(--line); border-radius: 8px; padding: .7rem; }
.tile b { display: block; font-size: 1.3rem; color: var(--accent); }
.tile span { color: var(--soft); font-size: .85rem; } pre { overflow-x: auto; font-size: .84rem; }
table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .3rem .9rem .3rem 0; text-align: left; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 500; }
"""


def page(title: str, body: Iterable[str], style: str = "") -> str:
    """Return a whole page.

    Args:
        title: plain text.
        body: HTML of its parts.
        style: CSS in addition to that of all pages.
    """
    head = f'<meta charset="utf-8"><title>{escaped(title)}</title><style>{STYLE}{style}</style>'
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(body)}</body></html>\n"


def section(title: str, inside: str) -> str:
    """Return a section. ``inside`` is HTML."""
    return f"<h2>{title}</h2>{inside}"


def tiles(figures: Sequence[tuple[str, str]]) -> str:
    """Return boxes of (figure, meaning)."""
    boxes = (f"<div class=tile><b>{escaped(a)}</b><span>{escaped(b)}</span></div>" for a, b in figures)
    return f"<div class=tiles>{''.join(boxes)}</div>"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return an HTML table; the first row holds the headings."""
    lines = []
    for row in rows:
        tag = "td" if lines else "th"
        lines.append("".join(f"<{tag}>{escaped(cell)}</{tag}>" for cell in row))
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def image(png: bytes, what: str) -> str:
    """Return a picture inside the page."""
    return f'<img alt="{what}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def escaped(words: str) -> str:
    """Return text as HTML."""
    return html.escape(words)
