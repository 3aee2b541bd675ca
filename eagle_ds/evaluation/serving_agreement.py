"""Compare a server's answers with speculation with those without, and with tools/eval_acceptance.py's.

Which differences does rounding explain? Plain decoding chose token a in its pass. Speculation chose token b
in a pass over several tokens. A third pass measures gap = log P(a) - log P(b) = logit(a) - logit(b).

Engines compute logits in bfloat16. Between 2^e and 2^(e+1) its values are u = 2^(e-7) apart: 0.125 from 16 to
32. Before its own rounding, a logit differs a little between two passes, because they add in another order.
If it differs by less than u, then the rounded values differ by at most u, and the gap of two logits by at
most 2u. The gap was >= 0 in plain decoding and <= 0 in speculation. So it is between -2u and 2u in the third
pass. ``NEAR_TIE`` is 2u for logits from 16 to 32.

This bound covers the last rounding only. The hidden state is rounded in every layer as well, and can move a
logit by more than u. Such a difference is counted as a disagreement: a gap does not tell its cause.

Log-probabilities tell the gap of two logits, but not their size, because softmax ignores a common shift. The
size is bounded from above: a gap of bfloat16 logits is a multiple of the spacing of the smaller logit. For
example, 0.3125 = 5 * 0.0625 means that one of the two logits is below 16. See ``logit_spacing``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eagle_ds.evaluation.acceptance import Prompt
from eagle_ds.evaluation.serving_client import Server

NEAR_TIE = 2 * 0.125
# Log-probabilities are float32 numbers. With this rounding a gap of 0.25 can read 0.2500001.
LOG_SOFTMAX_ERROR = 1e-5
SPACINGS = [2.0**exponent for exponent in range(2, -11, -1)]  # that are looked for
TOLERANCE = 0.03  # relative difference of two acceptance lengths that agree


@dataclass(frozen=True)
class Difference:
    """First token at which an answer with speculation differs from the one without.

    ``gap``: log P(plain token) - log P(token) by the target, after the tokens that both answers share. None
    if the server cannot tell.
    """

    prompt: str
    concurrency: int
    position: int
    plain_token: int | None
    token: int | None
    gap: float | None

    @property
    def near_tie(self) -> bool:
        """Whether the rounding of bfloat16 logits below 32 explains the difference; see the module."""
        return self.gap is not None and abs(self.gap) <= NEAR_TIE + LOG_SOFTMAX_ERROR


def logit_spacing(differences: Sequence[Difference]) -> float | None:
    """Return the largest power of two that every gap is a multiple of.

    In bfloat16 the finest spacing among these logits is this number or less. None if no gap tells: all are 0
    or unknown, or the server's logits are not rounded to bfloat16.
    """
    gaps = [one.gap for one in differences if one.gap is not None and abs(one.gap) > LOG_SOFTMAX_ERROR]
    for spacing in SPACINGS if gaps else ():
        if all(abs(gap - spacing * round(gap / spacing)) <= LOG_SOFTMAX_ERROR for gap in gaps):
            return spacing
    return None


def greedy_differences(
    server: Server, prompts: Sequence[Prompt], level: Mapping[str, Any], plain: Mapping[str, Any]
) -> list[Difference]:
    """Return where the greedy answers of two levels differ, with how close the target's choice was.

    ``level``, ``plain``: two summaries at the same concurrency, with speculation and without. Each difference
    costs one request to ``server``.
    """
    found = []
    for prompt, one, other in zip(prompts, level["answers"], plain["answers"], strict=True):
        tokens, expected = one["output"], other["output"]
        if tokens == expected:
            continue
        pairs = zip(tokens, expected, strict=False)
        length = min(len(tokens), len(expected))
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), length)
        token, plain_token, gap = None, None, None
        if at < length and isinstance(tokens, list):
            token, plain_token = tokens[at], expected[at]
            gap = server.preference([*prompt.ids, *expected[:at]], plain_token, token)
        found.append(Difference(prompt.id, level["concurrency"], at, plain_token, token, gap))
    return found


@dataclass(frozen=True)
class Agreement:
    """Acceptance lengths of the same prompts in a server and in tools/eval_acceptance.py."""

    draft: str
    prompts: int
    served: float
    measured: float

    @property
    def ratio(self) -> float:
        """Served / measured."""
        return self.served / self.measured

    @property
    def agrees(self) -> bool:
        """Whether the two differ by at most ``TOLERANCE``."""
        return abs(self.ratio - 1) <= TOLERANCE


def check_comparable(measured: Mapping[str, Any], result: Mapping[str, Any], draft: str | None) -> str:
    """Check that an acceptance.json measured the prompts of a benchmark, in the same way.

    Args:
        measured: the acceptance.json.
        result: the JSON of a benchmark, with or without its figures.
        draft: name of a draft in ``measured``; None is the last one, the draft under test.

    Returns:
        The name of the draft.

    Raises:
        ValueError: prompts, longest answer or draft tokens differ, or ``measured`` lacks the draft.
    """
    if not measured.get("drafts"):
        raise ValueError("the file of --compare has no drafts; give what tools/eval_acceptance.py wrote")
    names = [one["name"] for one in measured["drafts"]]
    chosen = draft or names[-1]
    if chosen not in names:
        raise ValueError(f"acceptance.json has no draft {chosen}; it has {', '.join(names)}")
    drafted = result["server"]["num_draft_tokens"]
    for what, found, expected in (
        ("draft tokens per pass", drafted, measured["num_draft_tokens"]),
        ("longest answer", result["max_new_tokens"], measured["max_new_tokens"]),
    ):
        if found is not None and found != expected:
            wrong = f"the {what} is {found} on the server and {expected} in acceptance.json"
            raise ValueError(f"{wrong}; measure again with the same number")
    known = _prompts(measured)
    served = list(_prompts(result))
    if missing := [one[0] for one in served if one not in known]:
        example = f"{len(missing)} of {len(served)}, for example {missing[0]}"
        wrong = f"some prompts are not in acceptance.json ({example})"
        raise ValueError(f"{wrong}; give both tools the same file, --num-prompts and --turn")
    return chosen


def _prompts(result: Mapping[str, Any]) -> dict[tuple[str, int], Mapping[str, Any]]:
    """Return the prompts of a result by id and length."""
    return {(one["id"], one["prompt_tokens"]): one for one in result["prompts"]}


def compare_with(measured: Mapping[str, Any], result: Mapping[str, Any], draft: str | None) -> Agreement:
    """Compare the level of the lowest concurrency with an acceptance.json; see ``check_comparable``.

    Raises ValueError if the server reports no acceptance.
    """
    name, known = check_comparable(measured, result, draft), _prompts(measured)
    level = min(result["levels"], key=lambda one: one["concurrency"])
    if "acceptance_length" not in level:
        raise ValueError(f"{result['server']['url']} reports no acceptance; there is nothing to compare")
    chosen = [known[one] for one in _prompts(result)]
    gained, passes = (sum(one[what][name] for one in chosen) for what in ("gained", "passes"))
    return Agreement(name, len(chosen), level["acceptance_length"], gained / passes if passes else 1.0)
