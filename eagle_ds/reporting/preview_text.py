"""Show a preview of conversations as text for a terminal, or as an HTML page."""

from __future__ import annotations

import re
from itertools import zip_longest
from pathlib import Path

import numpy as np

from eagle_ds.config.outputs import check_output_file
from eagle_ds.estimate.plan_files import table
from eagle_ds.reporting import html_page
from eagle_ds.reporting.html_page import escaped
from eagle_ds.reporting.preview import Piece, Preview, Shown
from eagle_ds.store.summary import histogram

EDGE_CHARACTERS = 1000  # shown at both ends of a long piece; the HTML page shows all of it
LISTED = 10  # truncated and rejected records that are listed one by one
BAR_WIDTH = 40  # characters of the longest bar

# Control characters but newline and tab, and those that turn the direction of writing
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
GREEN, FAINT, RESET = "\x1b[32m", "\x1b[2m", "\x1b[0m"
MARKS = ("⟦", "⟧")  # around trained tokens where there is no colour

STYLE = """
pre.chat { white-space: pre-wrap; overflow-wrap: anywhere; }
mark { background: #c9ecd0; border-radius: 3px; } del { color: #a0a8b0; }
"""


def preview_text(found: Preview, *, colour: bool) -> str:
    """Return the conversations with their trained tokens marked, and the summary.

    Args:
        colour: mark with the colours of a terminal, else with brackets.
    """
    legend = f"{GREEN}green{RESET}" if colour else f"between {MARKS[0]} and {MARKS[1]}"
    parts = [f"trained tokens are {legend}\n"] if found.shown else []
    parts += [_conversation(shown, colour) for shown in found.shown]
    parts += [_summary(found), _histogram(found), _listed(found)]
    return "\n".join(part for part in parts if part)


def write_preview(found: Preview, path: Path) -> None:
    """Write the preview as an HTML page, with whole conversations and what ``max_length`` cuts off.

    Raises ValueError if the file cannot be written.
    """
    check_output_file(path, "--html")
    chats = "".join(
        f"<h3>{escaped(shown.name)}</h3><p class=note>{escaped(_counts(shown))}</p>"
        f"<pre class=chat>{''.join(map(_html_piece, shown.pieces))}</pre>"
        for shown in found.shown
    )
    rows = [["tokens", "samples", ""], *([*bin_, bar] for *bin_, bar in _bins(found))]
    body = [
        f"<h1>{escaped(str(found.job.conversations))}</h1>",
        f"<p class=sub>as training for {escaped(found.job.target)} sees it</p>",
        html_page.table([["", ""], *summary_rows(found)]),
        html_page.section("Lengths, before max_length", html_page.table(rows)),
        html_page.section("Not used whole", html_page.table([["record", "what happens"], *_problems(found)])),
        html_page.section("Conversations", "<p class=note>Trained tokens have a green ground; what "
                          f"max_length cuts off is struck through.</p>{chats}"),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html_page.page(f"preview of {found.job.conversations}", body, STYLE), encoding="utf-8")


def summary_rows(found: Preview) -> list[tuple[str, str]]:
    """Return (name, value) of the figures to check before a capture."""
    job, cut = found.job, [one for one in found.overlong if not one.skipped]
    skipped = [one for one in found.overlong if one.skipped]
    trained = f"{found.trained_tokens:,} trained ({found.trained_share:.1%})"
    rows = [
        *zip_longest(["read"], found.stats.parts(), fillvalue=""),
        ("samples to train on", f"{found.used:,}"),
        ("tokens", f"{found.used_tokens:,}, of which {trained}"),
    ]
    if job.max_length is not None:
        lost = sum(one.trained_lost for one in cut)
        how_many = f"{len(cut):,} samples to {job.max_length:,} tokens"
        rows.append(("truncated", f"{how_many}; {lost:,} trained tokens lost"))
        lost = sum(one.trained_lost for one in skipped)
        why = "longer than max_length" if job.overlong == "skip" else "no answer within max_length"
        rows.append(("skipped", f"{len(skipped):,} samples, {why}; {lost:,} trained tokens lost"))
    per_minute = 60 * found.records / max(found.seconds, 1e-9)
    speed = f"{found.seconds:.1f} s, {per_minute:,.0f} records a minute"
    reasons = ", ".join(f"{count} {reason}" for reason, count in found.reasons.most_common())
    rows.append(("rejected", f"{len(found.intake.rejected):,}{f' ({reasons})' if reasons else ''}"))
    rows.append(("time", speed))
    rows.append(("different trained tokens", f"{found.distinct_tokens:,}"))
    for size, share in found.coverage.items():
        chosen = " (chosen)" if size == found.vocab_size else ""
        rows.append((f"draft vocabulary of {size:,}{chosen}", f"covers {share:.2%} of the trained tokens"))
    return rows


def visible(text: str) -> str:
    """Replace characters that would control a terminal or turn the writing direction."""
    return CONTROL.sub(lambda found: f"<U+{ord(found[0]):04X}>", text)


def _conversation(shown: Shown, colour: bool) -> str:
    text = "".join(_text_piece(piece, colour) for piece in shown.pieces if piece.kept)
    cut, trained = shown.count(kept=False), shown.count(kept=False, trained=True)
    end = f"\n[max_length cuts off {cut:,} tokens, {trained:,} of them trained]" if cut else ""
    return f"--- {visible(shown.name)}: {_counts(shown)}\n{text}{end}\n"


def _summary(found: Preview) -> str:
    rows = [("summary", ""), *summary_rows(found)]
    width = max(len(name) for name, _ in rows)
    return "".join(f"{name:<{width}}  {value}".rstrip() + "\n" for name, value in rows)


def _counts(shown: Shown) -> str:
    return f"{shown.count(kept=True):,} tokens, {shown.count(kept=True, trained=True):,} trained"


def _text_piece(piece: Piece, colour: bool) -> str:
    text = piece.text
    if (hidden := len(text) - 2 * EDGE_CHARACTERS) > 0:
        head, tail = visible(text[:EDGE_CHARACTERS]), visible(text[-EDGE_CHARACTERS:])
        text = f"{head}\n[... {hidden:,} characters ...]\n{tail}"
    else:
        text = visible(text)
    if not piece.trained:
        return f"{FAINT}{text}{RESET}" if colour else text
    return f"{GREEN}{text}{RESET}" if colour else f"{MARKS[0]}{text}{MARKS[1]}"


def _html_piece(piece: Piece) -> str:
    text = escaped(piece.text)
    text = f"<mark>{text}</mark>" if piece.trained else text
    return text if piece.kept else f"<del>{text}</del>"


def _bins(found: Preview) -> list[tuple[str, str, str]]:
    """Return (lengths, samples, bar) of each bin of the histogram."""
    bins = histogram(np.array(found.lengths, np.int64))
    most = max((count for *_, count in bins), default=1)
    return [
        (f"{low:,} to {high - 1:,}", f"{count:,}", "#" * round(BAR_WIDTH * count / most))
        for low, high, count in bins
    ]


def _histogram(found: Preview) -> str:
    if not found.lengths:
        return ""
    return "tokens of a sample, before max_length\n" + table(_bins(found))


def _problems(found: Preview) -> list[tuple[str, str]]:
    """Return (record, what happens) of every record that is rejected, skipped or truncated."""
    lines = []
    for rejected in found.intake.rejected:
        record = f"line {rejected.line}" + (f" ({rejected.id})" if rejected.id else "")
        lines.append((record, f"rejected, {rejected.reason}: {rejected.detail}"))
    for line in found.skipped_lines:
        lines.append((f"line {line}", "skipped: it has no answer, or repeats an earlier record"))
    for one in found.overlong:
        fate = "skipped" if one.skipped else "truncated"
        lost = f"{one.trained_lost:,} trained tokens lost"
        lines.append((one.name, f"{fate}: {one.num_tokens:,} tokens, {lost}"))
    return lines


def _listed(found: Preview) -> str:
    """List the first rejected records, and the first that are skipped or longer than max_length."""
    lines, rejected = _problems(found), len(found.intake.rejected)
    chosen = [*lines[:rejected][:LISTED], *lines[rejected:][:LISTED]]
    text = "".join(f"{visible(record)}: {visible(what)}\n" for record, what in chosen)
    more = len(lines) - len(chosen)
    return text + (f"... and {more:,} more; --html lists all\n" if more else "")
