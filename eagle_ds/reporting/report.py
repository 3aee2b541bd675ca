"""The report of a run: one HTML file with its pictures inside, made from the files that the run left.

Reads recipe.json, log.jsonl, eval.jsonl and, where they exist, acceptance.json and the exported draft; needs nothing else.
"""

from __future__ import annotations

import base64
import html
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eagle_ds.config.recipe import Recipe, load_recipe
from eagle_ds.config.run_folder import ACCEPTANCE, EVAL_LOG, EXPORTED, RECIPE_FILE, REPORT, STEP_LOG
from eagle_ds.config.settings import read_json
from eagle_ds.drafts.served import ServeCommands
from eagle_ds.reporting.figures import acceptance_figure, learning_figure, smooth, speed_figure

log = logging.getLogger(__name__)

WORTH_DRAFTING = 0.2  # a draft position that stands in fewer than a fifth of the passes seldom pays for itself
STYLE = """
:root { --ink: #1f2933; --soft: #65717d; --line: #e3e8ec; --tile: #f6f8fa; --accent: #2f6fb2; }
body { font: 15px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; color: var(--ink); }
body { max-width: 1080px; margin: 2.2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.55rem; margin: 0 0 .2rem; } h2 { font-size: 1.12rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--line); }
p.sub, .note { color: var(--soft); margin: .2rem 0 1rem; } img { width: 100%; height: auto; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: .8rem; margin: 1.2rem 0; }
.tile { background: var(--tile); border: 1px solid var(--line); border-radius: 8px; padding: .7rem .9rem; }
.tile b { display: block; font-size: 1.3rem; font-weight: 650; color: var(--accent); } .tile span { color: var(--soft); font-size: .85rem; }
table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .9rem .3rem 0; text-align: left; border-bottom: 1px solid var(--line); font-size: .92rem; }
th { color: var(--soft); font-weight: 500; }
pre { background: var(--tile); border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem; overflow-x: auto; }
pre { font-size: .84rem; line-height: 1.45; }
summary { cursor: pointer; color: var(--accent); }
"""


@dataclass
class Run:
    """What a run folder holds."""

    folder: Path
    recipe: Recipe
    train: list[dict[str, Any]] = field(default_factory=list)
    held_out: list[dict[str, Any]] = field(default_factory=list)
    acceptance: dict[str, Any] | None = None

    @classmethod
    def read(cls, folder: str | Path) -> Run:
        """Raises ValueError if ``folder`` is no run, or its files cannot be read."""
        folder = Path(folder)
        if not (folder / RECIPE_FILE).is_file():
            raise ValueError(f"{folder} is no run folder (it has no recipe.json); give the one that a recipe made, such as runs/NAME")
        measured = folder / ACCEPTANCE
        return cls(
            folder,
            load_recipe(folder / RECIPE_FILE),
            read_lines(folder / STEP_LOG),
            read_lines(folder / EVAL_LOG),
            read_json(measured) if measured.is_file() else None,
        )

    @property
    def exported(self) -> Path:
        """The folder that SGLang serves (there only after an export)."""
        return self.folder / EXPORTED

    @property
    def num_steps(self) -> int:
        """Draft positions worth a pass of the draft, by the measured acceptance; 3 where nothing was measured."""
        if not self.acceptance:
            return 3
        cumulative = self.acceptance["drafts"][-1]["cumulative_by_position"]
        return max(sum(share >= WORTH_DRAFTING for share in cumulative), 1)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Records of a JSONL file, ordered by step, the last of a repeated step; a torn last line is left out."""
    if not path.is_file():
        return []
    lines = {}
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        if not text.endswith("\n"):
            break
        try:
            line = json.loads(text)
            lines[line["step"]] = line
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is no record of a step: {error}") from error
    return [lines[step] for step in sorted(lines)]


def write_report(folder: str | Path) -> Path:
    """Write ``report.html`` into the run folder and return its path. Raises ValueError if there is nothing to report."""
    run = Run.read(folder)
    if not run.train and not run.held_out and not run.acceptance:
        raise ValueError(f"{run.folder} has no log.jsonl, eval.jsonl or acceptance.json yet; train first")
    out = run.folder / REPORT
    temp = out.with_name(f".{REPORT}")
    temp.write_text(render(run), encoding="utf-8")
    temp.replace(out)
    log.info("wrote %s", out)
    return out


def render(run: Run) -> str:
    """The whole page."""
    recipe = run.recipe
    what = f"{recipe.target.model} · {recipe.data.max_length} tokens · Ulysses {recipe.parallel.ulysses} x ring {recipe.parallel.ring}"
    body = [
        f"<h1>EAGLE-3 draft: {_text(recipe.name)}</h1><p class=sub>{_text(what)}</p>",
        _tiles(_acceptance_headlines(run) + _training_headlines(run)),
        _acceptance_section(run),
    ]
    if run.train or run.held_out:
        body.append(_section("Learning", _image(learning_figure(run.train, run.held_out), "learning curves")))
    if run.train:
        body.append(_section("Speed and memory", _speed_table(run.train) + _image(speed_figure(run.train), "speed and memory")))
    resolved = _text(recipe.model_dump_json(indent=2))
    body += [_serving_section(run), _section("Recipe", f"<details><summary>resolved recipe</summary><pre>{resolved}</pre></details>")]
    title = f"<title>{_text(recipe.name)}: EAGLE-3 draft</title>"
    head = f'<!doctype html><html lang=en><head><meta charset="utf-8">{title}<style>{STYLE}</style></head>'
    return f"{head}<body>{''.join(body)}</body></html>\n"


def _acceptance_headlines(run: Run) -> list[tuple[str, str]]:
    """(figure, what it is) of the measured acceptance."""
    if not run.acceptance:
        return []
    drafts = run.acceptance["drafts"]
    lengths = " → ".join(f"{draft['acceptance_length']:.2f}" for draft in drafts)
    found = [(lengths, "acceptance length, " + " → ".join(draft["name"] for draft in drafts))]
    for gain in run.acceptance["differences"][:1]:
        found.append((f"{gain['value']:+.2f}", f"gain, {100 * gain['level']:.0f}% interval [{gain['low']:+.2f}, {gain['high']:+.2f}]"))
    if "speedup" in drafts[-1]:
        found.append((f"{drafts[-1]['speedup']:.2f}x", "speed against plain decoding here (transformers)"))
    return found


def _training_headlines(run: Run) -> list[tuple[str, str]]:
    """(figure, what it is) of the logs."""
    found: list[tuple[str, str]] = []
    if run.held_out:
        first, last, best = run.held_out[0], run.held_out[-1], max(run.held_out, key=lambda line: line["simulated_length"])
        lengths = f"{first['simulated_length']:.2f} → {best['simulated_length']:.2f}"
        found.append((lengths, f"simulated length held out, step {first['step']} → {best['step']} (best)"))
        found.append((f"{first['kl']:.2f} → {last['kl']:.2f}", "KL held out, first → last"))
    if run.train:
        found.append((f"{run.train[-1]['step']:,}", f"steps, {_duration(training_seconds(run.train))}"))
        found.append((f"{median(run.train, 'tokens_per_s'):,.0f}", "tokens/s, median"))
        found.append((f"{max(line['peak_gib'] for line in run.train):.1f} GiB", "peak memory of a process"))
    return found


def _acceptance_section(run: Run) -> str:
    if not run.acceptance:
        command = f"tools/eval_acceptance.py --recipe {run.folder}/recipe.json --baseline untrained"
        return _section("Acceptance", f"<p class=note>Not measured by real decoding yet. Measure it:</p><pre>{_text(command)}</pre>")
    found = run.acceptance
    rows = [["draft", "acceptance length", "95% interval", "by draft position, if reached", "tokens/s", "speedup", "as plain"]]
    for draft in found["drafts"]:
        interval, same = draft["interval"], draft.get("identical_answers")
        rows.append(
            [
                draft["name"],
                f"{draft['acceptance_length']:.3f}",
                f"{interval['low']:.3f} to {interval['high']:.3f}",
                " ".join(f"{100 * share:.0f}" for share in draft["acceptance_by_position"]) + " %",
                f"{draft['tokens_per_s']:.1f}",
                f"{draft['speedup']:.2f}x" if "speedup" in draft else "",
                f"{same} of {found['num_prompts']}" if same is not None else "",
            ]
        )
    how = (
        f"Greedy speculative decoding of {found['num_prompts']} prompts of {found['prompts_file']}, up to {found['max_new_tokens']} new "
        f"tokens, {found['num_draft_tokens']} draft tokens a pass, {found['dtype']} on {found['device']}{_processes(found)}. Acceptance "
        "length is tokens per pass of the target, its own included; intervals are bootstrapped over prompts. Speed is transformers' own, "
        "not a server's."
    )
    gaps = "; ".join(f"{name}: largest logit gap {gap:.4f}" for name, gap in _largest_gaps(found))
    diverged = f"<p class=note>Answers that left plain decoding at a near tie: {_text(gaps)}.</p>" if gaps else ""
    picture = _image(acceptance_figure(found), "acceptance")
    return _section("Acceptance", f"{_table(rows)}{diverged}{picture}<p class=note>{_text(how)}</p>")


def _processes(found: Mapping[str, Any]) -> str:
    count = found.get("processes", 1)
    return f", {count} processes side by side" if count > 1 else ""


def _largest_gaps(found: Mapping[str, Any]) -> list[tuple[str, float]]:
    return [(draft["name"], max(d["gap"] for d in draft["divergences"])) for draft in found["drafts"] if draft.get("divergences")]


def _speed_table(train: Sequence[Mapping[str, Any]]) -> str:
    waits, seconds = sum(line["data_wait_s"] for line in train), sum(line["step_s"] for line in train)
    rows = [["tokens/s, median", "seconds per step, median", "waiting for data", "peak memory", "last training loss, smoothed"]]
    rows.append(
        [
            f"{median(train, 'tokens_per_s'):,.0f}",
            f"{median(train, 'step_s'):.2f}",
            f"{100 * waits / seconds if seconds else 0:.1f} % of the time",
            f"{max(line['peak_gib'] for line in train):.2f} GiB",
            f"{smooth_last(train, 'loss'):.4f}",
        ]
    )
    return _table(rows)


def _serving_section(run: Run) -> str:
    commands = ServeCommands(run.recipe.target.model, run.exported, run.num_steps, run.recipe.draft.sliding_window)
    tokens = f"{run.num_steps} draft token{'s' if run.num_steps > 1 else ''} a pass"
    why = f"{tokens}: those that stand in at least {100 * WORTH_DRAFTING:.0f}% of the passes measured here."
    if not run.acceptance:
        why = f"{tokens} until acceptance is measured."
    vllm = ServeCommands(run.recipe.target.model, f"{run.exported}-vllm", run.num_steps, run.recipe.draft.sliding_window).vllm
    lines = [
        f"<p class=note>{_text(why)}</p><h3>Export</h3>",
        f"<pre>tools/export_draft.py {_text(str(run.folder))}\ntools/export_draft.py {_text(str(run.folder))} --vllm</pre>",
        f"<h3>SGLang</h3><pre>{_text(commands.sglang)}</pre><h3>vLLM</h3><pre>{_text(vllm)}</pre>",
    ]
    return _section("Serve it", "".join(lines))


def median(lines: Sequence[Mapping[str, Any]], name: str) -> float:
    """Median of one value over the lines."""
    values = sorted(line[name] for line in lines)
    return values[len(values) // 2]


def smooth_last(lines: Sequence[Mapping[str, Any]], name: str) -> float:
    """Mean of one value over the last twentieth of the lines."""
    import numpy as np

    tail = lines[-max(len(lines) // 20, 1) :]
    return float(smooth(np.array([line[name] for line in tail])).mean())


def training_seconds(train: Sequence[Mapping[str, Any]]) -> float:
    """Seconds of training steps alone, without evaluating and saving; a line stands for the steps since the line before it."""
    steps = [0, *(line["step"] for line in train)]
    return sum(line["step_s"] * (now - before) for line, before, now in zip(train, steps[:-1], steps[1:], strict=True))


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _section(title: str, inside: str) -> str:
    return f"<h2>{title}</h2>{inside}"


def _tiles(figures: Sequence[tuple[str, str]]) -> str:
    return "<div class=tiles>" + "".join(f"<div class=tile><b>{_text(a)}</b><span>{_text(b)}</span></div>" for a, b in figures) + "</div>"


def _table(rows: Sequence[Sequence[str]]) -> str:
    tags = ["th"] + ["td"] * (len(rows) - 1)
    lines = ("".join(f"<{tag}>{_text(cell)}</{tag}>" for cell in row) for tag, row in zip(tags, rows, strict=True))
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _image(png: bytes, what: str) -> str:
    return f'<img alt="{what}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _text(text: str) -> str:
    return html.escape(text)
