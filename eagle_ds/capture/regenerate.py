"""Rewrite the assistant turns of conversations with the target's own answers.

A draft learns to predict what its target writes, so it should be trained on text that the target wrote. System and user
messages stay, every assistant message is generated anew, turn by turn, each on top of the target's own earlier answers.
Two backends: transformers in this process, batched, and any endpoint that speaks the OpenAI chat protocol.
"""

from __future__ import annotations

import json
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch

from eagle_ds.capture.hf import load_model
from eagle_ds.data.chat import ChatEncoder, Message, load_tokenizer, messages_of, record_id
from eagle_ds.data.conversations import ConversationFile
from eagle_ds.target.files import resolve_target
from eagle_ds.target.info import stop_token_ids

log = logging.getLogger(__name__)

LOOP_WORDS = 8
RETRIES = 4


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn; temperature 0 is greedy."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """``finish``: ``stop`` (the target ended its turn) or ``length`` (cut at max_new_tokens)."""

    text: str
    tokens: int
    finish: str


class Generator(Protocol):
    """Answers many prompts at once; None for a prompt that leaves no room for an answer."""

    def generate(self, prompts: Sequence[list[Message]]) -> list[Answer | None]: ...


class TransformersGenerator:
    """The target in this process.  Prompts of a batch are padded on the left."""

    def __init__(self, model: str, sampling: Sampling, dtype: str = "auto", device: str = "auto", max_length: int | None = None) -> None:
        folder = resolve_target(model)
        tokenizer = load_tokenizer(folder)
        self.model = load_model(folder, dtype, device).eval()
        self.device = self.model.get_input_embeddings().weight.device
        self.sampling = sampling
        self.stop_ids = set(stop_token_ids(folder)) or {tokenizer.eos_token_id}
        self.max_length = max_length or self.model.config.max_position_embeddings
        self.encoder = ChatEncoder(tokenizer, self.max_length)
        torch.manual_seed(sampling.seed)

    def generate(self, prompts: Sequence[list[Message]]) -> list[Answer | None]:
        ids = [self.encoder.prompt_ids(prompt) for prompt in prompts]
        fitting = [i for i, prompt in enumerate(ids) if len(prompt) + self.sampling.max_new_tokens <= self.max_length]
        answers: list[Answer | None] = [None] * len(prompts)
        if fitting:
            for i, answer in zip(fitting, self._generate([ids[i] for i in fitting]), strict=True):
                answers[i] = answer
        return answers

    @torch.inference_mode()
    def _generate(self, ids: list[list[int]]) -> list[Answer]:
        width, pad = max(map(len, ids)), min(self.stop_ids)
        padded = torch.tensor([[pad] * (width - len(row)) + row for row in ids])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
        how: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if self.sampling.temperature > 0:
            how = {"do_sample": True, "temperature": self.sampling.temperature, "top_p": self.sampling.top_p, "top_k": 0}
        generated = self.model.generate(
            input_ids=padded.to(self.device),
            attention_mask=mask.to(self.device),
            max_new_tokens=self.sampling.max_new_tokens,
            eos_token_id=sorted(self.stop_ids),
            pad_token_id=pad,
            **how,
        )
        return [self._answer(row) for row in generated[:, width:].tolist()]

    def _answer(self, row: list[int]) -> Answer:
        end = next((i for i, token in enumerate(row) if token in self.stop_ids), None)
        text = self.encoder.tokenizer.decode(row[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Answer(text, len(row[:end]), "length" if end is None else "stop")


class EndpointGenerator:
    """Any server with ``POST {url}/chat/completions`` in OpenAI's form: SGLang, vLLM, llama.cpp, ..."""

    def __init__(self, url: str, model: str, sampling: Sampling, api_key: str | None = None, timeout_s: float = 600.0) -> None:
        self.url = url.rstrip("/") + "/chat/completions"
        self.model = model
        self.sampling = sampling
        self.api_key = api_key
        self.timeout_s = timeout_s

    def generate(self, prompts: Sequence[list[Message]]) -> list[Answer | None]:
        return [self._answer(prompt) for prompt in prompts]

    def _answer(self, messages: list[Message]) -> Answer | None:
        body = {
            "model": self.model,
            "messages": messages,
            "max_tokens": self.sampling.max_new_tokens,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "seed": self.sampling.seed,
        }
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {self.api_key}"} if self.api_key else {})}
        reply = self._post(urllib.request.Request(self.url, json.dumps(body).encode(), headers))
        if reply is None:
            return None
        choice = reply["choices"][0]
        return Answer(choice["message"]["content"] or "", reply.get("usage", {}).get("completion_tokens", 0), choice["finish_reason"])

    def _post(self, request: urllib.request.Request) -> dict[str, Any] | None:
        """The reply; None if the server refuses this prompt (400: too long); waits and retries while it is busy or away."""
        for attempt in range(RETRIES):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
                    return json.load(response)
            except urllib.error.HTTPError as error:
                if error.code in (400, 413, 422):
                    log.warning("%s refused a prompt: %s", self.url, error.read(300).decode(errors="replace"))
                    return None
                if error.code not in (408, 429) and error.code < 500:
                    raise ValueError(f"{self.url} answered {error.code} {error.reason}; check the address, model name and key") from error
                reason: object = f"{error.code} {error.reason}"
            except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
                reason = getattr(error, "reason", error)
            log.info("%s: %s, try %d of %d", self.url, reason, attempt + 1, RETRIES)
            time.sleep(2.0**attempt if attempt + 1 < RETRIES else 0.0)
        raise ValueError(f"{self.url} cannot be reached ({reason}); start the server, or check --endpoint; what is written so far is kept")


@dataclass
class Regenerated:
    """A conversation in the making."""

    id: str
    messages: list[Message]
    waiting: list[Message] = field(repr=False)
    finish: list[str] = field(default_factory=list)

    @classmethod
    def start(cls, record: Mapping[str, Any]) -> Regenerated:
        return cls(record_id(record), [], [m for m in messages_of(record) if m["role"] != "assistant" or m.get("tool_calls")])

    def next_prompt(self) -> bool:
        """Take the waiting messages up to the end of the user's turn; False if there are none."""
        taken = 0
        while taken < len(self.waiting) and not (taken and self._ends_turn(taken - 1)):
            taken += 1
        self.messages += self.waiting[:taken]
        self.waiting = self.waiting[taken:]
        return taken > 0 and self.messages[-1]["role"] not in ("system", "assistant")

    def _ends_turn(self, i: int) -> bool:
        return self.waiting[i]["role"] in ("user", "tool")

    def take(self, answer: Answer | None, min_distinct: float) -> None:
        """Append an answer, or leave out the user's turn where it is unusable.

        The conversation ends there if it has no answer yet, or has no room for one.
        """
        if answer is None or not answer.text.strip() or distinct_ratio(answer.text) < min_distinct:
            while self.messages and self.messages[-1]["role"] != "assistant":
                self.messages.pop()
            if answer is None or not self.messages:
                self.waiting = []
            return
        self.messages.append({"role": "assistant", "content": answer.text})
        self.finish.append(answer.finish)

    def line(self) -> str:
        return json.dumps({"id": self.id, "messages": self.messages, "finish": self.finish}, ensure_ascii=False) + "\n"


def distinct_ratio(text: str) -> float:
    """Distinct runs of 8 words among all of them: 1 for prose, near 0 for an answer caught in a loop."""
    words = text.split()
    runs = [tuple(words[i : i + LOOP_WORDS]) for i in range(len(words) - LOOP_WORDS + 1)]
    return len(set(runs)) / len(runs) if runs else 1.0


def answer_batch(batch: Sequence[Regenerated], generator: Generator, min_distinct: float) -> tuple[Sequence[Regenerated], int]:
    """Answer every turn of a batch; returns it with the tokens generated."""
    tokens = 0
    active = [conversation for conversation in batch if conversation.next_prompt()]
    while active:
        for conversation, answer in zip(active, generator.generate([c.messages for c in active]), strict=True):
            conversation.take(answer, min_distinct)
            tokens += answer.tokens if answer else 0
        active = [conversation for conversation in active if conversation.next_prompt()]
    return batch, tokens


def pending(source: Path, done: set[str], batch_size: int) -> Iterator[list[Regenerated]]:
    """Batches of the conversations not done yet, shortest first so that a batch needs little padding."""
    file = ConversationFile(source)
    sizes: list[tuple[int, int]] = []
    for offset, record in file.records():
        if record_id(record) not in done:
            sizes.append((len(json.dumps(record)), offset))
    offsets = iter([offset for _, offset in sorted(sizes)])
    while chunk := list(islice(offsets, batch_size)):
        yield [Regenerated.start(file.read(offset)) for offset in chunk]


def regenerate(
    source: Path,
    output: Path,
    generator: Generator,
    batch_size: int = 8,
    concurrency: int = 1,
    min_distinct: float = 0.0,
    progress: Callable[[int, int], None] = lambda conversations, tokens: None,
) -> int:
    """Write ``output`` (JSONL: id, messages, finish), a line as soon as a conversation is done; returns how many were written.

    A second run goes on where the first was stopped; a half-written last line is removed first. Conversations in which
    not even the first answer is usable are recorded in ``output`` + ".skipped", so that they are not tried again.
    """
    skipped = output.with_name(output.name + ".skipped")
    done = finished_ids(output) | (set(skipped.read_text(encoding="utf-8").split("\n")) if skipped.exists() else set())
    written = 0
    with (
        ThreadPoolExecutor(concurrency) as pool,
        output.open("a", encoding="utf-8") as stream,
        skipped.open("a", encoding="utf-8") as rejects,
    ):
        jobs = (pool.submit(answer_batch, batch, generator, min_distinct) for batch in pending(source, done, batch_size))
        for job in _bounded(jobs, 2 * concurrency):
            batch, tokens = job.result()
            for conversation in batch:
                (stream if conversation.finish else rejects).write(conversation.line() if conversation.finish else conversation.id + "\n")
                written += bool(conversation.finish)
            for file in (stream, rejects):
                file.flush()
                os.fsync(file.fileno())
            progress(len(batch), tokens)
    return written


def _bounded(jobs: Iterator[Future], limit: int) -> Iterator[Future]:
    """Futures as they complete, at most ``limit`` submitted ahead; the first failure stops further submission."""
    running = set(islice(jobs, limit))
    while running:
        complete, running = wait(running, return_when=FIRST_COMPLETED)
        for job in complete:
            if job.exception() is not None:
                for other in running:
                    other.cancel()
            yield job
        running |= set(islice(jobs, len(complete)))


def finished_ids(output: Path) -> set[str]:
    """Ids in ``output``, cutting off a last line that a kill left unfinished."""
    if not output.exists():
        return set()
    data = output.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        log.info("%s: removing an unfinished last line", output)
        os.truncate(output, len(whole))
    try:
        return {record_id(json.loads(line)) for line in whole.splitlines()}
    except ValueError as error:
        raise ValueError(f"{output} is not a file that this tool wrote ({error}); choose another output") from error
