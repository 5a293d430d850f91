# SPDX-License-Identifier: Apache-2.0
"""The parts of a message, thoughts too, where a rendering shows them: nothing left out goes unseen."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

MARKS = {
    r"<(?:\w+:)?think(?::\w+)?>": r"</(?:\w+:)?think(?::\w+)?>",  # most; Seed's, MiniMax's and Hunyuan's with a name
    r"<\|channel>thought": r"<channel\|>",  # Gemma 4
    r"\[THINK\]": r"\[/THINK\]",  # Mistral
    r"<\|START_THINKING\|>": r"<\|END_THINKING\|>",  # Cohere
    r"<\|inner_prefix\|>": r"<\|inner_suffix\|>",  # Apertus
    r"Here are my reasoning steps:": r"\[BEGIN FINAL RESPONSE\]",  # Apriel
}
"""How models open a thought, and how they close it, as patterns."""
_OPEN, _CLOSE = "|".join(MARKS), "|".join(MARKS.values())
_IN_MARKS = ("think", "channel", "THINK", "inner_", "reasoning steps:")
"""Each mark has one of these in it."""
_AT_THE_END = re.compile(rf"(?:(?P<open>{_OPEN})|(?P<close>{_CLOSE}))(?P<space>\s*)\Z")
_EMPTY = re.compile(rf"(?P<open>{_OPEN})?(?P<before>\s*)(?P<close>{_CLOSE})(?P<after>\s*)")
_ONLY_MARKS = re.compile(rf"\s*(?:(?:{_OPEN})\s*)?(?:(?:{_CLOSE})\s*)?")
_MARKS_AT_THE_END = re.compile(rf"(?:(?:{_OPEN})\s*)?(?:(?:{_CLOSE})\s*)?\Z")
_WRITTEN = re.compile(rf"\s*(?P<open>{_OPEN})?\s*(?P<thought>.*?)\s*(?P<close>{_CLOSE})\s*", re.DOTALL)
_UNCLOSED = re.compile(rf"\s*(?:{_OPEN})\s*")


@dataclass(frozen=True)
class Divided:
    """Content that begins with a thought. `written` is the thought as it stands there, its marks and the space behind
    them included; `closed` is false where the answer ends within it."""

    thought: str
    content: str
    written: str
    closed: bool


def divide(content: str) -> Divided | None:
    """Take the thought off the front of `content`; None where there is none."""
    if not any(part in content for part in _IN_MARKS):  # most contents, and the pattern would go through all of it
        return None
    if match := _WRITTEN.match(content):
        return Divided(match["thought"], content[match.end() :], match.group(), True)
    if match := _UNCLOSED.match(content):
        return Divided(content[match.end() :].strip(), "", content, False)
    return None


def left_by(prompt: str) -> Literal["opened", "closed"] | None:
    """Whether a prompt ends within a thought, or behind one that it has closed."""
    match = _AT_THE_END.search(prompt[-80:])
    if match is None:
        return None
    return "opened" if match["open"] else "closed"


def only_marks(text: str) -> bool:
    """Whether `text` is nothing, or marks of a thought without one."""
    return _ONLY_MARKS.fullmatch(text) is not None


def before_marks(text: str) -> int:
    """Where the marks of a thought begin that end `text`; its length where there are none."""
    match = _MARKS_AT_THE_END.search(text, max(len(text) - 80, 0))
    return match.start() if match else len(text)


def without_opening(text: str) -> str:
    """`text` without the mark, and the space about it, that opens a thought in it."""
    match = _UNCLOSED.match(text)
    return text[match.end() :] if match else text


def with_thought(prompt: str, answer: str, thought: str, written: str | None) -> str | None:
    """`answer`, from which a template has left out the thought, with it: behind the mark that ends the prompt, or in
    the place of an empty one. None where neither shows how the target writes it. `written`: the thought with its marks,
    where the data has it to the letter."""
    empty = _EMPTY.match(answer)
    opened = _AT_THE_END.search(prompt[-80:])
    rest = answer[empty.end() :] if empty else answer
    if opened and opened["open"]:
        if written is not None:
            return without_opening(written) + rest.lstrip()  # the space between the two is the data's
        lines = "\n" in opened["space"]  # DeepSeek-R1 and its like write thoughts on lines of their own
        before, after = _around(empty) if empty else ("\n", "\n\n") if lines else ("", "")
        return thought + before + _closing(opened["open"]) + after + rest
    if empty and empty["open"]:
        before, after = _around(empty)
        return (
            written + rest.lstrip()
            if written
            else empty["open"] + before + thought + before + empty["close"] + after + rest
        )
    return None


def _closing(opening: str) -> str:
    """The mark that closes what `opening` has opened."""
    if opening.endswith("think>") or opening.startswith("<think"):
        return f"</{opening[1:]}"
    pattern = next(close for open_, close in MARKS.items() if re.fullmatch(open_, opening))
    return pattern.replace("\\", "")


def _around(empty: re.Match[str]) -> tuple[str, str]:
    """The space between a thought and its marks, and behind it, by an empty one: two lines of it make one each."""
    return empty["before"][: (len(empty["before"]) + 1) // 2], empty["after"]


Kind = Literal["thought", "content", "tool call", "arguments"]
Message = dict[str, Any]
ARGUMENTS = "arguments of tool calls"
_SPACE = re.compile(r"\s+")


@dataclass(frozen=True)
class Part:
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
    """What a text shows of some parts: `spans`, begin and end of thought and content; and those it does not show."""

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
