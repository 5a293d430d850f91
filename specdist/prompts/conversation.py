# SPDX-License-Identifier: Apache-2.0
"""From a record of a file to a conversation in the one form that chat templates know.

The formats: `messages` (a list of role and content), ShareGPT's `conversations` (a list of from and value; role and
content are taken too), a prompt and its answer (`PAIRS`; Alpaca's with `input` and `history`), and plain `text`. A
record may bring `tools` (JSON schemas), `system` (a first turn), `chat_template_kwargs` (variables of the chat
template) and `category` (a word by which evaluations are told apart). docs/data.md shows them all.

Whether a conversation is held out follows from a hash of its first user message and nothing else, so that all its
sequences, duplicates and continuations lie on one side, whatever the answers, settings and the order of the files.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from specdist.prompts.config import RESERVED
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
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "ipython": "ipython",
}
"""Roles as data sets write them, and as chat templates read them (`developer` is OpenAI's newer name for `system`)."""

CALLS = ("function_call", "tool_call")
"""Roles whose turns are a tool call as JSON, of an assistant (LLaMA-Factory)."""
PAIRS = (("prompt", "response"), ("prompt", "completion"), ("instruction", "output"), ("instruction", "response"))
FORMATS = (("messages",), ("conversations",), *PAIRS, ("text",))
"""The keys of a record by which its format is told."""
FORMATS_IN_WORDS = ", ".join(" with ".join(f"`{key}`" for key in keys) for keys in FORMATS)
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
BESIDE = ("input", "history", "tools", "system", "chat_template_kwargs", "category")
COLUMNS = (*dict.fromkeys(key for keys in FORMATS for key in keys), *BESIDE, *MEDIA)
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
    variables: dict[str, Any] = field(default_factory=dict)
    """Of the chat template, for this sample."""


ANSWERED = "prompts.answers=target has the target write answers"


def to_sample(record: object, file: str, line: int) -> Sample:
    """Read one record, already decoded. Raises UnusableError: it is no conversation that teaches."""
    if not isinstance(record, Mapping):
        raise UnusableError("unknown format", f"a record is an object with a key, not {_kind(record)}")
    category = str(record["category"]).strip() if isinstance(record.get("category"), str | int) else ""
    for key in MEDIA:
        if record.get(key) not in (None, [], "", False):
            raise UnusableError("not text", f"the record has `{key}`, and drafts are trained on text alone")
    if (found := raw_turns(record)) is not None:
        messages = [to_message(turn, number) for number, turn in enumerate(found[1], start=1)]
        messages = [*system_turn(record, messages), *messages]
        tools, variables = tools_of(record), variables_of(record)
        return Sample(file, line, _checked(messages), None, tools, category or None, variables)
    if record.get("text") is not None:
        text = _text(record["text"], "text")
        if not text.strip():
            raise UnusableError("empty loss mask", "`text` is empty")
        return Sample(file, line, text=text, category=category or None)
    keys = ", ".join(map(str, record)) or "none"
    for key in ("prompt", "turns"):
        if key in record:
            raise UnusableError("no answer", f"`{key}` alone; {ANSWERED}")
    raise UnusableError("unknown format", f"none of {FORMATS_IN_WORDS} among the keys: {keys}")


def raw_turns(record: Mapping[str, Any]) -> tuple[str, list[Any]] | None:
    """The key under which conversations like this record's are written, and its turns as they are; None where it has
    none. Raises UnusableError where they are no list."""
    for key in ("messages", "conversations"):
        if record.get(key) is not None:
            return key, turns_of(record[key], key)
    for asked, answer in PAIRS:
        if record.get(asked) is not None and record.get(answer) is not None:
            turns = [*_turns_of_one(record[asked], "user"), *_turns_of_one(record[answer], "assistant")]
            if record.get("input") and isinstance(record[asked], str):
                turns[0]["content"] += f"\n\n{_text(record['input'], 'input')}"
            pairs = turns_of(record.get("history") or [], "history")
            before = [_turns_of_one(text, role) for pair in pairs for role, text in _roles(pair)]
            return "messages", [turn for earlier in before for turn in earlier] + turns
    return None


def _turns_of_one(value: object, role: str) -> list[Any]:
    """What one side of a pair says: a text, or turns."""
    return [{"role": role, "content": value}] if isinstance(value, str) else turns_of(value, role)


def _roles(pair: object) -> Iterable[tuple[str, object]]:
    if not isinstance(pair, list) or len(pair) != 2:
        raise UnusableError("unknown format", f"`history` has {pair!r:.60}, not a prompt and its answer")
    return zip(("user", "assistant"), pair, strict=True)


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
    content, calls = turn.get("content", turn.get("value")), turn.get("tool_calls")
    if name.strip().lower() in CALLS:
        content, calls = None, _decode(_text(content, f"turn {number}"), f"turn {number}")
    elif isinstance(turn.get("function_call"), Mapping):
        calls = [turn["function_call"]]
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
    if reasoning is None and isinstance(details := turn.get("reasoning_details"), list):  # OpenRouter's
        reasoning = "".join(str(detail.get("text") or "") for detail in details if isinstance(detail, Mapping))
    if reasoning:
        message["reasoning_content"] = _text(reasoning, f"the reasoning of turn {number}")
    if calls:
        calls = [calls] if isinstance(calls, Mapping) and "name" in calls else turns_of(calls, "tool_calls")
        message["tool_calls"] = [_tool_call(call, number) for call in calls]
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


def _tool_call(call: object, number: int) -> dict[str, Any]:
    """A tool call as servers give it to templates: a function's, its arguments decoded."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UnusableError(
            "unknown format", f"a tool call of turn {number} is {call!r:.60}, without a function's name"
        )
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _decode(arguments, f"tool call arguments of turn {number}") if arguments.strip() else {}
    whole = call if "function" in call else {"type": "function"}
    return {**whole, "function": {**function, "arguments": {} if arguments is None else arguments}}


def tools_of(record: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """The JSON schemas under `tools` of a record. Raises UnusableError."""
    value = record.get("tools")
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        value = _decode(value, "tools")
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise UnusableError("unknown format", f"`tools` is {_kind(value)}, not a list of JSON schemas")
    return tuple(
        {"type": "function", "function": dict(tool)} if "function" not in tool and "name" in tool else dict(tool)
        for tool in value
    )


def variables_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of the chat template under `chat_template_kwargs` of a record. Raises UnusableError."""
    value = record.get("chat_template_kwargs") or {}
    if isinstance(value, str):
        value = _decode(value, "chat_template_kwargs")
    if not isinstance(value, Mapping) or (reserved := [name for name in RESERVED if name in value]):
        what = f"sets {reserved[0]}" if isinstance(value, Mapping) else f"is {_kind(value)}, not an object"
        raise UnusableError("unknown format", f"`chat_template_kwargs` {what}")
    return dict(value)


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
            if not message["content"].strip() and not message.keys() & {"tool_calls", "reasoning_content"}:
                raise UnusableError("empty answer", f"turn {number} is the assistant's and says nothing")
            last = number
        elif role in ("tool", "ipython") and before not in ("assistant", "tool", "ipython"):
            raise UnusableError("wrong role order", f"turn {number} is a tool's, after {before or 'nothing'}")
        asked = asked or role == "user"
        before = role
    if not last:
        raise UnusableError("no answer", f"no assistant turn among {len(messages)} turns; {ANSWERED}")
    return tuple(messages[:last])


def _decode(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnusableError("malformed record", f"`{where}` is no JSON: {error}") from error


def _kind(value: object) -> str:
    return "null" if value is None else f"a {type(value).__name__}"


def conversation_key(sample: Sample) -> int:
    """64 bits (of BLAKE2b) of the first user message, or of the text of a plain-text record, without the blanks around
    it. Conversations of equal keys are never on both sides."""
    text = sample.text
    if text is None:
        text = next((message["content"] for message in sample.messages if message["role"] == "user"), "")
    return int.from_bytes(hashlib.blake2b(text.strip().encode(), digest_size=8).digest(), "little")


def is_held_out(keys: Any, share: float) -> Any:
    """Whether conversations of these keys, an int or uint64 [N], are held out when `share` (0 to 1) of all of them
    are: bool, or bool [N]."""
    return keys < min(int(share * 2.0**64), 2**64 - 1)
