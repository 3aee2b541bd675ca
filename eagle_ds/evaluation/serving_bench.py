"""Measure a running server: send the same prompts at several concurrencies, and summarise their answers.

The load is a closed loop: at concurrency C, C requests are in flight, and the next prompt is sent when an
answer is complete. Before each concurrency the server is warmed up and its cache of earlier prompts emptied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import reduce
from operator import add
from time import perf_counter
from typing import Any

import numpy as np

from eagle_ds.evaluation.acceptance import CONTEXT_EDGES, Prompt
from eagle_ds.evaluation.serving_client import Accepted, Answer, Server

WARM_UP_TOKENS = 16
Progress = Callable[[int], None]  # called with a number of new tokens


@dataclass(frozen=True)
class Load:
    """What is sent: prompts, the longest answer, and the tokens that end one."""

    prompts: Sequence[Prompt]
    max_new_tokens: int
    stop_ids: Sequence[int] = ()

    def check(self, server: Server, context: int, concurrencies: Sequence[int]) -> None:
        """Raise ValueError before anything is sent, if the load does not fit the server.

        ``context``: longest context, in tokens, for a server that does not report its own.
        """
        served = server.info.context or context
        for prompt in self.prompts:
            if len(prompt.ids) + self.max_new_tokens > served:
                needs = f"{len(prompt.ids)} tokens and --max-new-tokens {self.max_new_tokens}"
                longest = served - self.max_new_tokens
                skip = f"skip such prompts with --max-prompt-tokens {longest}, " if longest > 0 else ""
                raise ValueError(
                    f"prompt {prompt.id} has {needs}, but {server.info.url} serves a context of {served}; "
                    f"{skip}lower --max-new-tokens, or serve a longer context"
                )
        if max(concurrencies) > len(self.prompts):
            wrong = f"--concurrency {max(concurrencies)} needs as many prompts"
            raise ValueError(
                f"{wrong}, and there are {len(self.prompts)}; lower the concurrency, or give more prompts "
                "(a longer file, or a larger --num-prompts)"
            )


@dataclass
class Level:
    """The answers to all prompts at one concurrency.

    ``seconds``: from the first request to the last token. ``accepted``: of all requests together, from the
    server's own counters, where answers do not report it. ``cache_emptied``: no prompt was in the server's
    cache.
    """

    concurrency: int
    prompts: Sequence[Prompt]
    answers: list[Answer]
    seconds: float
    accepted: Accepted | None
    cache_emptied: bool
    num_draft_tokens: int

    def summary(self) -> dict[str, Any]:
        """Return the figures of this level, as JSON holds them."""
        everything = list(range(len(self.answers)))
        tokens = sum(answer.tokens for answer in self.answers)
        return {
            "concurrency": self.concurrency,
            "seconds": self.seconds,
            "tokens_per_s": tokens / self.seconds,
            **self._figures(everything, self.accepted),
            "cache_emptied": self.cache_emptied,
            "tokens_counted": all(answer.counted for answer in self.answers),
            "by_context": [
                {"from": low, "to": high, **self._figures(inside, None)}
                for low, high, inside in self._buckets()
            ],
            "answers": [
                {"output": one.output, "accepted": asdict(one.accepted) if one.accepted else None}
                for one in self.answers
            ],
        }

    def _buckets(self) -> list[tuple[int, int | None, list[int]]]:
        """Return (from, to, indices) of the answers by length of their prompt, without empty buckets."""
        found = []
        for low, high in zip(CONTEXT_EDGES[:-1], CONTEXT_EDGES[1:], strict=True):
            inside = [i for i, prompt in enumerate(self.prompts) if low <= len(prompt.ids) < high]
            if inside:
                found.append((low, high if high != CONTEXT_EDGES[-1] else None, inside))
        return found

    def _figures(self, indices: Sequence[int], accepted: Accepted | None) -> dict[str, Any]:
        """Return the figures of some answers. ``accepted`` is used if the answers do not report their own."""
        answers = [self.answers[i] for i in indices]
        reported = [one.accepted for one in answers if one.accepted]
        accepted = reduce(add, reported) if reported else accepted
        waits = [wait for answer in answers for wait in answer.waits]
        # A piece with n tokens counts as n waits.
        between = np.repeat([seconds for seconds, _ in waits], [n for _, n in waits])
        decoding = [(one.tokens - one.chunks[0][1]) / one.decoding_s for one in answers if one.decoding_s]
        found: dict[str, Any] = {
            "requests": len(answers),
            "prompt_tokens": sum(len(self.prompts[i].ids) for i in indices),
            "new_tokens": sum(answer.tokens for answer in answers),
            "first_token_ms": _quantiles([answer.first_token_s for answer in answers]),
            "between_tokens_ms": _quantiles(between),
            "tokens_per_s_each": float(np.median(decoding)) if decoding else None,
        }
        if accepted:
            if accepted.at_position:  # The last positions are left out if no pass accepted them.
                accepted += Accepted(0, 0, (0,) * self.num_draft_tokens)
            found |= accepted.summary()
        return found


def _quantiles(seconds: Sequence[float] | np.ndarray) -> dict[str, float] | None:
    """Return median and 99th percentile in milliseconds; None of nothing."""
    if not len(seconds):
        return None
    median, p99 = np.quantile(np.asarray(seconds, float), [0.5, 0.99])
    return {"median": 1e3 * float(median), "p99": 1e3 * float(p99)}


def run_level(
    server: Server, load: Load, concurrency: int, progress: Progress = lambda tokens: None
) -> Level:
    """Send all prompts with ``concurrency`` of them in flight.

    Raises ValueError if the server refuses a prompt or fails; requests that were not sent yet are dropped.
    """
    # As many requests as will be in flight, so that kernels for this batch size are compiled before.
    few = Load(load.prompts[:concurrency], min(WARM_UP_TOKENS, load.max_new_tokens), load.stop_ids)
    _send(server, few, concurrency, lambda tokens: None)
    emptied = server.empty_cache()
    before = server.counters()
    began = perf_counter()
    answers = _send(server, load, concurrency, progress)
    seconds = perf_counter() - began
    accepted = server.counters().since(before) if before else None
    drafts = server.info.num_draft_tokens or 0
    return Level(concurrency, load.prompts, answers, seconds, accepted, emptied, drafts)


def _send(server: Server, load: Load, concurrency: int, progress: Progress) -> list[Answer]:
    def one(prompt: Prompt) -> Answer:
        answer = server.answer(prompt.ids, load.max_new_tokens, load.stop_ids)
        progress(answer.tokens)
        return answer

    with ThreadPoolExecutor(concurrency) as pool:
        jobs = [pool.submit(one, prompt) for prompt in load.prompts]
        wait(jobs, return_when=FIRST_EXCEPTION)
        for job in jobs:
            job.cancel()  # does nothing unless a job failed: then the waiting ones are dropped
        return [job.result() for job in jobs if not job.cancelled()]
