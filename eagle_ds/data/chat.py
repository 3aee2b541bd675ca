"""Turn conversations into token ids and a loss mask, with the tokenizer's own chat template.

The mask marks what the target generates when it is served: for each assistant turn, the text from the end of
the generation prompt through the end-of-turn token. The role header belongs to the prompt, so it is not
trained. A ``{"text": ...}`` record is trained whole.

Chat templates do not mark this text, so it is found by rendering. For each assistant message the conversation
is rendered a second time, with a sentinel in place of the message's content. The two renderings differ in the
content only, whatever the template does to headers, white space, thinking blocks or the last turn. A turn
whose content the template leaves out (bare tool calls of Llama 3 and gpt-oss) is not trained.
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

from eagle_ds.store.manifest import trained_spans

Message = dict[str, Any]
Span = tuple[int, int]

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
# Private-use characters, which real text does not contain. A sentinel begins and ends with two of them.
SENTINELS = ("\ue000", "\ue001", "\ue002", "\ue003")
# The name of a tokenizer's file begins with one of these.
TOKENIZER_NAMES = (
    "tokenizer", "tokenization", "vocab", "merges", "spiece", "sentencepiece", "tekken", "tiktoken")
FIXED_DATE = "2024-07-26"  # the default date in Llama 3.1's template


@dataclass(frozen=True)
class EncodedSample:
    """One tokenized sample: ``input_ids`` int32 [S] and ``loss_mask`` uint8 [S]. Position p is token p."""

    id: str
    input_ids: np.ndarray
    loss_mask: np.ndarray

    @property
    def trained_spans(self) -> tuple[Span, ...]:
        """[start, end) of every run of trained tokens."""
        return trained_spans(self.loss_mask)


@dataclass
class EncodeStats:
    """Counts of the lines of a file: encoded, changed or skipped."""

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
    """Load the target's tokenizer. Raises ValueError if it is missing or cannot be loaded."""
    from transformers import AutoTokenizer

    if not any(path.name.startswith(TOKENIZER_NAMES) for path in Path(folder).iterdir()):
        expected = "tokenizer.json, tokenizer.model or vocab.json"
        raise ValueError(f"{folder} has no tokenizer ({expected}); fetch the target's tokenizer files too")
    try:
        return AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"the tokenizer in {folder} cannot be loaded: {reason}") from error


class ChatEncoder:
    """Encode records of a JSONL file with one tokenizer.

    Args:
        max_length: the most tokens of a sample.
        overlong: whether a longer sample is truncated or skipped.
        date: the date that templates see as today; fixed, so that captures on different days agree.
        template_kwargs: extra variables of the template, for example ``{"enable_thinking": False}``.
    """

    def __init__(
        self, tokenizer: Any, max_length: int, overlong: Literal["truncate", "skip"] = "truncate",
        date: str = FIXED_DATE, template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        today = datetime.date.fromisoformat(date)
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.overlong = overlong
        self.stats = EncodeStats()
        self._template_kwargs = {"strftime_now": today.strftime, **(template_kwargs or {})}
        added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        special = sorted(added | set(tokenizer.all_special_tokens), key=len, reverse=True)
        # Longest first, so that a token that begins with another one is matched whole. (?!) never matches.
        self._special_token = re.compile("|".join(map(re.escape, special)) or r"(?!)")

    def encode(self, record: Mapping[str, Any]) -> EncodedSample | None:
        """Encode a record. Returns None if it is skipped; ``stats`` counts both cases.

        Raises ValueError if the record is malformed or the template refuses it.
        """
        if "text" in record:
            encoded = self._encode_text(str(record["text"]), record_id(record))
        else:
            messages = messages_of(record)
            turns = [message for message in messages if message["role"] == "assistant"]
            if not any(turn.get("content") or turn.get("tool_calls") for turn in turns):
                self.stats.without_answer += 1
                return None
            encoded = self._encode_chat(messages, record_id(record))
        return self._fit(encoded)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of a conversation through the generation prompt: the input when served."""
        return self._tokenize(self.render(messages, generation_prompt=True))

    def render(self, messages: Sequence[Message], generation_prompt: bool = False) -> str:
        """Render a conversation as text.

        Raises ValueError without a template, or if the template refuses it.
        """
        from jinja2 import TemplateError

        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(
                f"the tokenizer of {self.tokenizer.name_or_path} has no chat template; use a chat model as "
                'target, or lines of {"text": ...} instead of conversations')
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generation_prompt,
                **self._template_kwargs)
        except (TemplateError, TypeError) as error:  # TypeError: the content is not a string
            raise ValueError(f"the chat template refuses this conversation: {error}") from error

    def _tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _encode_text(self, text: str, name: str) -> EncodedSample:
        ids = np.asarray(self.tokenizer(text)["input_ids"], np.int32)
        return EncodedSample(name, ids, np.ones(len(ids), np.uint8))

    def _encode_chat(self, messages: list[Message], name: str) -> EncodedSample:
        text, spans = self.answer_spans(messages)
        ids, mask = self._tokenize_spans(text, spans)
        if not mask.any():
            raise ValueError(
                "the loss mask of this conversation is all zeros: the chat template renders none of its "
                "assistant turns; check the template")
        return EncodedSample(name, ids, mask)

    def _fit(self, encoded: EncodedSample) -> EncodedSample | None:
        """Apply ``max_length`` and update the counts."""
        if len(encoded.input_ids) > self.max_length:
            if self.overlong == "skip":
                self.stats.overlong += 1
                return None
            ids, mask = encoded.input_ids[: self.max_length], encoded.loss_mask[: self.max_length]
            encoded = EncodedSample(encoded.id, ids, mask)
            if not encoded.loss_mask.any():
                self.stats.untrained += 1
                return None
            self.stats.truncated += 1
        self.stats.samples += 1
        self.stats.tokens += len(encoded.input_ids)
        self.stats.trained_tokens += int(encoded.loss_mask.sum())
        return encoded

    def answer_spans(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """Find what the target generates in a conversation.

        Returns:
            The rendered text, and one span [start, end) in characters for each assistant turn in it.
        """
        text = self.render(messages)
        spans: list[Span] = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            content = self._content_span(text, messages, i)
            if content is None:
                continue
            after_last = spans[-1][1] if spans else 0
            start = self._after_generation_prompt(text, messages[:i], after_last, content[0])
            end = self._through_end_of_turn(text, content[1], bool(message.get("tool_calls")))
            spans.append((start, end))
        return text, spans

    def _content_span(self, text: str, messages: Sequence[Message], i: int) -> Span | None:
        """Find the content of message ``i`` in ``text``: the part that changes when a sentinel replaces it.

        The sentinel begins and ends with characters that do not occur in ``text``. So the common prefix and
        the common suffix of both renderings stop exactly at the content. Returns None if the template leaves
        the content out.
        """
        first, last = [mark for mark in SENTINELS if mark not in text][:2]
        replaced = [*messages[:i], {**messages[i], "content": f"{first}answer{last}"}, *messages[i + 1 :]]
        other = self.render(replaced)
        if other.count(first) != 1:
            return None
        start = common_prefix(text, other)
        return start, len(text) - common_suffix(text[start:], other[other.index(last) :])

    def _after_generation_prompt(
        self, text: str, before: Sequence[Message], floor: int, content_start: int
    ) -> int:
        """Return the end of the role header between ``floor`` and the content.

        The header is the generation prompt, which the template adds to the messages ``before``. Thinking
        blocks and channel names that follow it are generated by the target, so they are trained.
        """
        try:
            without, with_prompt = self.render(before), self.render(before, generation_prompt=True)
        except ValueError:  # a template may refuse the messages before, for example an empty list
            return content_start
        header = with_prompt[common_prefix(without, with_prompt) :]
        found = text.rfind(header, floor, content_start) if header else -1
        return found + len(header) if found >= 0 else content_start

    def _through_end_of_turn(self, text: str, content_end: int, tool_calls: bool) -> int:
        """Return the end of the end-of-turn token: the first special token after the content.

        Only white space, or tool calls, may come between; otherwise the template has no such token.
        """
        found = self._special_token.search(text, content_end)
        if found is None or (text[content_end : found.start()].strip() and not tool_calls):
            return content_end
        return found.end()

    def _tokenize_spans(self, text: str, spans: Sequence[Span]) -> tuple[np.ndarray, np.ndarray]:
        """Tokenize ``text`` and mark the spans: ids int32 [S], mask uint8 [S]. Check the result by decoding.

        The text is first tokenized piece by piece, split at the spans. The prompt then gets the same tokens
        as in serving. Character offsets, which tokenizers written in Python do not have, are not needed.
        Some tokenizers (SentencePiece) put a space before every piece. Then the decoded text differs, and the
        whole text is tokenized at once, with offsets.
        """
        ids, mask = self._tokenize_pieces(text, spans)
        if self.tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text:
            return ids, mask
        if not self.tokenizer.is_fast:
            raise ValueError(
                "the tokenizer does not reproduce this conversation's text, and it has no character "
                "offsets to find the answers with; use the target's fast tokenizer")
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
        """Tokenize the whole text; a token is trained if it begins inside a span."""
        whole = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        begins = np.asarray([begin for begin, _ in whole["offset_mapping"]])
        mask = np.zeros(len(begins), np.uint8)
        for start, end in spans:
            mask[(begins >= start) & (begins < end)] = 1
        return np.asarray(whole["input_ids"], np.int32), mask


def messages_of(record: Mapping[str, Any]) -> list[Message]:
    """Return a record's messages with ``role`` and ``content``; ShareGPT's from/value are converted."""
    messages = record.get("messages", record.get("conversations"))
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise ValueError('expected "text", or a list of {"role", "content"} as "messages" or "conversations"')
    normal = []
    for message in messages:
        if "role" not in message and {"from", "value"} <= message.keys():
            role = SHAREGPT_ROLES.get(message["from"], message["from"])
            message = {"role": role, "content": message["value"]}
        if "role" not in message or not ("content" in message or "tool_calls" in message):
            raise ValueError(f'a message has the keys {sorted(message)}; expected "role" and "content"')
        normal.append(message)
    return normal


def record_id(record: Mapping[str, Any]) -> str:
    """Return the record's id. Without one, hash the content, so the id does not depend on the line number."""
    if record.get("id") is not None:
        return str(record["id"])
    return hashlib.sha256(json.dumps(record, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:20]


def common_prefix(a: str, b: str) -> int:
    """Return the length of the longest common prefix.

    Found by bisection, which compares whole slices. A loop over the characters of 128K tokens takes a second.
    """
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def common_suffix(a: str, b: str) -> int:
    """Return the length of the longest common suffix."""
    return common_prefix(a[::-1], b[::-1])
