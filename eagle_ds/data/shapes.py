"""Turn a record of any common shape into messages with a role and a content, and the tools they may call.

Shapes: chats (``messages`` or ``conversations``, OpenAI's keys or ShareGPT's), Alpaca rows (``instruction``,
``input``, ``output``), ``prompt`` and ``completion``, and plain ``text``. The messages then look as a serving
engine hands them to the chat template: text contents, tool calls with their arguments as an object, tools as
``{"type": "function", "function": ...}``. Fields that this module does not know are kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]

CHATS = ("messages", "conversations", "conversation")
# Every field that holds a conversation or belongs to it.
FIELDS = (
    "id", *CHATS, "system", "tools", "functions", "instruction", "input", "output", "response", "history",
    "prompt", "completion", "text")
ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "function_call": "assistant", "tool_call": "assistant",
    "observation": "tool", "function": "tool", "function_response": "tool", "tool_response": "tool"}
CALLS = ("function_call", "tool_call")  # ShareGPT: the value is the call itself, as JSON
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
TEXT_PARTS = ("text", "input_text", "output_text")


class BadRecord(ValueError):
    """A record that cannot be used. ``reason`` names the kind of problem; summaries count by it."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    @classmethod
    def at(cls, field: str, found: str, expected: str, reason: str = "wrong type") -> BadRecord:
        """Say what was expected in a field, and what it holds."""
        return cls(reason, f"expected {expected} as {field}, found {found}")


@dataclass
class Conversation:
    """The messages of a record and its tools; or ``text``, if the record is plain text."""

    messages: list[Message] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    text: str | None = None


def conversation_of(record: Mapping[str, Any]) -> Conversation:
    """Return the record's conversation. Raises BadRecord if its shape is unknown or a field is malformed."""
    record = {name: value for name, value in record.items() if value is not None}
    chat = next((name for name in CHATS if name in record), None)
    if chat:
        messages = _messages(_parsed(record[chat]), chat)
    elif "instruction" in record:
        messages = _alpaca(record)
    elif "prompt" in record:
        answer = "completion" if "completion" in record else "response"
        messages = _side(record, "prompt", "user") + _side(record, answer, "assistant")
    elif "text" in record:
        return Conversation(text=_text(record["text"], "text"))
    else:
        expected = '"messages", "conversations", "instruction", "prompt" or "text"'
        raise BadRecord.at("a key", f"the keys {sorted(map(str, record))}", expected, "unknown shape")
    if record.get("system") and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": _text(record["system"], "system")})
    return Conversation(messages, _tools(record))


def messages_of(record: Mapping[str, Any]) -> list[Message]:
    """Return a record's messages. Raises BadRecord like `conversation_of`, and for plain text."""
    conversation = conversation_of(record)
    if conversation.text is not None:
        raise BadRecord.at("record", "plain text", '"messages" or "conversations"', "unknown shape")
    return conversation.messages


def content_hash(record: Mapping[str, Any]) -> str:
    """Hash the record, independent of the order of its keys. Never holds it as one text: it may be long.

    Raises BadRecord if a text cannot be encoded, or if the record is nested too deeply.
    """
    digest = hashlib.sha256()
    try:
        for part in json.JSONEncoder(sort_keys=True, ensure_ascii=False).iterencode(record):
            digest.update(part.encode())
    except (UnicodeEncodeError, RecursionError) as error:
        raise BadRecord("not Unicode", f"expected Unicode text: {error}") from error
    return digest.hexdigest()


def record_id(record: Mapping[str, Any]) -> str:
    """Return the record's id. Without one, hash the content, so the id does not depend on the line number."""
    return str(record["id"]) if record.get("id") is not None else content_hash(record)[:20]


def _alpaca(record: Mapping[str, Any]) -> list[Message]:
    """Return instruction, input and output as one turn, after the earlier turns of ``history``."""
    messages = []
    for i, pair in enumerate(_list(record.get("history", []), "history")):
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRecord.at(f"history[{i}]", _kind(pair), "[question, answer]")
        for side, role in zip(pair, ("user", "assistant"), strict=True):
            messages.append({"role": role, "content": _text(side, f"history[{i}]")})
    given = [_text(record[name], name) for name in ("instruction", "input") if name in record]
    messages.append({"role": "user", "content": "\n\n".join(filter(None, given))})
    answer = "output" if "output" in record else "response"
    return messages + _side(record, answer, "assistant")


def _side(record: Mapping[str, Any], name: str, role: str) -> list[Message]:
    """Return a prompt or an answer that is a string, or a list of messages; nothing if it is absent."""
    if name not in record:
        return []
    if isinstance(record[name], str):
        return [{"role": role, "content": record[name]}]
    return _messages(record[name], name)


def _messages(given: Any, name: str) -> list[Message]:
    if not isinstance(given, list) or not given:
        raise BadRecord.at(name, _kind(given), 'a list of {"role", "content"}', "no messages")
    return [_message(message, f"{name}[{i}]") for i, message in enumerate(given)]


def _message(given: Any, where: str) -> Message:
    if not isinstance(given, dict):
        raise BadRecord.at(where, _kind(given), 'an object with "role" and "content"')
    message = {name: value for name, value in given.items() if value is not None}
    # ShareGPT's keys, unless the message has those of OpenAI.
    for theirs, ours in (("from", "role"), ("value", "content")):
        if ours not in given and theirs in message:
            message[ours] = message.pop(theirs)
    speaker = message.get("role")
    if speaker is None or not {"content", "value", "tool_calls", "function_call", *THOUGHTS} & given.keys():
        found = f"a message has the keys {sorted(map(str, given))}"
        raise BadRecord("no role or content", f'{found}; expected "role" and "content" in {where}')
    if not isinstance(speaker, str) or not speaker:
        raise BadRecord.at(f"{where}.role", _kind(speaker), "a role such as user or assistant")
    message["role"] = ROLES.get(speaker.lower(), speaker)
    message["content"] = _text(message.get("content", ""), f"{where}.content")
    calls = message.pop("tool_calls", None) or []
    if "function_call" in message:  # OpenAI's earlier form
        calls = [message.pop("function_call")]
    if speaker.lower() in CALLS:
        calls, message["content"] = _calls_in(message["content"], f"{where}.content"), ""
    if calls:
        message["tool_calls"] = [_call(call) for call in _list(calls, f"{where}.tool_calls")]
    return message


def _text(content: Any, where: str) -> str:
    """Return a text; parts of text are joined by line breaks, as vLLM does."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRecord.at(where, _kind(content), "a string, or a list of text parts", "not text")
    texts = []
    for i, part in enumerate(content):
        if isinstance(part, dict) and part.get("type", "text") in TEXT_PARTS:
            part = part.get("text")
        if not isinstance(part, str):
            kind = part.get("type") if isinstance(part, dict) else None
            reason = "not text" if kind is None else f"{kind} part"
            other = f"a part of type {kind} (images, audio and video are not captured)"
            raise BadRecord.at(f"{where}[{i}]", _kind(part) if kind is None else other, "a text part", reason)
        texts.append(part)
    return "\n".join(texts)


def _calls_in(text: str, where: str) -> list[Any]:
    """Return the tool calls that ShareGPT writes as JSON into the text of a message."""
    calls = _parsed(text)
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and "name" in call for call in calls):
        expected = 'JSON such as {"name": ..., "arguments": {...}}'
        raise BadRecord.at(where, repr(text[:40]), expected, "tool call")
    return calls


def _call(call: Any) -> Any:
    """Return a tool call in OpenAI's form, with the arguments as an object where they are JSON of one."""
    if not isinstance(call, dict):
        return call
    outer = {name: value for name, value in call.items() if value is not None}
    function = dict(outer.pop("function", None) or {"name": outer.pop("name", "")})
    for name in ("arguments", "parameters"):
        if name in outer:
            function["arguments"] = outer.pop(name)
    arguments = _parsed(function.get("arguments"))
    if isinstance(arguments, dict):
        function["arguments"] = arguments
    return {"type": "function", **outer, "function": function}


def _tools(record: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    name = "tools" if "tools" in record else "functions"
    tools = _list(_parsed(record.get(name, [])) or [], name)
    for i, tool in enumerate(tools):
        if not isinstance(tool, dict) or not ("name" in tool or isinstance(tool.get("function"), dict)):
            raise BadRecord.at(f"{name}[{i}]", _kind(tool), 'an object with "name" or "function"', "tools")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools] or None


def _parsed(value: Any) -> Any:
    """Return what a string of JSON holds, as tables store lists and objects; any other value as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _list(value: Any, where: str) -> Sequence[Any]:
    if not isinstance(value, list):
        raise BadRecord.at(where, _kind(value), "a list")
    return value


def _kind(value: Any) -> str:
    """Describe a value in a few words."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return repr(value[:40])
    names = {list: "list", dict: "object", bool: "boolean", int: "number", float: "number"}
    name = names.get(type(value), type(value).__name__)
    if isinstance(value, (list, dict)) and not value:
        return f"an empty {name}"
    return f"an {name}" if name == "object" else f"a {name}"
