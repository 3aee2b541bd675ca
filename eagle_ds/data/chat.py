"""Turn conversations into token ids and a loss mask, with the tokenizer's own chat template.

The mask marks what the target generates when it is served: for each assistant turn, the text from the end of
the generation prompt through the end-of-turn token (data/template.py finds it). A ``{"text": ...}`` record is
trained whole.
"""

from __future__ import annotations

import logging
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from eagle_ds.data.narrow import Narrowing
from eagle_ds.data.shapes import THOUGHTS, BadRecord, Conversation, Message, conversation_of, record_id
from eagle_ds.data.template import FIXED_DATE, ChatTemplate, Span, Tools
from eagle_ds.store.manifest import trained_spans

logger = logging.getLogger(__name__)

# The name of a tokenizer's file begins with one of these.
TOKENIZER_NAMES = (
    "tokenizer", "tokenization", "vocab", "merges", "spiece", "sentencepiece", "tekken", "tiktoken")
# A tokenizer needs 100 times the memory of its text, so a longer text is tokenized in parts of this size.
PART_CHARACTERS = 1 << 16
# Tokenizers that split texts into words split here: before a space or a punctuation mark that follows a word.
WORD_END = re.compile(r"(?<=[^\W_])(?=[^\w\s'’]| [^\W_])")
AROUND = 64  # characters on each side of a border of parts that are tokenized once more, to check the border


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
    ignored: Counter[str] = field(default_factory=Counter)  # fields of records that the template leaves out
    examples: dict[str, str] = field(default_factory=dict)  # the first record with each of these fields
    without_answer: int = 0
    truncated: int = 0
    overlong: int = 0
    untrained: int = 0
    duplicates: int = 0

    def __str__(self) -> str:
        return "; ".join(self.parts())

    def parts(self) -> list[str]:
        """Return a phrase about the samples, then one about each kind of change or skipped record."""
        parts = [f"{self.samples} samples, {self.tokens} tokens, {self.trained_tokens} trained"]
        for name, text in (
            ("truncated", "truncated to max_length"),
            ("without_answer", "skipped without an answer"),
            ("overlong", "skipped as longer than max_length"),
            ("untrained", "skipped with no answer left after truncation"),
            ("duplicates", "skipped as repeated"),
        ):
            if getattr(self, name):
                parts.append(f"{getattr(self, name)} {text}")
        for name, count in self.ignored.items():
            example = f"(for example {self.examples[name]})"
            parts.append(f"{count} with {name}, which the chat template ignores {example}")
        return parts


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
    """Encode records with one tokenizer.

    Args:
        max_length: the most tokens of a sample.
        overlong: whether a longer sample is truncated or skipped.
        date: the date that templates see as today.
        template_kwargs: more variables of the template.
    """

    def __init__(
        self, tokenizer: Any, max_length: int, overlong: Literal["truncate", "skip"] = "truncate",
        date: str = FIXED_DATE, template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer, date, template_kwargs or {})
        self.max_length = max_length
        self.overlong = overlong
        self.stats = EncodeStats()

    def encode(self, record: Mapping[str, Any], name: str | None = None) -> EncodedSample | None:
        """Encode a record. Returns None if it is skipped; ``stats`` counts both cases.

        Args:
            name: the sample's id; None: the record's own.

        Raises:
            BadRecord: the record is malformed, or the template refuses it.
            ValueError: the tokenizer has no template.
        """
        name = record_id(record) if name is None else name
        conversation = conversation_of(record)
        del record  # It may be long: the fewer copies of its texts, the better.
        if conversation.text is not None:
            ids = self._tokenize_text(conversation.text)
            return self._fit(EncodedSample(name, ids, np.ones(len(ids), np.uint8)))
        if not _has_answer(conversation):
            self.stats.without_answer += 1
            return None
        # Positions in the narrow text are those in the restored one.
        narrowing = Narrowing.for_conversation(conversation, str(self.tokenizer.chat_template))
        conversation = narrowing.narrow(conversation)
        rendered = self.template.locate(conversation)
        del conversation
        for ignored in rendered.ignored:
            if ignored not in self.stats.ignored:
                logger.warning("the chat template ignores %s, for example in the record %s", ignored, name)
                self.stats.examples[ignored] = name
            self.stats.ignored[ignored] += 1
        text, spans = narrowing.restore(rendered.text), rendered.spans
        del rendered
        ids, mask = self._tokenize_spans(text, spans)
        if not mask.any():
            raise BadRecord(
                "answers not rendered",
                "the loss mask of this conversation is all zeros: the chat template renders none of its "
                "assistant turns; check the template")
        return self._fit(EncodedSample(name, ids, mask))

    def prompt_ids(self, messages: Sequence[Message], tools: Tools = None) -> list[int]:
        """Return the token ids of a conversation through the generation prompt: the input when served."""
        text = self.render(messages, True, tools)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def render(
        self, messages: Sequence[Message], generation_prompt: bool = False, tools: Tools = None
    ) -> str:
        """Render a conversation as text, like `ChatTemplate.render`."""
        return self.template.render(messages, generation_prompt, tools)

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

    def _tokenize_spans(self, text: str, spans: Sequence[Span]) -> tuple[np.ndarray, np.ndarray]:
        """Tokenize ``text`` and mark the spans: ids int32 [S], mask uint8 [S]. Check the result by decoding.

        The text is first tokenized piece by piece, split at the spans. The prompt then gets the same tokens
        as in serving. Character offsets, which tokenizers written in Python do not have, are not needed.
        Some tokenizers (SentencePiece) put a space before every piece. Then the decoded text differs, and the
        whole text is tokenized at once, with offsets.
        """
        borders = [0, *(border for span in spans for border in span), len(text)]
        if (tokens := self._tokenize_pieces(text, borders)) is not None:
            ids, counts = tokens
            return ids, np.repeat(np.arange(len(counts), dtype=np.uint8) % 2, counts)
        if not self.tokenizer.is_fast:
            raise BadRecord(
                "text not reproduced",
                "the tokenizer does not reproduce this conversation's text, and it has no character "
                "offsets to find the answers with; use the target's fast tokenizer")
        ids, mask = self._tokenize_whole(text, spans)
        expected = "".join(text[start:end] for start, end in spans)
        if "".join(self._decode(ids[mask.astype(bool)]).split()) != "".join(expected.split()):
            raise BadRecord(
                "mask not exact", "the loss mask does not decode back to the answers of this conversation")
        return ids, mask

    def _tokenize_pieces(self, text: str, borders: Sequence[int]) -> tuple[np.ndarray, list[int]] | None:
        """Tokenize each piece of text between two borders.

        Returns:
            The token ids of all pieces, int32, and their number in each piece; None if they do not decode to
            the text.
        """
        pairs = list(zip(borders[:-1], borders[1:], strict=True))
        if len(text) <= PART_CHARACTERS:
            pieces = [text[start:end] for start, end in pairs]
            batch = self.tokenizer(pieces, add_special_tokens=False)["input_ids"]
            ids = np.asarray([token for piece in batch for token in piece], np.int32)
            return (ids, list(map(len, batch))) if self._decode(ids) == text else None
        # Decoding a long text takes as much memory as tokenizing it, so each part is compared alone. That is
        # enough if nothing comes between the texts of two parts.
        if self._decode(np.concatenate([self._tokenize("a"), self._tokenize("b")])) != "ab":
            return None
        tokens, ends = array("i"), [0]
        for start, end in pairs:
            for part in self._parts(text, start, end):
                ids = self._tokenize(part)
                if self._decode(ids) != part:
                    return None
                tokens.frombytes(ids.tobytes())
            ends.append(len(tokens))
        return np.frombuffer(tokens, np.int32), np.diff(ends).tolist()

    def _parts(self, text: str, start: int, stop: int) -> Iterator[str]:
        """Split text[start:stop] where its tokens are those of the parts.

        The borders are ends of words, where tokenizers split a text first. At each one, the characters around
        it are tokenized with and without the border.
        """
        search_from = start + PART_CHARACTERS
        while found := WORD_END.search(text, search_from, stop):
            border, search_from = found.start(), found.start() + 1
            left = text[max(start, border - AROUND) : border]
            right = text[border : min(border + AROUND, stop)]
            apart = np.concatenate([self._tokenize(left), self._tokenize(right)])
            if np.array_equal(self._tokenize(left + right), apart):
                yield text[start:border]
                start, search_from = border, border + PART_CHARACTERS
        yield text[start:stop]

    def _tokenize_text(self, text: str) -> np.ndarray:
        """Tokenize plain text with the special tokens that the tokenizer adds, such as BOS."""
        if len(text) <= PART_CHARACTERS:
            return np.asarray(self.tokenizer(text)["input_ids"], np.int32)
        tokens = self._tokenize_pieces(text, (0, len(text)))
        if tokens is None:
            return np.asarray(self.tokenizer(text)["input_ids"], np.int32)
        added, plain = self.tokenizer("a")["input_ids"], self._tokenize("a").tolist()
        start = next(i for i in range(len(added)) if added[i : i + len(plain)] == plain)
        ends = (np.asarray(ids, np.int32) for ids in (added[:start], added[start + len(plain) :]))
        return np.concatenate([next(ends), tokens[0], next(ends)])

    def _tokenize(self, text: str) -> np.ndarray:
        return np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)

    def _decode(self, ids: np.ndarray) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def _tokenize_whole(self, text: str, spans: Sequence[Span]) -> tuple[np.ndarray, np.ndarray]:
        """Tokenize the whole text; a token is trained if it begins inside a span."""
        whole = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        begins = np.asarray([begin for begin, _ in whole["offset_mapping"]])
        mask = np.zeros(len(begins), np.uint8)
        for start, end in spans:
            mask[(begins >= start) & (begins < end)] = 1
        return np.asarray(whole["input_ids"], np.int32), mask


def _has_answer(conversation: Conversation) -> bool:
    answers = (message for message in conversation.messages if message["role"] == "assistant")
    return any(answer.get(name) for answer in answers for name in ("content", "tool_calls", *THOUGHTS))
