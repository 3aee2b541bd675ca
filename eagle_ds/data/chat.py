"""Conversations to token ids and loss mask, by the tokenizer's own chat template.

What is trained: everything that the target generates when it is served, that is the text from the end of the generation
prompt (the role header is not trained) through the end-of-turn token. A ``{"text"}`` line is trained whole.

No target's own template marks that text, so it is found by rendering: the conversation is rendered once more for each
assistant message with the content replaced by a sentinel. The two renderings differ in this message's content and
nowhere else, whatever the template does to headers, white space, thinking blocks, or a turn that stands last. A turn whose
content the template leaves out is not trained (Llama 3's and gpt-oss's bare tool calls).
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

Message = dict[str, Any]
Span = tuple[int, int]

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
SENTINELS = ("\ue000", "\ue001", "\ue002", "\ue003")  # private use: never in real text, and one is unlike any given character
TOKENIZER_NAMES = ("tokenizer", "tokenization", "vocab", "merges", "spiece", "sentencepiece", "tekken", "tiktoken")  # files begin so
FIXED_DATE = "2024-07-26"  # the default that Llama 3.1's own template carries


@dataclass(frozen=True)
class Encoded:
    """One sample: ``input_ids`` int32 [S] and ``loss_mask`` uint8 [S], nothing shifted."""

    id: str
    input_ids: np.ndarray
    loss_mask: np.ndarray

    @property
    def trained_spans(self) -> tuple[Span, ...]:
        """[start, end) of every run of trained tokens."""
        edges = np.flatnonzero(np.diff(self.loss_mask.astype(np.int8), prepend=0, append=0))
        return tuple((int(start), int(end)) for start, end in edges.reshape(-1, 2))


@dataclass
class EncodeStats:
    """What became of the lines of a file."""

    samples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    without_answer: int = 0
    truncated: int = 0
    overlong: int = 0
    untrained: int = 0
    duplicates: int = 0

    def __str__(self) -> str:
        parts = [f"{self.samples} samples, {self.tokens} tokens, {self.trained_tokens} trained"]
        for name, text in (
            ("truncated", "truncated to max_length"),
            ("without_answer", "skipped without an assistant turn"),
            ("overlong", "skipped as longer than max_length"),
            ("untrained", "skipped with no answer left after truncation"),
            ("duplicates", "skipped as repeated"),
        ):
            if getattr(self, name):
                parts.append(f"{getattr(self, name)} {text}")
        return "; ".join(parts)


def load_tokenizer(folder: str | Path) -> Any:
    """The target's tokenizer; ValueError in one sentence where it cannot be loaded."""
    from transformers import AutoTokenizer

    if not any(path.name.startswith(TOKENIZER_NAMES) for path in Path(folder).iterdir()):
        raise ValueError(
            f"{folder} has no tokenizer (tokenizer.json, tokenizer.model or vocab.json); fetch the target's tokenizer files too"
        )
    try:
        return AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"the tokenizer in {folder} cannot be loaded: {str(error).splitlines()[0]}") from error


class ChatEncoder:
    """Encodes records of a JSONL file for one tokenizer.

    ``date`` is what templates see as today, so that features captured on different days agree. ``template_kwargs`` go
    to the template as they are (``{"enable_thinking": False}``).
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        overlong: Literal["truncate", "skip"] = "truncate",
        date: str = FIXED_DATE,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        today = datetime.date.fromisoformat(date)
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.overlong = overlong
        self.stats = EncodeStats()
        self._template_kwargs = {"strftime_now": today.strftime, **(template_kwargs or {})}
        special = {added.content for added in tokenizer.added_tokens_decoder.values() if added.special} | set(tokenizer.all_special_tokens)
        self._special_token = re.compile("|".join(re.escape(token) for token in sorted(special, key=len, reverse=True)) or r"(?!)")

    def encode(self, record: Mapping[str, Any]) -> Encoded | None:
        """Sample of a record, or None where it was skipped; :attr:`stats` counts either way.

        Raises ValueError for a record that is malformed or that the template refuses.
        """
        if "text" in record:
            encoded = self._encode_text(str(record["text"]), record_id(record))
        else:
            messages = messages_of(record)
            if not any(message["role"] == "assistant" and (message.get("content") or message.get("tool_calls")) for message in messages):
                self.stats.without_answer += 1
                return None
            encoded = self._encode_chat(messages, record_id(record))
        return self._fit(encoded)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation up to and including the generation prompt: what the target is served."""
        return self._tokenize(self.render(messages, generation_prompt=True))

    def render(self, messages: Sequence[Message], generation_prompt: bool = False) -> str:
        """Text of a conversation. ValueError where there is no template or it refuses the conversation."""
        from jinja2 import TemplateError

        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(
                f"the tokenizer of {self.tokenizer.name_or_path} has no chat template; use a chat model as target, or "
                'lines of {"text": ...} in place of conversations'
            )
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generation_prompt, **self._template_kwargs
            )
        except (TemplateError, TypeError) as error:  # TypeError: content that is no text
            raise ValueError(f"the chat template refuses this conversation: {error}") from error

    def _tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _encode_text(self, text: str, name: str) -> Encoded:
        ids = np.asarray(self.tokenizer(text)["input_ids"], np.int32)
        return Encoded(name, ids, np.ones(len(ids), np.uint8))

    def _encode_chat(self, messages: list[Message], name: str) -> Encoded:
        text, spans = self.answer_spans(messages)
        ids, mask = self._tokenize_spans(text, spans)
        if not mask.any():
            raise ValueError("the loss mask of this conversation is all zeros: the chat template renders none of its assistant turns")
        return Encoded(name, ids, mask)

    def _fit(self, encoded: Encoded) -> Encoded | None:
        """Apply max_length and count."""
        if len(encoded.input_ids) > self.max_length:
            if self.overlong == "skip":
                self.stats.overlong += 1
                return None
            encoded = Encoded(encoded.id, encoded.input_ids[: self.max_length], encoded.loss_mask[: self.max_length])
            if not encoded.loss_mask.any():
                self.stats.untrained += 1
                return None
            self.stats.truncated += 1
        self.stats.samples += 1
        self.stats.tokens += len(encoded.input_ids)
        self.stats.trained_tokens += int(encoded.loss_mask.sum())
        return encoded

    def answer_spans(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """(rendered text, [start, end) in characters of what the target generates in it, one span an assistant turn)."""
        text = self.render(messages)
        spans: list[Span] = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            content = self._content_span(text, messages, i)
            if content is None:
                continue
            start = self._after_generation_prompt(text, messages[:i], spans[-1][1] if spans else 0, content[0])
            spans.append((start, self._through_end_of_turn(text, content[1], bool(message.get("tool_calls")))))
        return text, spans

    def _content_span(self, text: str, messages: Sequence[Message], i: int) -> Span | None:
        """Where message ``i``'s content stands in ``text``: what changes when it is replaced by a sentinel.

        The sentinel's end characters do not occur in ``text``, so neither the common prefix nor the common suffix can run
        into the content. None where the template leaves the content out.
        """
        first, last = [mark for mark in SENTINELS if mark not in text][:2]
        replaced = [*messages[:i], {**messages[i], "content": f"{first}answer{last}"}, *messages[i + 1 :]]
        other = self.render(replaced)
        if other.count(first) != 1:
            return None
        start = common_prefix(text, other)
        return start, len(text) - common_suffix(text[start:], other[other.index(last) :])

    def _after_generation_prompt(self, text: str, before: Sequence[Message], floor: int, content_start: int) -> int:
        """End of the role header: thinking blocks and channel names after it are generated, so they are trained."""
        try:
            without, with_prompt = self.render(before), self.render(before, generation_prompt=True)
        except ValueError:  # a template may refuse a prefix that stands alone, such as an empty one
            return content_start
        header = with_prompt[common_prefix(without, with_prompt) :]
        found = text.rfind(header, floor, content_start) if header else -1
        return found + len(header) if found >= 0 else content_start

    def _through_end_of_turn(self, text: str, content_end: int, tool_calls: bool) -> int:
        """End of the first special token after the content; nothing but white space (or tool calls) may come between."""
        found = self._special_token.search(text, content_end)
        if found is None or (text[content_end : found.start()].strip() and not tool_calls):
            return content_end
        return found.end()

    def _tokenize_spans(self, text: str, spans: Sequence[Span]) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 [S] and mask uint8 [S]; every span is checked by decoding it back.

        Piece by piece first: so the prompt's tokens are those that serving sees, and it needs no offsets, which Python
        tokenizers lack. A tokenizer that puts a space before every piece (SentencePiece) shows in the check, and is done
        whole, by offsets.
        """
        ids, mask = self._tokenize_pieces(text, spans)
        if self.tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text:
            return ids, mask
        if not self.tokenizer.is_fast:
            raise ValueError("the tokenizer does not reproduce this conversation's text, and has no offsets to place its answers by")
        ids, mask = self._tokenize_whole(text, spans)
        decoded = self.tokenizer.decode(ids[mask.astype(bool)], clean_up_tokenization_spaces=False)
        expected = "".join(text[start:end] for start, end in spans)
        if "".join(decoded.split()) != "".join(expected.split()):
            raise ValueError("the loss mask does not decode back to the answers of this conversation")
        return ids, mask

    def _tokenize_pieces(self, text: str, spans: Sequence[Span]) -> tuple[np.ndarray, np.ndarray]:
        ids: list[int] = []
        mask: list[int] = []
        position = 0
        for start, end in [*spans, (len(text), len(text))]:
            for piece, trained in ((text[position:start], 0), (text[start:end], 1)):
                tokens = self._tokenize(piece) if piece else []
                ids += tokens
                mask += [trained] * len(tokens)
            position = end
        return np.asarray(ids, np.int32), np.asarray(mask, np.uint8)

    def _tokenize_whole(self, text: str, spans: Sequence[Span]) -> tuple[np.ndarray, np.ndarray]:
        """A token is trained if it begins inside a span."""
        whole = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        begins = np.asarray([begin for begin, _ in whole["offset_mapping"]])
        mask = np.zeros(len(begins), np.uint8)
        for start, end in spans:
            mask[(begins >= start) & (begins < end)] = 1
        return np.asarray(whole["input_ids"], np.int32), mask


def messages_of(record: Mapping[str, Any]) -> list[Message]:
    """Messages with ``role`` and ``content``, from ``messages`` or ``conversations`` (ShareGPT's from/value too)."""
    messages = record.get("messages", record.get("conversations"))
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise ValueError('expected "messages" or "conversations" with a list of {"role", "content"}, or "text"')
    normal = []
    for message in messages:
        if "role" not in message and {"from", "value"} <= message.keys():
            message = {"role": SHAREGPT_ROLES.get(message["from"], message["from"]), "content": message["value"]}
        if "role" not in message or not ("content" in message or "tool_calls" in message):
            raise ValueError(f'a message has the keys {sorted(message)}; expected "role" and "content"')
        normal.append(message)
    return normal


def record_id(record: Mapping[str, Any]) -> str:
    """The record's id, else one made from its content, so that it survives reordering of the file."""
    if record.get("id") is not None:
        return str(record["id"])
    return hashlib.sha256(json.dumps(record, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:20]


def common_prefix(a: str, b: str) -> int:
    """Length of the longest common prefix, by bisection over slices (a loop over 128K tokens of text takes a second)."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def common_suffix(a: str, b: str) -> int:
    """Length of the longest common suffix."""
    return common_prefix(a[::-1], b[::-1])
