# SPDX-License-Identifier: Apache-2.0
"""The parts of a message, and where a rendering shows them: what a chat template leaves out must not go unseen."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from specdist.prompts.thoughts import divide

Kind = Literal["thought", "content", "tool call", "arguments"]
Message = dict[str, Any]
ARGUMENTS = "arguments of tool calls"
_SPACE = re.compile(r"\s+")


@dataclass(frozen=True)
class Part:
    """Something that a message says."""

    kind: Kind
    value: Any


def parts(thought: str, content: str, calls: Sequence[Any]) -> list[Part]:
    """What an answer says, in its order; the names, the keys and the values of its tool calls one by one."""
    found = [Part("thought", thought), Part("content", content)]
    found = [part for part in found if part.value.strip()]
    for call in calls:
        function = call["function"]
        found.append(Part("tool call", function["name"]))
        found += [Part("arguments", leaf) for leaf in _leaves(function.get("arguments"))]
    return found


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif value is not None and value != "":
        yield value


def find(value: Any, text: str, start: int = 0) -> tuple[int, int] | None:
    """Where `text` shows a value from `start` on: as it is, or as JSON or Python write it. Where nothing but the space
    in it differs, the whole of `text`; None where it does not show it."""
    for form in _forms(value):
        at = text.find(form, start)
        if at >= 0:
            return at, at + len(form)
    bare = _SPACE.sub("", str(value))
    return (start, len(text)) if bare and bare in _SPACE.sub("", text[start:]) else None


def _forms(value: Any) -> Iterator[str]:
    if not isinstance(value, str):
        yield json.dumps(value)
        yield str(value)
        return
    text = value.strip()
    yield text
    yield json.dumps(text, ensure_ascii=False)[1:-1]
    yield json.dumps(text)[1:-1]
    yield repr(text)[1:-1]


@dataclass(frozen=True)
class Shown:
    """What a text shows of some parts: `spans`, begin and end of thought and content, and the parts that it does not
    show."""

    spans: tuple[tuple[Kind, int, int], ...]
    missing: tuple[Part, ...]


def shown(text: str, wanted: Sequence[Part]) -> Shown:
    """Look for `wanted` in `text`: content behind the thought, calls one behind the other, arguments anywhere."""
    spans, missing, call = list[tuple[Kind, int, int]](), list[Part](), 0
    for part in wanted:
        start = spans[-1][2] if spans and part.kind == "content" else call if part.kind == "tool call" else 0
        where = find(part.value, text, start)
        if where is None:
            missing.append(part)
        elif part.kind == "tool call":
            call = where[1]
        elif part.kind != "arguments":
            spans.append((part.kind, *where))
    return Shown(tuple(spans), tuple(missing))


def left_out(prompt: str, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> frozenset[str]:
    """The kinds of things in a conversation so far that the prompt for its next answer does not show."""
    kinds = set()
    for tool in tools:
        function = tool.get("function", tool)
        if isinstance(function, Mapping) and str(function.get("name", "")) not in prompt:
            kinds.add("tools")
    for message in messages:
        role = message["role"]
        calls = message.get("tool_calls") or ()
        divided = divide(message["content"]) if role == "assistant" else None
        thought = divided.thought if divided else message.get("reasoning_content", "")
        for part in parts(thought, divided.content if divided else message["content"], calls):
            if find(part.value, prompt) is None:
                kinds.add(_CALLED.get(part.kind) or f"{_ROLES.get(role, role)} turns")
    return frozenset(kinds)


_CALLED = {"thought": "reasoning of earlier turns", "tool call": "earlier tool calls", "arguments": ARGUMENTS}
_ROLES = {"assistant": "earlier assistant", "ipython": "tool"}
