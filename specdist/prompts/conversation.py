# SPDX-License-Identifier: Apache-2.0
"""From a record of a file to a conversation in the one form that chat templates know.

Three formats: `messages` (a list of role and content), ShareGPT's `conversations` (a list of from and value; role and
content are taken too), and plain `text`. A record may bring `tools` (JSON schemas), `system` (a first turn) and
`category` (a word by which evaluations are told apart).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from specdist.prompts.report import UnusableError

Message = dict[str, Any]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "ipython": "ipython",
}
"""Roles as data sets write them, and as chat templates read them (`developer` is OpenAI's newer name for `system`)."""

COLUMNS = ("messages", "conversations", "text", "tools", "system", "category")
KEPT_KEYS = ("name", "tool_calls", "tool_call_id")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
WRITTEN_KEYS = ("finish_reason", "end", "token_ids")
"""Beside an answer, how a target wrote it. `finish_reason`: `length` for one that a limit cut off, whose end is not
taught. `end`: what it ended with, an end-of-turn token, or nothing where it was cut; with this key `content` is the
answer to the letter, thoughts and special tokens included. `token_ids`: those of content and end, where tokenising the
two gives others."""
UNTAUGHT = "weight"
"""Beside an answer, 0 where it is context alone: neither taught nor evaluated (as in OpenAI's fine-tuning files)."""


@dataclass(frozen=True)
class Sample:
    """One usable record: a conversation that ends with an assistant turn, or a plain text."""

    file: str
    line: int
    messages: tuple[Message, ...] = ()
    text: str | None = None
    tools: tuple[dict[str, Any], ...] = ()
    category: str | None = None


ANSWERED = "prompts.answers=target has the target write answers"


def to_sample(record: object, file: str, line: int) -> Sample:
    """Read one record, already decoded.

    Raises:
        UnusableError: with the reason, where the record is no conversation that could be learnt from.
    """
    if not isinstance(record, Mapping):
        raise UnusableError("unknown format", f"a record is an object with a key, not {_kind(record)}")
    category = str(record["category"]).strip() if isinstance(record.get("category"), str | int) else ""
    for key in ("messages", "conversations"):
        if record.get(key) is not None:
            messages = [to_message(turn, number) for number, turn in enumerate(turns_of(record[key], key), start=1)]
            messages = [*system_turn(record, messages), *messages]
            tools = tools_of(record)
            return Sample(file, line, messages=_checked(messages), tools=tools, category=category or None)
    if record.get("text") is not None:
        text = _text(record["text"], "text")
        if not text.strip():
            raise UnusableError("nothing to supervise", "`text` is empty")
        return Sample(file, line, text=text, category=category or None)
    keys = ", ".join(map(str, record)) or "none"
    hint = "" if record.keys().isdisjoint(("prompt", "turns")) else f"; of prompts alone, {ANSWERED}"
    raise UnusableError("unknown format", f"none of `messages`, `conversations`, `text` among the keys: {keys}{hint}")


def turns_of(value: object, key: str) -> list[Any]:
    """The turns that a record has under `key`, as they are. Raises UnusableError where they are no list."""
    if isinstance(value, str):  # some tables keep the conversation as JSON text
        value = _decode(value, key)
    if isinstance(value, Mapping) and value and all(isinstance(column, list) for column in value.values()):
        value = [dict(zip(value, row, strict=False)) for row in zip(*value.values(), strict=False)]
    if not isinstance(value, list):
        raise UnusableError("unknown format", f"`{key}` is {_kind(value)}, not a list of turns")
    return value


def system_turn(record: Mapping[str, Any], messages: Sequence[Message]) -> list[Message]:
    """The first turn that `system` of a record stands for, where its conversation has none."""
    if not record.get("system") or (messages and messages[0]["role"] == "system"):
        return []
    return [{"role": "system", "content": _text(record["system"], "system")}]


def to_message(turn: object, number: int) -> Message:
    """A turn, the `number`-th, in the form that chat templates know. Raises UnusableError."""
    if not isinstance(turn, Mapping):
        raise UnusableError("unknown format", f"turn {number} is {_kind(turn)}, not an object with role and content")
    name = turn.get("role", turn.get("from"))
    role = ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        raise UnusableError("unknown role", f"turn {number} has role {name!r}; known: {', '.join(ROLES)}")
    content = turn.get("content", turn.get("value"))
    if content is None and role == "user":
        raise UnusableError("not text", f"turn {number} is a {name}'s and has no content")
    message: Message = {"role": role, "content": _text(content, f"turn {number}")}
    message.update({key: turn[key] for key in KEPT_KEYS if turn.get(key) is not None})
    if isinstance(turn.get("finish_reason"), str):
        kinds = zip(WRITTEN_KEYS, (str, str, list), strict=True)
        message.update({key: turn[key] for key, kind in kinds if isinstance(turn.get(key), kind)})
    if turn.get(UNTAUGHT) == 0:
        message[UNTAUGHT] = 0
    reasoning = next((turn[key] for key in REASONING_KEYS if turn.get(key)), None)
    if reasoning is not None:
        message["reasoning_content"] = _text(reasoning, f"the reasoning of turn {number}")
    if "tool_calls" in message:
        message["tool_calls"] = [_tool_call(call, number) for call in turns_of(message["tool_calls"], "tool_calls")]
    return message


def _text(value: object, where: str) -> str:
    """Text, or a list of text parts (joined by newlines, as the servers do); None is the empty text."""
    if value is None:
        return ""
    if isinstance(value, list):
        value = "\n".join(_part(part, where) for part in value)
    if not isinstance(value, str):
        raise UnusableError("not text", f"{where} is {_kind(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UnusableError("not text", f"{where} holds a lone surrogate at character {error.start}") from error
    return value


def _part(part: object, where: str) -> str:
    if isinstance(part, Mapping):
        if isinstance(part.get("text"), str) and part.get("type") in (None, "text", "input_text", "output_text"):
            return part["text"]
        raise UnusableError("not text", f"{where} has a part of type {part.get('type')!r}")
    if isinstance(part, str):
        return part
    raise UnusableError("not text", f"{where} has a part that is {_kind(part)}")


def _tool_call(call: object, number: int) -> object:
    """A tool call whose arguments are decoded, as the servers do before the template writes them as JSON."""
    if not isinstance(call, Mapping):
        raise UnusableError("unknown format", f"a tool call of turn {number} is {_kind(call)}, not an object")
    function = call.get("function")
    if isinstance(function, Mapping):
        return {**call, "function": _with_arguments(function, number)}
    return _with_arguments(call, number)


def _with_arguments(function: Mapping[str, Any], number: int) -> dict[str, Any]:
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return dict(function)
    return {**function, "arguments": _decode(arguments, f"tool call arguments of turn {number}") if arguments else {}}


def tools_of(record: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """The JSON schemas under `tools` of a record. Raises UnusableError."""
    value = record.get("tools")
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        value = _decode(value, "tools")
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise UnusableError("unknown format", f"`tools` is {_kind(value)}, not a list of JSON schemas")
    return tuple(dict(tool) for tool in value)


def _checked(messages: list[Message]) -> tuple[Message, ...]:
    """The conversation up to its last assistant turn, if its turns come in an order that a server could have seen."""
    before: str | None = None
    asked = False
    last = 0
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if role == "assistant":
            if not asked:
                raise UnusableError("wrong role order", f"turn {number} is the assistant's, before any user turn")
            if before == "assistant":
                raise UnusableError("wrong role order", f"turns {number - 1} and {number} are both the assistant's")
            if not message["content"].strip() and not message.get("tool_calls"):
                raise UnusableError("empty answer", f"turn {number} is the assistant's and says nothing")
            last = number
        elif role in ("tool", "ipython") and before not in ("assistant", "tool", "ipython"):
            raise UnusableError("wrong role order", f"turn {number} is a tool's, after {before or 'nothing'}")
        asked = asked or role == "user"
        before = role
    if not last:
        raise UnusableError("nothing to supervise", f"no assistant turn among {len(messages)} turns; {ANSWERED}")
    return tuple(messages[:last])


def _decode(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnusableError("malformed record", f"`{where}` is no JSON: {error}") from error


def _kind(value: object) -> str:
    return "null" if value is None else f"a {type(value).__name__}"
