"""Render conversations with the tokenizer's chat template, and find in the text what the target generates.

Chat templates do not mark answers, so they are found by rendering. A conversation is rendered a second time
with a *mark* in place of every text in it. Between the marks are the template's own words. If these words and
the texts together give the first rendering, the position of every text is known exactly (the fast way).

Templates also change texts: they trim, drop earlier thinking, write tool calls as JSON. Then each assistant
turn is rendered with marks of its own. The two renderings differ in this turn only, so their common prefix
ends where the turn begins, and their common suffix begins where it ends (the slow way). If a mark is missing,
the template left that text out.

The answer begins where the generation prompt ends, and includes the end-of-turn token. So thinking blocks,
channel names and tool calls, which the target generates, are part of it, and the role header is not.
"""

from __future__ import annotations

import datetime
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eagle_ds.data.shapes import THOUGHTS, BadRecord, Conversation, Message

logger = logging.getLogger(__name__)

Span = tuple[int, int]
Tools = Sequence[Mapping[str, Any]] | None

# Private-use characters, which real text does not contain. A mark begins and ends with one of them.
SENTINELS = ("\ue000", "\ue001", "\ue002", "\ue003")
FIXED_DATE = "2024-07-26"  # the default date in Llama 3.1's template
TEXTS = ("content", *THOUGHTS)
TESTED = ("role", "tool_calls", *TEXTS)  # fields whose effect marks show
QUESTION = [{"role": "user", "content": "?"}]
# Template variables that rendering sets itself.
OWN_VARIABLES = ("messages", "conversation", "tools", "add_generation_prompt", "tokenize", "chat_template")


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, the spans that the target generates, and what the template left out."""

    text: str
    spans: list[Span]  # [start, end) in characters, one for each assistant turn that has words
    ignored: list[str]  # fields that the record has and the text does not depend on


@dataclass(frozen=True)
class Marker:
    """Makes the marks of one conversation: two characters that its text does not contain, and a number."""

    first: str
    last: str

    @classmethod
    def for_text(cls, text: str) -> Marker:
        free = [mark for mark in SENTINELS if mark not in text]
        if len(free) < 2:
            raise BadRecord.at("content", f"all of {list(SENTINELS)}", "text", "private-use characters")
        return cls(*free[:2])

    def mark(self, number: int) -> str:
        return f"{self.first}{number}{self.last}"

    def split(self, text: str) -> list[str]:
        """Return the text between marks, and the number of each mark between them."""
        return re.split(f"{self.first}(\\d+){self.last}", text)


@dataclass(frozen=True)
class Leaf:
    """A text of a message that can be replaced by a mark: its content, its thinking or one of its calls."""

    mark: str
    message: int
    role: str
    field: str
    value: str | None  # None for a tool call, which the template writes in its own way

    @property
    def kind(self) -> str:
        return f"{self.field} of {self.role} messages"


class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        date: the date that templates see as today; fixed, so that captures on different days agree.
        template_kwargs: more variables of the template, for example ``{"enable_thinking": False}``.
    """

    def __init__(self, tokenizer: Any, date: str, template_kwargs: Mapping[str, Any]) -> None:
        if own := [name for name in OWN_VARIABLES if name in template_kwargs]:
            found = f"template_kwargs has {', '.join(own)}"
            raise ValueError(f"{found}, which each record sets itself; remove it")
        self.tokenizer = tokenizer
        if unread := [name for name in template_kwargs if name not in self._words()]:
            logger.warning("the chat template does not read %s of template_kwargs", ", ".join(unread))
        today = datetime.date.fromisoformat(date)
        self.kwargs = dict(template_kwargs)
        self._variables = {"strftime_now": today.strftime, **template_kwargs}
        self._headers: dict[Any, str] = {}  # by template
        self._unread: set[str] = set()  # ignored fields of messages that the template's source does not name
        added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        special = sorted(added | set(tokenizer.all_special_tokens), key=len, reverse=True)
        # Longest first, so that a token that begins with another one is matched whole. (?!) never matches.
        self._special_token = re.compile("|".join(map(re.escape, special)) or r"(?!)")

    def render(
        self, messages: Sequence[Message], generation_prompt: bool = False, tools: Tools = None
    ) -> str:
        """Render a conversation as text.

        Raises ValueError without a template, and BadRecord if the template refuses the conversation.
        """
        from jinja2 import TemplateError

        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(
                f"the tokenizer of {self.tokenizer.name_or_path} has no chat template; use a chat model as "
                'target, or lines of {"text": ...} instead of conversations')
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tools=tools and list(tools), tokenize=False,
                add_generation_prompt=generation_prompt, **self._variables)
        # A template runs Python's operations, which raise any of these for a value that it does not expect.
        except (TemplateError, TypeError, LookupError, AttributeError, ValueError) as error:
            message = f"the chat template refuses this conversation: {error}"
            raise BadRecord("refused by the template", message) from error

    def locate(self, conversation: Conversation) -> Rendered:
        """Render a conversation and find what the target generates in it. Raises BadRecord like `render`."""
        messages, tools = conversation.messages, conversation.tools
        text = self.render(messages, tools=tools)
        marker = Marker.for_text(text)
        masked, leaves = _mask(messages, marker)
        other = self.render(masked, tools=tools)
        spans = self._by_words(text, other, marker, masked, leaves, tools)
        if spans is None:
            spans = self._by_difference(text, marker, messages, tools)
        return Rendered(text, spans, list(self._ignored(text, conversation, leaves, other)))

    def _by_words(
        self, text: str, other: str, marker: Marker, masked: list[Message], leaves: list[Leaf], tools: Tools
    ) -> list[Span] | None:
        """Find the answers from the template's words between marks; None if they do not give the text."""
        words = marker.split(other)  # words, number of a mark, words, number of a mark, ..., words
        numbers = [int(number) for number in words[1::2]]
        sent = [leaves[number].message for number in numbers]
        has_calls = any(leaf.value is None for leaf in leaves)
        if has_calls or sent != sorted(sent) or len(set(numbers)) < len(numbers):
            return None
        spans: dict[int, Span] = {}  # by message
        position = marked = len(words[0])  # where the same words end in text and in other
        if not text.startswith(words[0]):
            return None
        for i, number in enumerate(numbers):
            leaf, before, after = leaves[number], words[2 * i], words[2 * i + 2]
            length = _length_at(text, position, leaf.value, after)
            if length is None:
                return None
            if leaf.role == "assistant":
                has_content = bool(masked[leaf.message].get("content"))
                end = self._through_end_of_turn(text, position + length, not has_content)
                if leaf.message in spans:
                    start = spans[leaf.message][0]
                else:
                    floor, earlier = marked - len(before), masked[: leaf.message]
                    header_end = self._after_generation_prompt(other, earlier, tools, floor, marked)
                    start = position - (marked - header_end)
                spans[leaf.message] = (start, end)
            position += length + len(after)
            marked += len(leaf.mark) + len(after)
        return list(spans.values()) if position == len(text) else None

    def _by_difference(self, text: str, marker: Marker, messages: list[Message], tools: Tools) -> list[Span]:
        """Find the answers one by one, from renderings that differ in one assistant turn each."""
        spans: list[Span] = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            masked, _ = _mask(messages, marker, only=i)
            other = self.render(masked, tools=tools)
            numbers = marker.split(other)[1::2]
            if not numbers:  # an empty turn, or one that the template leaves out
                continue
            if len(set(numbers)) < len(numbers):
                problem = f"the chat template writes a text of message {i} twice, so its mask is not exact"
                raise BadRecord("answer rendered twice", problem)
            begin = common_prefix(text, other)
            end = len(text) - common_suffix(text[begin:], other[other.rindex(marker.last) :])
            floor = spans[-1][1] if spans else 0
            start = self._after_generation_prompt(text, messages[:i], tools, floor, begin)
            more = "tool_calls" in message or not message.get("content")
            spans.append((start, self._through_end_of_turn(text, end, more)))
        return spans

    def _after_generation_prompt(
        self, text: str, before: Sequence[Message], tools: Tools, floor: int, content_start: int
    ) -> int:
        """Return where an answer begins between ``floor`` and its first text: after the role header.

        The header is the generation prompt, which the template adds to the messages ``before``. Thinking
        blocks and channel names that follow it are generated by the target, so they are trained.
        """
        header = self._header()
        try:
            if before:
                prompt = self.render(before, True, tools)
                if floor <= len(prompt) <= content_start and text.startswith(prompt):
                    # A template without a generation prompt may write a space before the answer.
                    written = header or text[len(prompt) : content_start].strip()
                    return len(prompt) if written else content_start
                header = prompt[common_prefix(self.render(before, tools=tools), prompt) :]
        except BadRecord:  # a template may refuse the messages before
            pass
        found = text.rfind(header, floor, content_start) if header else -1
        return found + len(header) if found >= 0 else content_start

    def _header(self) -> str:
        """Return the generation prompt after a question; an empty string if the template has none."""
        template = str(self.tokenizer.chat_template)
        if template not in self._headers:
            try:
                prompt = self.render(QUESTION, True)
                self._headers[template] = prompt[common_prefix(self.render(QUESTION), prompt) :]
            except BadRecord:  # it refuses a lone question
                self._headers[template] = ""
        return self._headers[template]

    def _through_end_of_turn(self, text: str, content_end: int, more: bool) -> int:
        """Return the end of the end-of-turn token: the first special token after the content.

        Between the two there may be white space and, with ``more``, the words that close tool calls or
        thinking. After anything else, the template has no such token, and the content's end is returned. If
        several special tokens follow each other (some close tool calls), the turn ends with the EOS among
        them.
        """
        found = self._special_token.search(text, content_end)
        if found is None or (text[content_end : found.start()].strip() and not more):
            return content_end
        end = last = found.end()
        while found and found.group() != self.tokenizer.eos_token:
            found = self._special_token.match(text, last)
            last = found.end() if found else last
        return last if found else end

    def _ignored(
        self, text: str, conversation: Conversation, leaves: list[Leaf], other: str
    ) -> Iterator[str]:
        """Yield the fields that the template ignores: without them, it gives the same ``text``.

        Only the texts whose mark is not in ``other`` are tested, and every other field that the record has.
        A field that was ignored before, and that the template's source does not name, is not tested again.
        """
        messages, tools = conversation.messages, conversation.tools
        if tools and self._gives(text, messages, None):
            yield "tools"
        absent = [leaf for leaf in leaves if leaf.mark not in other]
        for kind in dict.fromkeys(leaf.kind for leaf in absent):
            fields = {(leaf.message, leaf.field) for leaf in absent if leaf.kind == kind}
            if self._gives(text, _without(messages, fields), tools):
                yield kind if len(fields) == sum(leaf.kind == kind for leaf in leaves) else f"some {kind}"
        for name in dict.fromkeys(name for message in messages for name in message if name not in TESTED):
            fields = {(i, name) for i in range(len(messages))}
            if name in self._unread or self._gives(text, _without(messages, fields), tools):
                self._unread |= {name} - self._words()
                yield f"{name} of messages"
        # Templates cut thinking out of a content.
        answers = (leaf for leaf in leaves if leaf.role == "assistant" and leaf.field == "content")
        if any(leaf.value.strip() not in text for leaf in answers if leaf.mark in other):
            yield "parts of the content of assistant messages"

    def _gives(self, text: str, messages: list[Message], tools: Tools) -> bool:
        try:
            return self.render(messages, tools=tools) == text
        except BadRecord:  # the template needs what was left out
            return False

    def _words(self) -> set[str]:
        return set(re.findall(r"\w+", str(self.tokenizer.chat_template)))


def _mask(
    messages: Sequence[Message], marker: Marker, only: int | None = None
) -> tuple[list[Message], list[Leaf]]:
    """Replace each text of the messages, or of one message, by the mark of its index in the leaves."""
    masked: list[Message] = []
    leaves: list[Leaf] = []

    def mark(field: str, value: str | None) -> str:
        leaves.append(Leaf(marker.mark(len(leaves)), len(masked), message["role"], field, value))
        return leaves[-1].mark

    for i, message in enumerate(messages):
        changed = dict(message)
        if only in (None, i):
            for name in TEXTS:
                if isinstance(message.get(name), str) and message[name]:
                    changed[name] = mark(name, message[name])
            if "tool_calls" in message:
                calls = message["tool_calls"]
                changed["tool_calls"] = [_mask_call(call, mark("tool_calls", None)) for call in calls]
        masked.append(changed)
    return masked, leaves


def _mask_call(call: Any, mark: str) -> Any:
    """Replace a call's arguments. Its name stays: templates repeat it where they write the call's result."""
    if not isinstance(call, dict):
        return mark
    function = call["function"]
    if "arguments" not in function:
        return {**call, "function": {**function, "name": mark}}
    is_object = isinstance(function["arguments"], dict)
    return {**call, "function": {**function, "arguments": {"x": mark} if is_object else mark}}


def _without(messages: Sequence[Message], fields: set[tuple[int, str]]) -> list[Message]:
    """Return the messages without these fields (message, name). A content becomes empty instead."""
    kept = [{name: v for name, v in m.items() if (i, name) not in fields} for i, m in enumerate(messages)]
    return [{"content": "", **message} for message in kept]


def _length_at(text: str, position: int, value: str, after: str) -> int | None:
    """Return the length of ``value`` at ``position`` of the text, as it is or trimmed, before ``after``."""
    for variant in (value, value.strip(), value.strip("\n"), value.lstrip("\n")):
        end = position + len(variant)
        # Without words after it, the value must reach the end of the text.
        if text.startswith(variant, position) and text.startswith(after, end) and (after or end == len(text)):
            return len(variant)
    return None


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
