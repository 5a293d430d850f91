# SPDX-License-Identifier: Apache-2.0
"""Thoughts in text: how models open and close them, and what a prompt or an answer shows of one."""

import re
from dataclasses import dataclass
from typing import Literal

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
