"""Talk to a running server: send a prompt, time its answer, and read what speculation gained.

SGLang is asked through its own API, because that reports for every answer how many passes the target made and
how many draft tokens each pass accepted. Every other server is asked through OpenAI's completions. vLLM also
counts the passes of all requests together, in its metrics. Prompts are sent as token ids, so that every
engine reads the same tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any, Protocol

from eagle_ds.evaluation.http_client import Http

TOP_LOGPROBS = 20  # vLLM's limit
METRIC = re.compile(r"^vllm:spec_decode_num_(\w+?)_total(\{.*\})? (\S+)$", re.M)
POSITION = re.compile(r'position="(\d+)"')


@dataclass(frozen=True)
class Accepted:
    """What speculation gained in some passes of the target.

    ``gained``: new tokens, the target's own included. ``at_position``: passes that accepted the draft token
    at each position; empty if the engine does not report it.
    """

    passes: int
    gained: int
    at_position: tuple[int, ...] = ()

    def __add__(self, other: Accepted) -> Accepted:
        pairs = zip_longest(self.at_position, other.at_position, fillvalue=0)
        return Accepted(
            self.passes + other.passes, self.gained + other.gained, tuple(a + b for a, b in pairs)
        )

    def since(self, before: Accepted) -> Accepted:
        """Return the passes after ``before``, an earlier reading of the same counters."""
        return self + Accepted(-before.passes, -before.gained, tuple(-n for n in before.at_position))

    def summary(self) -> dict[str, Any]:
        """Return acceptance length and acceptance by position, under the keys of acceptance.json."""
        # A position is reached by the passes that accepted the position before it.
        reached = [self.passes, *self.at_position[:-1]][: len(self.at_position)]
        each = zip(self.at_position, reached, strict=True)
        return {
            "acceptance_length": self.gained / self.passes if self.passes else 1.0,
            "passes": self.passes,
            "gained": self.gained,
            "acceptance_by_position": [n / of if of else 0.0 for n, of in each],
            "cumulative_by_position": [n / max(self.passes, 1) for n in self.at_position],
        }


@dataclass(frozen=True)
class ServerInfo:
    """What a server says about itself.

    ``context``: longest prompt and answer together, in tokens. ``num_draft_tokens``: draft tokens per pass; 0
    without speculation. Both are None if the server does not say.
    """

    url: str
    engine: str
    version: str
    model: str
    context: int | None
    num_draft_tokens: int | None


@dataclass
class Answer:
    """An answer with its times in seconds.

    ``output``: token ids, or the text if the server reports no ids. ``chunks``: (time since the request was
    sent, new tokens) of each piece that arrived. ``counted``: the server reported the tokens of each piece;
    otherwise the answer's tokens are divided equally among its pieces.
    """

    output: list[int] | str
    tokens: int
    chunks: list[tuple[float, float]]
    accepted: Accepted | None = None
    counted: bool = True

    @property
    def first_token_s(self) -> float:
        """Time from the request to the first token."""
        return self.chunks[0][0]

    @property
    def decoding_s(self) -> float:
        """Time from the first piece to the last one."""
        return self.chunks[-1][0] - self.chunks[0][0]

    @property
    def waits(self) -> list[tuple[float, int]]:
        """(Time for each token, tokens) of every piece after the first: its wait divided by its tokens."""
        pairs = zip(self.chunks, self.chunks[1:], strict=False)
        return [((end - start) / max(n, 1), max(round(n), 1)) for (start, _), (end, n) in pairs]


class Server(Protocol):
    """A running server."""

    info: ServerInfo

    def answer(self, prompt: Sequence[int], max_new_tokens: int, stop_ids: Sequence[int]) -> Answer:
        """Return the greedy answer to one prompt. Raises ValueError if the server refuses it or fails."""
        ...

    def empty_cache(self) -> bool:
        """Forget earlier prompts; return whether the server could."""
        ...

    def counters(self) -> Accepted | None:
        """Return what speculation gained since the server started; None if answers report it themselves."""
        ...

    def preference(self, prompt: Sequence[int], token: int, other: int) -> float | None:
        """Return log P(token) - log P(other) after ``prompt``, by the target; None if it cannot be known."""
        ...


def connect(url: str, api_key: str | None = None) -> Server:
    """Ask what runs at ``url``, the address without /v1. Raises ValueError if nothing usable answers."""
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"{url} is no address; write it with http://, for example http://localhost:30000")
    http = Http(url.rstrip("/").removesuffix("/v1"), api_key)
    try:
        models = http.get("/v1/models")["data"]
        model = models[0]
    except (KeyError, IndexError, TypeError) as error:
        wrong = f"{url} does not list its model at /v1/models"
        raise ValueError(f"{wrong}; give the address of a running SGLang, vLLM or similar server") from error
    known = http.try_get("/server_info") or http.try_get("/get_server_info")
    if known and "model_path" in known:
        return SglangServer(http, known, model.get("max_model_len"))
    return OpenAiServer(http, model)


class SglangServer:
    """SGLang, through its own API."""

    def __init__(self, http: Http, known: dict[str, Any], context: int | None) -> None:
        self.http = http
        drafts = known.get("speculative_num_draft_tokens") if known.get("speculative_algorithm") else 1
        # SGLang counts the target's own token among the draft tokens.
        self.info = ServerInfo(
            http.url, "sglang", known.get("version", "unknown"), known["model_path"],
            context or known.get("context_length"), drafts - 1 if drafts else None,
        )

    def answer(self, prompt: Sequence[int], max_new_tokens: int, stop_ids: Sequence[int]) -> Answer:
        """See Server."""
        sampling = {"temperature": 0, "max_new_tokens": max_new_tokens, "stop_token_ids": list(stop_ids)}
        body = {"input_ids": list(prompt), "sampling_params": sampling, "stream": True}
        ids: list[int] = []
        chunks: list[tuple[float, float]] = []
        meta: dict[str, Any] = {}
        for at, event in self.http.events("/generate", body):
            meta, total = event["meta_info"], event["meta_info"]["completion_tokens"]
            new = event["output_ids"]
            # An event holds all ids so far, or with --incremental-streaming-output only new ones.
            ids = list(new) if len(new) == total else ids + list(new)
            known = sum(n for _, n in chunks)
            if total > known:
                chunks.append((at, total - known))
        if not chunks or len(ids) != meta["completion_tokens"]:
            raise ValueError(f"{self.http.url}: an answer ended early ({meta.get('finish_reason')})")
        return Answer(ids, len(ids), chunks, _accepted(meta))

    def empty_cache(self) -> bool:
        """See Server."""
        return self.http.post_succeeds("/flush_cache?timeout=30")

    def counters(self) -> Accepted | None:
        """See Server."""
        return None

    def preference(self, prompt: Sequence[int], token: int, other: int) -> float | None:
        """See Server."""
        body = {
            "input_ids": list(prompt), "sampling_params": {"temperature": 0, "max_new_tokens": 1},
            "return_logprob": True, "token_ids_logprob": [token, other],
        }
        rows = self.http.post("/generate", body)["meta_info"].get("output_token_ids_logprobs")
        if not rows:
            return None
        found = {row[1]: row[0] for row in rows[0]}
        return found[token] - found[other]


def _accepted(meta: dict[str, Any]) -> Accepted | None:
    """Return what SGLang reports of a finished answer; None without speculation.

    Counts as ``decoding.take_verified`` does: the token that the prompt's own pass gives is not gained by
    speculation. Tokens after a stop token do not count; tokens beyond max_new_tokens do.
    """
    passes = meta.get("spec_verify_ct")
    if not passes:
        return None
    drafted = meta.get("spec_num_correct_drafts")
    stopped = (meta.get("finish_reason") or {}).get("type") == "stop"
    gained = meta["completion_tokens"] - 1 if stopped or drafted is None else passes + drafted
    # histogram[j]: passes that accepted j draft tokens
    histogram = meta.get("spec_correct_drafts_histogram") or meta.get("spec_accept_histogram") or [passes]
    at_position = tuple(sum(histogram[k:]) for k in range(1, len(histogram)))
    return Accepted(passes, gained, at_position)


class OpenAiServer:
    """vLLM, or any other server of OpenAI's completions."""

    def __init__(self, http: Http, model: dict[str, Any]) -> None:
        self.http = http
        engine = "vllm" if model.get("owned_by") == "vllm" else "openai"
        version = (http.try_get("/version") or {}).get("version", "unknown")
        context = model.get("max_model_len")
        self.info = ServerInfo(http.url, engine, version, model["id"], context, None)
        if engine == "vllm" and (metrics := http.try_get_text("/metrics")) is not None:
            counted = _vllm_counters(metrics)  # absent without speculation
            drafts = len(counted.at_position) if counted else 0
            self.info = replace(self.info, num_draft_tokens=drafts)

    def answer(self, prompt: Sequence[int], max_new_tokens: int, stop_ids: Sequence[int]) -> Answer:
        """See Server."""
        options = {"include_usage": True}
        body = {
            "model": self.info.model, "prompt": list(prompt), "max_tokens": max_new_tokens, "temperature": 0,
            "stream": True, "stream_options": options,
        }
        if self.info.engine == "vllm":  # other servers may refuse what they do not know
            options["continuous_usage_stats"] = True
            body |= {"return_token_ids": True, "stop_token_ids": list(stop_ids)}
        found = _Stream()
        for at, event in self.http.events("/v1/completions", body):
            found.add(at, event)
        return found.answer(self.http.url)

    def empty_cache(self) -> bool:
        """See Server. vLLM has this address only with VLLM_SERVER_DEV_MODE=1."""
        if self.info.engine != "vllm":
            return False
        try:
            return bool(self.http.post("/reset_prefix_cache", {}).get("success"))
        except ValueError:
            return False

    def counters(self) -> Accepted | None:
        """See Server."""
        text = self.http.try_get_text("/metrics") if self.info.engine == "vllm" else None
        return None if text is None else _vllm_counters(text)

    def preference(self, prompt: Sequence[int], token: int, other: int) -> float | None:
        """See Server. A token that is not among the most likely ones counts as the least likely of them."""
        if self.info.engine != "vllm":
            return None
        body = {
            "model": self.info.model, "prompt": list(prompt), "max_tokens": 1, "temperature": 0,
            "logprobs": TOP_LOGPROBS, "return_tokens_as_token_ids": True,
        }
        top = self.http.post("/v1/completions", body)["choices"][0]["logprobs"]["top_logprobs"][0]
        least = min(top.values())
        return top.get(f"token_id:{token}", least) - top.get(f"token_id:{other}", least)


def _vllm_counters(metrics: str) -> Accepted | None:
    """Return the counters of speculation in vLLM's metrics, over all of its engines; None if it has none."""
    found: dict[str, int] = {}
    positions: dict[int, int] = {}
    for name, labels, value in METRIC.findall(metrics):
        if name == "accepted_tokens_per_pos":
            position = int(POSITION.search(labels)[1])
            positions[position] = positions.get(position, 0) + int(float(value))
        else:
            found[name] = found.get(name, 0) + int(float(value))
    if "drafts" not in found:
        return None
    at_position = tuple(positions[k] for k in sorted(positions))
    return Accepted(found["drafts"], found["drafts"] + found.get("accepted_tokens", 0), at_position)


@dataclass
class _Stream:
    """The events of one answer in OpenAI's format, as they arrive."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    total: int = 0
    finish: str | None = None
    chunks: list[tuple[float, int | None]] = field(default_factory=list)

    def add(self, at: float, event: dict[str, Any]) -> None:
        """Take one event. The last one may hold nothing but the number of tokens."""
        total = (event.get("usage") or {}).get("completion_tokens")
        for choice in event.get("choices", ())[:1]:
            self.finish = choice.get("finish_reason") or self.finish
            new = choice.get("token_ids")
            count = len(new) if new is not None else total - self.total if total is not None else None
            self.text += choice.get("text") or ""
            self.ids += new or ()
            if count or (count is None and choice.get("text")):
                self.chunks.append((at, count))
        self.total = max(self.total, total or 0)

    def answer(self, url: str) -> Answer:
        """Return the whole answer. Raises ValueError if it is incomplete."""
        if self.finish is None or not self.chunks or not self.total:
            raise ValueError(
                f"{url}: an answer ended early, or the server does not report the tokens of an answer "
                "(stream_options.include_usage)"
            )
        counted = all(count is not None for _, count in self.chunks)
        share = self.total / len(self.chunks)
        chunks = [(at, float(count) if counted else share) for at, count in self.chunks]
        return Answer(self.ids or self.text, self.total, chunks, None, counted)
