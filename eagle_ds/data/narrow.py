"""Keep a long conversation small while its chat template renders it.

Python stores 4 bytes for every character of a string that holds a single emoji, and 1 or 2 bytes without it.
A template that puts texts together with ``+`` holds three copies of them: 12 bytes for each character. So
characters beyond U+FFFF are replaced, one for one, by private-use characters that the conversation does not
contain. They are put back into the rendered text. Positions in the text stay the same.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from eagle_ds.data.shapes import Conversation

LONG = 1 << 20  # characters; shorter texts are left as they are
WIDE = re.compile("[\U00010000-\U0010ffff]+")
PRIVATE_USE = re.compile("[\ue000-\uf8ff]")
FIRST_STAND_IN, LAST_STAND_IN = 0xE100, 0xF8FF  # the characters before them are the marks of data/template.py


@dataclass(frozen=True)
class Narrowing:
    """Which private-use character stands for which character beyond U+FFFF. Empty: nothing is replaced."""

    stand_ins: dict[int, int]

    @classmethod
    def for_conversation(cls, conversation: Conversation, template: str) -> Narrowing:
        """Choose stand-ins for a conversation with a long text of 4 bytes a character; none for any other.

        Also none if the template could tell them from other characters: it writes private-use characters
        itself, or ASCII escapes.
        """
        contents = [text for message in conversation.messages for text in _strings(list(message.values()))]
        if not any(len(text) > LONG and _is_wide(text) for text in contents):
            return cls({})
        if PRIVATE_USE.search(template) or "ensure_ascii" in template:
            return cls({})
        wide: set[str] = set()
        used: set[str] = set()
        for text in _strings([conversation.messages, conversation.tools]):
            used.update(found.group() for found in PRIVATE_USE.finditer(text))
            for run in WIDE.finditer(text):
                wide.update(run.group())
        free = [code for code in range(FIRST_STAND_IN, LAST_STAND_IN + 1) if chr(code) not in used]
        if len(wide) > len(free):
            return cls({})
        return cls(dict(zip(map(ord, sorted(wide)), free, strict=False)))

    def narrow(self, conversation: Conversation) -> Conversation:
        """Return the conversation with stand-ins in the texts of its messages, if there are any."""
        if not self.stand_ins:
            return conversation
        messages = [
            {name: self._narrow(value) for name, value in message.items()}
            for message in conversation.messages
        ]
        return replace(conversation, messages=messages)

    def restore(self, text: str) -> str:
        """Put the replaced characters back."""
        if not self.stand_ins:
            return text
        originals = {chr(stand_in): chr(original) for original, stand_in in self.stand_ins.items()}
        return PRIVATE_USE.sub(lambda found: originals.get(found.group(), found.group()), text)

    def _narrow(self, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        # str.translate looks up every character, so it gets only those that are replaced.
        return WIDE.sub(lambda found: found.group().translate(self.stand_ins), value)


def _is_wide(text: str) -> bool:
    return sys.getsizeof(text) > 4 * len(text)


def _strings(value: Any) -> Iterator[str]:
    """Yield every string in lists and objects, and every name of a field."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for pair in value.items() for one in pair for text in _strings(one))
    elif isinstance(value, list):
        yield from (text for one in value for text in _strings(one))
