"""Write the report of a run: one HTML file with its pictures inside.

Reads recipe.json, log.jsonl and eval.jsonl of the run folder and, if they exist, acceptance.json and the
exported draft. Needs nothing else.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median_high
from typing import Any

import numpy as np

from eagle_ds.config.recipe import Recipe, load_recipe
from eagle_ds.config.run_folder import (
    ACCEPTANCE,
    EVAL_LOG,
    EXPORTED,
    EXPORTED_VLLM,
    RECIPE_FILE,
    REPORT,
    STEP_LOG,
)
from eagle_ds.config.settings import read_json
from eagle_ds.drafts.serve_commands import ServeCommands
from eagle_ds.drafts.serving_format import sglang_obstacles
from eagle_ds.model.arch import DraftArch
from eagle_ds.reporting.figures import acceptance_figure, learning_figure, smooth, speed_figure
from eagle_ds.reporting.html_page import escaped, image, page, section, table, tiles

logger = logging.getLogger(__name__)

WORTH_DRAFTING = 0.2
"""A draft position is worth its pass of the draft if its token is accepted in at least this share of the
passes.
"""


@dataclass
class Run:
    """The contents of a run folder."""

    folder: Path
    recipe: Recipe
    train: list[dict[str, Any]] = field(default_factory=list)
    held_out: list[dict[str, Any]] = field(default_factory=list)
    acceptance: dict[str, Any] | None = None

    @classmethod
    def read(cls, folder: str | Path) -> Run:
        """Read a run folder. Raises ValueError if ``folder`` is not one, or its files cannot be read."""
        folder = Path(folder)
        if not (folder / RECIPE_FILE).is_file():
            found = f"{folder} is not a run folder: it has no {RECIPE_FILE}"
            raise ValueError(f"{found}; give the folder that a recipe made, such as runs/NAME")
        measured, logs = folder / ACCEPTANCE, [read_lines(folder / name) for name in (STEP_LOG, EVAL_LOG)]
        acceptance = read_json(measured) if measured.is_file() else None
        return cls(folder, load_recipe(folder / RECIPE_FILE), *logs, acceptance)

    @property
    def only_vllm(self) -> bool:
        """Whether SGLang cannot serve this draft."""
        arch = DraftArch.from_recipe(self.recipe)
        return bool(sglang_obstacles(arch, self.recipe.target.aux_ids, None))

    @property
    def exported(self) -> Path:
        """The folder that engines serve; it exists only after an export."""
        return self.folder / (EXPORTED_VLLM if self.only_vllm else EXPORTED)

    @property
    def num_steps(self) -> int:
        """Number of draft positions that are worth a pass of the draft; 3 if acceptance was not measured."""
        if not self.acceptance:
            return 3
        cumulative = self.acceptance["drafts"][-1]["cumulative_by_position"]
        return max(sum(share >= WORTH_DRAFTING for share in cumulative), 1)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the records of a JSONL file, ordered by step.

    Of a repeated step the last record counts. An incomplete last line is skipped. Raises ValueError for any
    other line that is not a record of a step.
    """
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
            raise ValueError(f"{path}, line {number} is not a record of a step: {error}") from error
    return [lines[step] for step in sorted(lines)]


def write_report(folder: str | Path) -> Path:
    """Write ``report.html`` into the run folder; return its path. Raises ValueError without anything to
    report.
    """
    run = Run.read(folder)
    if not run.train and not run.held_out and not run.acceptance:
        raise ValueError(f"{run.folder} has no {STEP_LOG}, {EVAL_LOG} or {ACCEPTANCE} yet; train first")
    out = run.folder / REPORT
    temp = out.with_name(f".{REPORT}")
    temp.write_text(render(run), encoding="utf-8")
    temp.replace(out)
    logger.info("wrote %s", out)
    return out


def render(run: Run) -> str:
    """Return the whole page."""
    recipe, parallel = run.recipe, run.recipe.parallel
    layout = f"Ulysses {parallel.ulysses} x ring {parallel.ring}"
    what = f"{recipe.target.model} · {recipe.data.max_length} tokens · {layout}"
    body = [
        f"<h1>EAGLE-3 draft: {escaped(recipe.name)}</h1><p class=sub>{escaped(what)}</p>",
        tiles(_acceptance_headlines(run) + _training_headlines(run)),
        _acceptance_section(run),
    ]
    if run.train or run.held_out:
        body.append(section("Learning", image(learning_figure(run.train, run.held_out), "learning curves")))
    if run.train:
        picture = image(speed_figure(run.train), "speed and memory")
        body.append(section("Speed and memory", _speed_table(run.train) + picture))
    resolved = f"<pre>{escaped(recipe.model_dump_json(indent=2))}</pre>"
    details = f"<details><summary>resolved recipe</summary>{resolved}</details>"
    body += [_serving_section(run), section("Recipe", details)]
    return page(f"{recipe.name}: EAGLE-3 draft", body)


def _acceptance_headlines(run: Run) -> list[tuple[str, str]]:
    """Return (figure, meaning) of the measured acceptance."""
    if not run.acceptance:
        return []
    drafts = run.acceptance["drafts"]
    lengths = " → ".join(f"{draft['acceptance_length']:.2f}" for draft in drafts)
    found = [(lengths, "acceptance length, " + " → ".join(draft["name"] for draft in drafts))]
    for gain in run.acceptance["differences"][:1]:
        interval = f"{100 * gain['level']:.0f}% interval [{gain['low']:+.2f}, {gain['high']:+.2f}]"
        found.append((f"{gain['value']:+.2f}", f"gain, {interval}"))
    if "speedup" in drafts[-1]:
        found.append((f"{drafts[-1]['speedup']:.2f}x", "decoding speed / plain decoding (transformers)"))
    return found


def _training_headlines(run: Run) -> list[tuple[str, str]]:
    """Return (figure, meaning) of the logs."""
    found: list[tuple[str, str]] = []
    if run.held_out:
        first, last = run.held_out[0], run.held_out[-1]
        best = max(run.held_out, key=lambda line: line["simulated_length"])
        lengths = f"{first['simulated_length']:.2f} → {best['simulated_length']:.2f}"
        steps = f"step {first['step']} → {best['step']} (best)"
        found.append((lengths, f"simulated acceptance length on held-out data, {steps}"))
        found.append((f"{first['kl']:.2f} → {last['kl']:.2f}", "KL on held-out data, first → last"))
    if run.train:
        found.append((f"{run.train[-1]['step']:,}", f"steps, {_duration(training_seconds(run.train))}"))
        found.append((f"{_median(run.train, 'tokens_per_s'):,.0f}", "tokens/s, median"))
        found.append((f"{_peak_gib(run.train):.1f} GiB", "peak memory of the fullest process"))
    return found


def _acceptance_section(run: Run) -> str:
    if not run.acceptance:
        command = f"tools/eval_acceptance.py --recipe {run.folder}/{RECIPE_FILE} --baseline untrained"
        note = "<p class=note>Not yet measured by real decoding. To measure it, run:</p>"
        return section("Acceptance", f"{note}<pre>{escaped(command)}</pre>")
    found = run.acceptance
    headings = ["draft", "acceptance length", "95% interval", "acceptance by draft position, if reached"]
    rows = [[*headings, "tokens/s", "speedup", "answers equal to plain decoding"]]
    rows += [_acceptance_row(draft, found["num_prompts"]) for draft in found["drafts"]]
    processes = f" in {found['processes']} processes" if found.get("processes", 1) > 1 else ""
    how = (
        f"Greedy speculative decoding of {found['num_prompts']} prompts from {found['prompts_file']}: up to "
        f"{found['max_new_tokens']} new tokens, {found['num_draft_tokens']} draft tokens per pass, "
        f"{found['dtype']} on {found['device']}{processes}. Acceptance length is the number of tokens per "
        "pass of the target, including its own token. Intervals are bootstrapped over prompts. Speed is that "
        "of transformers, not of a serving engine."
    )
    gaps = []
    for draft in found["drafts"]:
        if draft.get("divergences"):
            gap = max(divergence["gap"] for divergence in draft["divergences"])
            gaps.append(f"{draft['name']}: largest logit gap {gap:.4f}")
    near_ties = f"Some answers differ from plain decoding where two logits nearly tie: {'; '.join(gaps)}."
    diverged = f"<p class=note>{escaped(near_ties)}</p>" if gaps else ""
    picture = image(acceptance_figure(found), "acceptance")
    return section("Acceptance", f"{table(rows)}{diverged}{picture}<p class=note>{escaped(how)}</p>")


def _acceptance_row(draft: Mapping[str, Any], num_prompts: int) -> list[str]:
    interval, same = draft["interval"], draft.get("identical_answers")
    return [
        draft["name"],
        f"{draft['acceptance_length']:.3f}",
        f"{interval['low']:.3f} to {interval['high']:.3f}",
        " ".join(f"{100 * share:.0f}" for share in draft["acceptance_by_position"]) + " %",
        f"{draft['tokens_per_s']:.1f}",
        f"{draft['speedup']:.2f}x" if "speedup" in draft else "",
        f"{same} of {num_prompts}" if same is not None else "",
    ]


def _speed_table(train: Sequence[Mapping[str, Any]]) -> str:
    waits, seconds = sum(line["data_wait_s"] for line in train), sum(line["step_s"] for line in train)
    # The mean of the smoothed loss over the last twentieth of the lines.
    tail = train[-max(len(train) // 20, 1) :]
    last_loss = smooth(np.array([line["loss"] for line in tail])).mean()
    figures = {
        "tokens/s, median": f"{_median(train, 'tokens_per_s'):,.0f}",
        "seconds per step, median": f"{_median(train, 'step_s'):.2f}",
        "waiting for data": f"{100 * waits / seconds if seconds else 0:.1f} % of the time",
        "peak memory": f"{_peak_gib(train):.2f} GiB",
        "last training loss, smoothed": f"{last_loss:.4f}",
    }
    return table([list(figures), list(figures.values())])


def _serving_section(run: Run) -> str:
    recipe, only_vllm = run.recipe, run.only_vllm
    if (run.exported / "config.json").is_file():
        commands = ServeCommands.for_folder(recipe.target.model, run.exported, run.num_steps)
    else:  # The export may add the flag of a context length.
        window = recipe.draft.sliding_window
        commands = ServeCommands(recipe.target.model, run.exported, run.num_steps, window)
    tokens = f"{run.num_steps} draft token{'s' if run.num_steps > 1 else ''} per pass"
    why = f"{tokens}: each was accepted in at least {100 * WORTH_DRAFTING:.0f}% of the passes measured here."
    if not run.acceptance:
        why = f"{tokens}, until acceptance is measured."
    why += f" Trained on sequences of up to {recipe.data.max_length} tokens; acceptance falls beyond."
    export = f"tools/export_draft.py {run.folder}" + (" --vllm" if only_vllm else "")
    blocks = {"Export": export, "SGLang": commands.sglang, "vLLM": commands.vllm}
    if only_vllm:
        del blocks["SGLang"]
    lines = [f"<h3>{title}</h3><pre>{escaped(text)}</pre>" for title, text in blocks.items()]
    return section("Serve it", f"<p class=note>{escaped(why)}</p>{''.join(lines)}")


def _median(lines: Sequence[Mapping[str, Any]], name: str) -> float:
    return median_high(line[name] for line in lines)


def training_seconds(train: Sequence[Mapping[str, Any]]) -> float:
    """Return the seconds of training steps, without evaluating and saving.

    A line holds the mean time of all steps since the line before it.
    """
    steps = [0, *(line["step"] for line in train)]
    spans = zip(train, steps[:-1], steps[1:], strict=True)
    return sum(line["step_s"] * (now - before) for line, before, now in spans)


def _peak_gib(train: Sequence[Mapping[str, Any]]) -> float:
    return max(line["peak_gib"] for line in train)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
