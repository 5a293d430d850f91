# SPDX-License-Identifier: Apache-2.0
"""A record of a prompts file as a dialogue with the target: what it is shown, and the record with what it answers."""

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from specdist.prompts import conversation
from specdist.prompts.report import UnusableError
from specdist.prompts.template import Template

Turns = Literal["all", "last"]


@dataclass(frozen=True)
class Written:
    """An answer of the target: `content` and `end` are its text to the letter (see `WRITTEN_KEYS`)."""

    content: str
    finish_reason: str
    end: str
    token_ids: list[int] | None = None

    @property
    def fields(self) -> dict[str, Any]:
        found = {"finish_reason": self.finish_reason, "end": self.end}
        return found if self.token_ids is None else found | {"token_ids": self.token_ids}


@dataclass(frozen=True)
class _Step:
    """A turn as the file has it and as templates know it (None: it lacks it); `asked`: the target writes it."""

    turn: Mapping[str, Any] | None
    message: conversation.Message | None
    asked: bool


@dataclass(frozen=True)
class Conversation:
    """A record that has something to answer, or is to be kept as it is. `group`: see `conversation_key`."""

    record: Mapping[str, Any]
    key: str
    group: int
    before: list[conversation.Message]
    steps: list[_Step] = field(repr=False)
    tools: tuple[dict[str, Any], ...] = ()

    def dialogue(self, template: Template, held: bool = False) -> Generator[str, Written | None, dict[str, Any] | None]:
        """Yields the prompt of one answer after the other and takes the answer, None for one that is refused.

        Returns the record with the answers. It ends before one that is refused and after one that was cut off, for what
        the data goes on with is no reply to those. None: there is no answer. Where it is `held` out, what the target
        has not written is context alone: serving drafts no such text. Raises UnusableError: the chat template refuses
        the first prompt.
        """
        told, turns, answers, kept = list(self.before), list[Mapping[str, Any]](), 0, 0
        for step in self.steps:
            if not step.asked:
                assert step.turn is not None
                assert step.message is not None
                context = {conversation.UNTAUGHT: 0} if held and step.message["role"] == "assistant" else {}
                turns.append({**step.turn, **context})
                told.append(step.message)
                continue
            try:
                prompt = template.prompt(told, self.tools)
            except UnusableError:
                if not answers:
                    raise
                break  # what the target has said is nothing that the template shows again
            written = yield prompt
            if written is None:
                break
            answers, kept = answers + 1, len(turns) + 1
            turns.append(self._turn(step.turn, written))
            told.append({"role": "assistant", "content": written.content, **written.fields})
            if written.finish_reason == "length":
                break
        if answers:
            return {**self.record, self.key: turns[:kept]}
        kept_whole = not held and not any(step.asked for step in self.steps)
        return {**self.record, self.key: turns} if kept_whole else None

    def _turn(self, old: Mapping[str, Any] | None, written: Written) -> dict[str, Any]:
        like = old or next(step.turn for step in self.steps if step.turn)
        role, text = ("from", "value") if "from" in like and "role" not in like else ("role", "content")
        dropped = {"content", "value", *conversation.REASONING_KEYS, *conversation.WRITTEN_KEYS}
        kept = {key: value for key, value in (old or {}).items() if key not in dropped}
        name = "gpt" if role == "from" else "assistant"
        return {role: name, **kept, text: written.content, **written.fields}


def parse(record: object, turns: Turns) -> Conversation:
    """Read a record: one of training (see `prompts.conversation`), with or without answers, or `prompt`, a user's
    message, or `turns`, several of a user.

    Of a conversation with answers those are written anew that call no tool, all or the last, and one more if it ends
    with the user or with a tool's result. Without any, every turn of the user is answered. Raises UnusableError: there
    is no user turn, or the turns come in an order that no server could have seen.
    """
    if not isinstance(record, Mapping):
        raise UnusableError("unknown format", f"a record is an object with a key, not {type(record).__name__}")
    key, raw = _raw_turns(record)
    messages = [conversation.to_message(turn, number) for number, turn in enumerate(raw, start=1)]
    roles = [message["role"] for message in messages]
    if "user" not in roles:
        raise UnusableError("no user turn", f"nobody asks anything in {len(roles)} turns")
    steps = list[_Step]()
    for place, (turn, message) in enumerate(zip(raw, messages, strict=True)):
        role, before = roles[place], roles[place - 1] if place else "nothing"
        if role == "assistant" and (before == "assistant" or "user" not in roles[:place]):
            raise UnusableError("wrong role order", f"turn {place + 1} is the assistant's, after {before}")
        steps.append(_Step(turn, message, role == "assistant" and not message.get("tool_calls")))
        ends = place == len(roles) - 1 and role not in ("assistant", "system")
        if ends or ("assistant" not in roles and role == "user"):
            steps.append(_Step(None, None, True))
    if turns == "last":
        last = max((place for place, step in enumerate(steps) if step.asked), default=0)
        steps = [
            _Step(s.turn, s.message, s.asked and (place == last or s.turn is None)) for place, s in enumerate(steps)
        ]
    group = conversation.conversation_key(conversation.Sample("", 0, tuple(messages)))
    shown, tools = conversation.system_turn(record, messages), conversation.tools_of(record)
    return Conversation(record, key, group, shown, steps, tools)


def _raw_turns(record: Mapping[str, Any]) -> tuple[str, list[Any]]:
    if (found := conversation.raw_turns(record)) is not None:
        return found
    asked = record.get("turns") if record.get("prompt") is None else [record["prompt"]]
    if isinstance(asked, list) and asked and all(isinstance(text, str) and text.strip() for text in asked):
        return "messages", [{"role": "user", "content": text} for text in asked]
    keys = ", ".join(map(str, record)) or "none"
    what = "`text` is no conversation" if record.get("text") is not None else f"the keys are {keys}"
    raise UnusableError("no user turn", f"{what}: give messages, conversations, prompt or turns")
