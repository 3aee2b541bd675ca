"""Replace the assistant turns of conversations by the target's own answers.

A draft learns to predict what its target writes, so it should be trained on text that the target wrote.
System and user messages are kept. Every assistant message is generated again, turn by turn, each in the
context of the target's own earlier answers. Two backends: transformers in this process, in batches, and any
endpoint with OpenAI's chat protocol.
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
from eagle_ds.data.chat import ChatEncoder, load_tokenizer
from eagle_ds.data.conversations import ConversationFile, Intake
from eagle_ds.data.shapes import THOUGHTS, BadRecord, Message, conversation_of, record_id
from eagle_ds.data.template import Tools
from eagle_ds.target.files import resolve_target
from eagle_ds.target.info import stop_token_ids

logger = logging.getLogger(__name__)

LOOP_WORDS = 8  # an answer that repeats sequences of this many words is caught in a loop
ATTEMPTS = 4  # of one request to an endpoint


@dataclass(frozen=True)
class Sampling:
    """How an answer is sampled; temperature 0 is greedy."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """One generated answer."""

    text: str
    tokens: int
    finish: str  # stop: the target ended its turn; length: the answer was cut off at max_new_tokens
    more: Mapping[str, Any] = field(default_factory=dict)  # tool calls and thinking, if a server parsed them


class Generator(Protocol):
    """Answers several prompts at once."""

    def generate(
        self, prompts: Sequence[list[Message]], tools: Sequence[Tools] | None = None
    ) -> list[Answer | None]:
        """Return one answer for each prompt, None for a prompt that cannot be answered, such as a long one.

        ``tools``: those of each prompt; None if no prompt has any.
        """
        ...


class TransformersGenerator:
    """Generates answers with the target in this process. A batch is padded on the left."""

    def __init__(
        self, model: str, sampling: Sampling, dtype: str = "auto", device: str = "auto",
        max_length: int | None = None, template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        folder = resolve_target(model)
        tokenizer = load_tokenizer(folder)
        self.model = load_model(folder, dtype, device).eval()
        self.device = self.model.get_input_embeddings().weight.device
        self.sampling = sampling
        self.stop_ids = set(stop_token_ids(folder)) or {tokenizer.eos_token_id}
        self.max_length = max_length or self.model.config.max_position_embeddings
        self.encoder = ChatEncoder(tokenizer, self.max_length, template_kwargs=template_kwargs)
        torch.manual_seed(sampling.seed)

    def generate(
        self, prompts: Sequence[list[Message]], tools: Sequence[Tools] | None = None
    ) -> list[Answer | None]:
        """Answer those prompts that the template takes and that leave space within max_length."""
        ids = [self._ids(*prompt) for prompt in zip(prompts, tools or [None] * len(prompts), strict=True)]
        longest = self.max_length - self.sampling.max_new_tokens
        fitting = [i for i, prompt in enumerate(ids) if 0 < len(prompt) <= longest]
        answers: list[Answer | None] = [None] * len(prompts)
        if fitting:
            for i, answer in zip(fitting, self._generate([ids[i] for i in fitting]), strict=True):
                answers[i] = answer
        return answers

    def _ids(self, messages: list[Message], tools: Tools) -> list[int]:
        try:
            return self.encoder.prompt_ids(messages, tools)
        except BadRecord as error:
            logger.warning("a conversation is skipped: %s", error)
            return []

    @torch.inference_mode()
    def _generate(self, ids: list[list[int]]) -> list[Answer]:
        width, pad = max(map(len, ids)), min(self.stop_ids)
        padded = torch.tensor([[pad] * (width - len(row)) + row for row in ids])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
        # Give every setting, so that none is taken from the model's generation_config.json.
        how: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if self.sampling.temperature > 0:
            temperature, top_p = self.sampling.temperature, self.sampling.top_p
            how = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        generated = self.model.generate(
            input_ids=padded.to(self.device), attention_mask=mask.to(self.device), pad_token_id=pad,
            max_new_tokens=self.sampling.max_new_tokens, eos_token_id=sorted(self.stop_ids), **how)
        return [self._answer(row) for row in generated[:, width:].tolist()]

    def _answer(self, row: list[int]) -> Answer:
        """Decode the generated ids up to the first stop token; what follows it is padding."""
        end = next((i for i, token in enumerate(row) if token in self.stop_ids), None)
        decode = self.encoder.tokenizer.decode
        text = decode(row[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Answer(text, len(row[:end]), "length" if end is None else "stop")


@dataclass(frozen=True)
class EndpointGenerator:
    """Generates answers with any server of OpenAI's chat protocol, such as SGLang, vLLM or llama.cpp."""

    base_url: str
    model: str
    sampling: Sampling
    api_key: str | None = None
    timeout_s: float = 600.0
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """Where requests are sent."""
        return self.base_url.rstrip("/") + "/chat/completions"

    def generate(
        self, prompts: Sequence[list[Message]], tools: Sequence[Tools] | None = None
    ) -> list[Answer | None]:
        """Send the prompts one after another. Raises ValueError if the server cannot be used."""
        pairs = zip(prompts, tools or [None] * len(prompts), strict=True)
        return [self._answer(prompt, given) for prompt, given in pairs]

    def _answer(self, messages: list[Message], tools: Tools) -> Answer | None:
        how = self.sampling
        body = {
            "model": self.model, "messages": messages, "max_tokens": how.max_new_tokens,
            "temperature": how.temperature, "top_p": how.top_p, "seed": how.seed}
        if tools:
            body["tools"] = list(tools)
        if self.template_kwargs:
            body["chat_template_kwargs"] = dict(self.template_kwargs)
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        reply = self._post(urllib.request.Request(self.url, json.dumps(body).encode(), headers))
        if reply is None:
            return None
        choice = reply["choices"][0]
        tokens = reply.get("usage", {}).get("completion_tokens", 0)
        message = choice["message"]
        more = {name: message[name] for name in ("tool_calls", *THOUGHTS) if message.get(name)}
        return Answer(message.get("content") or "", tokens, choice["finish_reason"], more)

    def _post(self, request: urllib.request.Request) -> dict[str, Any] | None:
        """Return the reply, or None if the server refuses this prompt (400: too long).

        Waits and tries again while the server is busy or cannot be reached. Raises ValueError for other
        errors.
        """
        for attempt in range(ATTEMPTS):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
                    return json.load(response)
            except urllib.error.HTTPError as error:
                reason: object = f"{error.code} {error.reason}"
                if error.code in (400, 413, 422):
                    reason = error.read(300).decode(errors="replace")
                    logger.warning("%s refused a prompt: %s", self.url, reason)
                    return None
                if error.code not in (408, 429) and error.code < 500:
                    advice = "check the address, model name and key"
                    raise ValueError(f"{self.url} answered {reason}; {advice}") from error
            except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
                reason = getattr(error, "reason", error)
            logger.info("%s: %s, attempt %d of %d", self.url, reason, attempt + 1, ATTEMPTS)
            time.sleep(2.0**attempt if attempt + 1 < ATTEMPTS else 0.0)
        advice = "start the server, or check --endpoint; what is written so far is kept"
        raise ValueError(f"{self.url} cannot be reached ({reason}); {advice}")


@dataclass
class Regenerated:
    """A conversation whose answers are being generated."""

    id: str
    messages: list[Message]  # answered so far
    waiting: list[Message] = field(repr=False)  # messages that follow, still to be answered
    tools: Tools = None
    finish: list[str] = field(default_factory=list)  # of each answer

    @classmethod
    def start(cls, record: Mapping[str, Any], name: str | None = None) -> Regenerated:
        """Drop the record's assistant messages, except tool calls: the tools' results refer to them.

        Raises BadRecord for a record that is no conversation.
        """
        conversation = conversation_of(record)
        if conversation.text is not None:
            raise BadRecord.at("record", "plain text", "a conversation", "unknown shape")
        kept = [m for m in conversation.messages if m["role"] != "assistant" or m.get("tool_calls")]
        return cls(record_id(record) if name is None else name, [], kept, conversation.tools)

    def next_prompt(self) -> bool:
        """Move the waiting messages, through the next user or tool message, to ``messages``.

        Returns:
            Whether ``messages`` now ends with a message to answer.
        """
        count = 0
        while count < len(self.waiting) and not (count and self._ends_turn(count - 1)):
            count += 1
        self.messages += self.waiting[:count]
        self.waiting = self.waiting[count:]
        return count > 0 and self.messages[-1]["role"] not in ("system", "developer", "assistant")

    def _ends_turn(self, i: int) -> bool:
        return self.waiting[i]["role"] in ("user", "tool")

    def add_answer(self, answer: Answer | None, min_distinct: float) -> None:
        """Append an answer, or remove the user's turn if the answer is unusable (None, empty, or a loop).

        The conversation ends here if it has no answer yet, or if the answer is None: later prompts are even
        longer.
        """
        said = answer is not None and (answer.text.strip() or answer.more.get("tool_calls"))
        if not said or distinct_ratio(answer.text) < min_distinct:
            while self.messages and self.messages[-1]["role"] != "assistant":
                self.messages.pop()
            if answer is None or not self.messages:
                self.waiting = []
            return
        self.messages.append({"role": "assistant", "content": answer.text, **answer.more})
        self.finish.append(answer.finish)
        if answer.more.get("tool_calls"):  # nobody can give the results of new calls
            self.waiting = []

    def line(self) -> str:
        """Format the conversation as a line of JSONL."""
        record = {"id": self.id, "messages": self.messages, "finish": self.finish}
        record |= {"tools": self.tools} if self.tools else {}
        return json.dumps(record, ensure_ascii=False) + "\n"


def distinct_ratio(text: str) -> float:
    """Return distinct / all 8-word sequences: 1 for prose, near 0 for an answer that repeats itself."""
    words = text.split()
    runs = [tuple(words[i : i + LOOP_WORDS]) for i in range(len(words) - LOOP_WORDS + 1)]
    return len(set(runs)) / len(runs) if runs else 1.0


def answer_batch(
    batch: Sequence[Regenerated], generator: Generator, min_distinct: float
) -> tuple[Sequence[Regenerated], int]:
    """Answer every turn of a batch of conversations. Returns the batch and the number of tokens generated."""
    tokens = 0
    active = [conversation for conversation in batch if conversation.next_prompt()]
    while active:
        prompts, tools = ([getattr(one, name) for one in active] for name in ("messages", "tools"))
        answers = generator.generate(prompts, tools) if any(tools) else generator.generate(prompts)
        for conversation, answer in zip(active, answers, strict=True):
            conversation.add_answer(answer, min_distinct)
            tokens += answer.tokens if answer else 0
        active = [conversation for conversation in active if conversation.next_prompt()]
    return batch, tokens


def pending_batches(
    file: ConversationFile, done: set[str], batch_size: int, intake: Intake
) -> Iterator[list[Regenerated]]:
    """Yield batches of the conversations not in ``done``, shortest first: a batch then needs little padding.
    """
    sizes: list[tuple[int, int, str]] = []
    for offset, name, record in file.unique_records(intake):
        try:
            Regenerated.start(record)
        except BadRecord as error:
            intake.reject(file, file.line_numbers[offset], name, error)
            continue
        if name not in done:
            sizes.append((len(json.dumps(record)), offset, name))
    pending = iter(sorted(sizes))
    while chunk := list(islice(pending, batch_size)):
        yield [Regenerated.start(file.read(offset), name) for _, offset, name in chunk]


def regenerate(
    source: Path | ConversationFile, output: Path, generator: Generator, batch_size: int = 8,
    concurrency: int = 1, min_distinct: float = 0.0,
    progress: Callable[[int, int], None] = lambda conversations, tokens: None, intake: Intake | None = None,
) -> int:
    """Answer every conversation of ``source`` and append it to ``output`` as soon as it is done.

    A second run continues where the first was stopped. A conversation without any usable answer is recorded
    in ``output`` + ".skipped" and is not tried again.

    Args:
        source: conversations or prompts.
        output: JSONL of {"id", "messages", "finish"}.
        generator: answers the prompts.
        batch_size: conversations generated together.
        concurrency: batches generated at the same time, by threads.
        min_distinct: answers with a smaller `distinct_ratio` are unusable.
        progress: called with the conversations and tokens of each batch.
        intake: what to do with records that cannot be used; None: the first one raises ValueError. Rejected
            ones are listed in ``output`` + ".rejected".

    Returns: the number of conversations written.
    """
    skipped = output.with_name(output.name + ".skipped")
    done = finished_ids(output)
    if skipped.exists():
        done |= set(skipped.read_text(encoding="utf-8").split("\n"))
    written = 0
    file = source if isinstance(source, ConversationFile) else ConversationFile(source)
    intake = intake or Intake()
    with (
        ThreadPoolExecutor(concurrency) as pool, output.open("a", encoding="utf-8") as answered_file,
        skipped.open("a", encoding="utf-8") as skipped_file,
    ):
        batches = pending_batches(file, done, batch_size, intake)
        jobs = (pool.submit(answer_batch, batch, generator, min_distinct) for batch in batches)
        for job in _completed(jobs, 2 * concurrency):
            batch, tokens = job.result()
            for conversation in batch:
                if conversation.finish:
                    answered_file.write(conversation.line())
                    written += 1
                else:
                    skipped_file.write(conversation.id + "\n")
            for stream in (answered_file, skipped_file):
                stream.flush()
                os.fsync(stream.fileno())
            progress(len(batch), tokens)
    intake.write(output.with_name(output.name + ".rejected"))
    return written


def _completed(jobs: Iterator[Future], limit: int) -> Iterator[Future]:
    """Yield jobs as they complete, with at most ``limit`` submitted at a time.

    A failed job cancels the waiting ones.
    """
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
    """Return the ids in ``output``, after removing a last line that a kill left unfinished."""
    if not output.exists():
        return set()
    data = output.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        logger.info("%s: removing an unfinished last line", output)
        os.truncate(output, len(whole))
    try:
        return {record_id(json.loads(line)) for line in whole.splitlines()}
    except ValueError as error:
        found = f"{output} is not a file that this tool wrote ({error})"
        raise ValueError(f"{found}; choose another output") from error
