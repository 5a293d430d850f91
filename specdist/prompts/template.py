# SPDX-License-Identifier: Apache-2.0
"""What a chat template shows the target at an assistant turn, and what the target then says.

For the assistant turn a of a conversation m, the server renders `prompt = render(m[:a], add_generation_prompt=True)`
and the target goes on from there, until it writes one of its end-of-turn tokens. `render(m[:a + 1])` shows what it
said. Most templates begin that with the prompt. Others do not, and the answer is looked for behind the header of the
turn, which a probe finds: the past may be rendered otherwise once an answer follows (gpt-oss, Mistral), or the prompt
opens or closes a thought that the turn does not show (DeepSeek-R1, Gemma 4).

All that the data says in the answer must be in it: reasoning that a template leaves out of a turn goes where the prompt
or an empty thought shows its place, and what is left out else is an error of the sample. The end is the first
end-of-turn token (core/model_config.py), be it the next role's, and only without one what closes a turn.
Tags around the generated text in a template (`{% generation %}`) are not used: authors tag more or less than that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from specdist.core.errors import DataError
from specdist.core.model_config import end_tokens
from specdist.prompts.conversation import REASONING_KEYS, UNTAUGHT, WRITTEN_KEYS, Message
from specdist.prompts.parts import (
    Divided,
    Kind,
    Part,
    before_marks,
    divide,
    find,
    left_by,
    only_marks,
    parts,
    shown,
    with_thought,
)
from specdist.prompts.report import Reason, UnusableError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBES = ("7th probe", "Probe 8")
PROBE_ANSWER, PROBE_NEXT = "Probe7answer", "Probe8next"
HARMONY_FINAL = "<|channel|>final<|message|>"
READS_REASONING = re.compile(r"""(?:\.|\[['"]|get\(['"])(?:reasoning_content|reasoning|thinking)\b""")
RENDER_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
"""What a template, which is a program of someone else's, raises over a conversation that it does not take."""

LEFT_OUT: dict[Kind, Reason] = {
    "thought": "reasoning left out by the chat template",
    "content": "content left out by the chat template",
    "tool call": "tool call left out by the chat template",
}

Tools = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class TurnEnding:
    """How a turn ends that shows no end-of-turn token: where the template writes `shown`, the target writes `written`.
    `token` is the last of that, None where it has none."""

    shown: str
    written: str
    token: str | None


@dataclass(frozen=True)
class Turn:
    """One assistant turn as the server sees it. The target reads `prompt` and generates `answer`."""

    prompt: str
    answer: str
    spans: tuple[tuple[Kind, int, int], ...] = ()
    """Where the thought and the content begin and end in `answer`."""
    calls: bool = False
    """Whether the rest of it is tool calls."""
    lacks_arguments: bool = False
    """Whether the template does not show some argument of them, or not as the data has it."""
    token_ids: tuple[int, ...] = ()
    """Those of `answer`, where the target wrote other ones than tokenising it gives."""

    @property
    def text(self) -> str:
        return self.prompt + self.answer


@dataclass(frozen=True)
class _Said:
    """What an answer says, however the data writes it. `written`: the thought with its marks, as in the data. `cut`:
    a limit ended it, not the target."""

    thought: str
    content: str
    calls: tuple[Any, ...]
    written: str | None
    cut: bool

    @classmethod
    def of(cls, message: Message, prompt: str) -> _Said:
        divided = None if message.get("reasoning_content") else divide(message["content"])
        cut = message.get("finish_reason") == "length"
        if divided is None and cut and left_by(prompt) == "opened" and not message.get("reasoning_content"):
            divided = Divided(message["content"], "", message["content"], False)
        calls = tuple(message.get("tool_calls") or ())
        if divided is None:
            thought, content = message.get("reasoning_content", ""), message["content"]
            unclosed = bool(thought) and not content.strip() and not calls
            return cls(thought, content, calls, None, cut or unclosed)
        return cls(divided.thought, divided.content, calls, divided.written, cut or not divided.closed)

    @property
    def parts(self) -> list[Part]:
        return parts(self.thought, self.content, self.calls)


class Template:
    """A tokenizer's chat template with its variables. `ends`: the end-of-turn tokens; by default those that the
    tokenizer and the model in its directory name."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        variables: Mapping[str, Any],
        ends: frozenset[int] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.variables = variables
        if ends is None:
            known = Path(tokenizer.name_or_path or ".").is_dir() and bool(tokenizer.name_or_path)
            eos = tokenizer.eos_token_id
            ends = end_tokens(tokenizer.name_or_path, eos) if known else frozenset(() if eos is None else (eos,))
        names = {*tokenizer.all_special_tokens, *(str(t) for t in tokenizer.added_tokens_decoder.values())}
        self._added = _any_of(names)
        self._ends = _any_of(str(name) for name in tokenizer.convert_ids_to_tokens(sorted(ends)) if name in names)
        self._ending = cache(self._find_ending)
        self._as_parts = cache(self._takes_parts_alone)
        self._reads_reasoning = cache(lambda tools: bool(READS_REASONING.search(self.source(tools))))

    def turn(self, messages: Sequence[Message], tools: Tools = (), variables: Mapping[str, Any] | None = None) -> Turn:
        """The last message of `messages`, which is the assistant's. `variables` of the sample's own come last. Raises
        UnusableError: the template refuses the conversation, renders no answer that a server could have given, or
        leaves out something of it."""
        prompt, last = self.prompt(messages[:-1], tools, variables), messages[-1]
        said = _Said.of(last, prompt)
        if "end" in last:
            answer = last["content"] + last["end"]
            spans = shown(answer, said.parts).spans
            return Turn(prompt, answer, spans, bool(said.calls), token_ids=tuple(last.get("token_ids", ())))
        if said.thought and left_by(prompt) == "closed":
            raise self._other_server(prompt, "", "the answer in the data has a thought")
        rendered = self._render(messages, tools, variables, False)
        answer = rendered[len(prompt) :]
        if not rendered.startswith(prompt):
            answer = self._behind_another_prompt(prompt, rendered, messages, tools, variables)
            if left_by(prompt) == "opened" and not said.thought:
                raise self._other_server(prompt, rendered, "the answer in the data has no thought to go on with")
        if said.thought and find(said.thought, answer) is None:
            answer = with_thought(prompt, answer, said.thought, said.written) or answer
        return self._judged(prompt, answer, said, f"turn {len(messages)}")

    def prompt(self, messages: Sequence[Message], tools: Tools = (), variables: Mapping[str, Any] | None = None) -> str:
        """What the target reads before it answers `messages`. Raises UnusableError where the template refuses them."""
        return self._render(messages, tools, variables, True)

    def last_added_token(self, text: str) -> int:
        """Where the last added (special) token of `text` begins, or 0: tokenisation starts afresh there."""
        last = 0
        for match in self._added.finditer(text):
            last = match.start()
        return last

    def ends_with_added_token(self, text: str) -> bool:
        last = self._added.match(text, self.last_added_token(text))
        return last is not None and last.end() == len(text)

    @property
    def end(self) -> str:
        """The text of the token that ends a plain answer; empty where there is none."""
        ending = self._ending(False)
        return (ending.token or "") if ending else ""

    def _find_ending(self, calls: bool) -> TurnEnding | None:
        """How this template ends a turn, one with tool calls or a plain one; None where a probe tells nothing."""
        said: Message = {"role": "assistant", "content": PROBE_ANSWER}
        then: Message = {"role": "user", "content": PROBE_NEXT}
        if calls:
            call = {"name": "probe", "arguments": {"probe": PROBE_ANSWER}}
            said |= {"content": "", "tool_calls": [{"id": "probe0001", "type": "function", "function": call}]}
            then |= {"role": "tool", "name": "probe", "tool_call_id": "probe0001"}
        asked: Message = {"role": "user", "content": "Probe"}
        try:
            _, found, shown = self._render([asked, said], (), None, False).rpartition(PROBE_ANSWER)
            past = self._render([asked, said, then], (), None, False)
        except UnusableError:
            return None
        if not found:
            return None
        after = past.partition(PROBE_NEXT)[0].rpartition(PROBE_ANSWER)[2]
        if match := self._ends.search(shown):
            return TurnEnding(shown, shown[: match.end()], match.group())
        if match := self._ends.search(after):
            common = _common(shown, after[: match.start()])
            return TurnEnding(shown[common:], after[common : match.end()], match.group())
        plain = self._ending(False) if calls else None
        if calls and not (plain and plain.token):
            return None
        if match := re.search(re.escape(plain.token), shown) if plain and plain.token else self._added.search(shown):
            return TurnEnding(shown[match.end() :], "", match.group())
        return TurnEnding(shown, "", None) if not calls else None

    def _until_its_end(self, answer: str, calls: bool) -> tuple[str, int]:
        """What the target writes of a rendered turn, its end-of-turn token included, and the length of the rest."""
        if match := self._ends.search(answer):
            return answer[: match.end()], match.start()
        ending = self._ending(calls)
        if ending is not None and answer.endswith(ending.shown):
            answer = answer[: len(answer) - len(ending.shown)] + ending.written
        else:
            answer = answer.rstrip()
        return answer, self.last_added_token(answer) if self.ends_with_added_token(answer) else len(answer)

    def _judged(self, prompt: str, rendered: str, said: _Said, where: str) -> Turn:
        """The turn whose answer is `rendered`, if that says, before its end, all that the data says."""
        answer, body = self._until_its_end(rendered, bool(said.calls))
        found = shown(answer[:body], said.parts)
        if (self.end and self.end in answer[:body]) or (found.missing and not shown(rendered, said.parts).missing):
            detail = f"{where} goes on after the end-of-turn token {answer[body:].strip() or self.end}"
            raise UnusableError("not what the server generates", detail, (prompt, rendered))
        for part in found.missing:
            if part.kind != "arguments":
                raise UnusableError(LEFT_OUT[part.kind], f"{where}: {_short(part.value)}", (prompt, rendered))
        if not answer[:body].strip():
            raise UnusableError("empty answer", f"the chat template renders nothing of {where}", (prompt, rendered))
        if said.cut:
            answer = answer[: max((last for _, _, last in found.spans), default=body)]
        return Turn(prompt, answer, found.spans, bool(said.calls), bool(found.missing))

    def _behind_another_prompt(
        self, prompt: str, rendered: str, messages: Sequence[Message], tools: Tools, variables: Mapping[str, Any] | None
    ) -> str:
        """The answer in a rendering that does not begin with the prompt: what follows the turn's header, of which the
        rendering may lack the marks of a thought that end the prompt."""
        bare = self._render(messages[:-1], tools, variables, False)
        header = prompt[_common(bare, prompt) :] or prompt[self.last_added_token(prompt[: before_marks(prompt)]) :]
        probes = [self._render([*messages[:-1], _probe(messages[-1], p)], tools, variables, False) for p in PROBES]
        begin = _common(rendered, *probes)
        asked = messages[-2]["content"].strip()
        for length in range(len(header), 0, -1):
            at = rendered.rfind(header[:length], 0, begin) if only_marks(header[length:]) else -1
            between = rendered[at + length : begin]  # behind an earlier turn's header it holds what was asked
            if at >= 0 and (not self._unmarked(between) or (asked and find(asked, between) is None)):
                return rendered[at + length :]
        raise self._other_server(prompt, rendered, "the rendered turn does not go on from there")

    def _unmarked(self, text: str) -> str:
        """`text` without added tokens, and the marks and the thought's, that it may consist of alone."""
        bare = self._added.sub("", text)
        return "" if only_marks(bare) else bare

    def _other_server(self, prompt: str, rendered: str, detail: str) -> UnusableError:
        return UnusableError(
            "not what the server generates",
            f"the prompt for this turn ends {_short(prompt[-40:])}, and {detail}; prompts.template_kwargs or "
            "prompts.chat_template may be other than the server's",
            (prompt, rendered),
        )

    def _render(
        self,
        messages: Sequence[Message],
        tools: Tools,
        variables: Mapping[str, Any] | None,
        generation_prompt: bool,
    ) -> str:
        sent = [_sent(message, self._reads_reasoning(bool(tools))) for message in messages]
        if self._as_parts():
            sent = [m | {"content": [{"type": "text", "text": m["content"]}] if m["content"] else []} for m in sent]
        try:
            text = self._applied(sent, tools, variables, generation_prompt)
        except RENDER_ERRORS as error:
            if not isinstance(error, TypeError) or not any(message.get("tool_calls") for message in sent):
                raise _refused(error) from error
        else:
            if not any(str(arguments) in text for message in sent for arguments in _arguments(message)):
                return text
        try:  # some templates take the arguments of a call as JSON alone (DeepSeek-V3)
            return self._applied([_with_json(message) for message in sent], tools, variables, generation_prompt)
        except RENDER_ERRORS as error:
            raise _refused(error) from error

    def _takes_parts_alone(self) -> bool:
        """Whether the template shows lists of parts and no text (Idefics, SmolVLM): servers then send parts."""

        def shows(content: object) -> bool:
            try:
                return PROBE_ANSWER in self._applied([{"role": "user", "content": content}], (), None, False)
            except RENDER_ERRORS:
                return False

        return not shows(PROBE_ANSWER) and shows([{"type": "text", "text": PROBE_ANSWER}])

    def _applied(
        self, sent: list[Message], tools: Tools, variables: Mapping[str, Any] | None, generation_prompt: bool
    ) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                sent,
                tools=list(tools) or None,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **{**self.variables, **(variables or {})},
            )
        )

    def source(self, tools: bool = False) -> str:
        """The Jinja text of the template. Raises DataError: the tokenizer has none."""
        try:
            return self.tokenizer.get_chat_template(None, [{}] if tools else None)
        except ValueError as error:
            raise DataError(
                f"the tokenizer in {self.tokenizer.name_or_path} has no chat template for conversations: "
                f"give prompts.chat_template ({error})",
                "prompts.chat_template",
            ) from error


def _sent(message: Message, reads_reasoning: bool) -> Message:
    """A message as templates take it: reasoning under all names that they know; taken off the front of the content
    where the template has a place for it; and what is there to the letter without Harmony's channels."""
    sent = {key: value for key, value in message.items() if key not in (*WRITTEN_KEYS, UNTAUGHT)}
    if message["role"] != "assistant":
        return sent
    if "end" in message and HARMONY_FINAL in message["content"]:
        sent["content"] = message["content"].rpartition(HARMONY_FINAL)[2]
    elif reads_reasoning and not sent.get("reasoning_content") and (divided := divide(message["content"])):
        sent |= {"reasoning_content": divided.thought, "content": divided.content}
    if thought := sent.get("reasoning_content"):
        sent |= dict.fromkeys(REASONING_KEYS, thought)
    return sent


def _probe(message: Message, text: str) -> Message:
    """The message with other words in it, of the same shape."""
    thought = {"reasoning_content": text} if message.get("reasoning_content") else {}
    calls = [{**call, "function": {**call["function"], "name": text}} for call in message.get("tool_calls") or ()]
    content = message["content"]
    if content and (divided := divide(content)):
        content = divided.written + text if divided.content else content.replace(divided.thought, text)
    elif content:
        content = text
    return {**message, **thought, "content": content, **({"tool_calls": calls} if calls else {})}


def _arguments(message: Message) -> list[Any]:
    calls = message.get("tool_calls") or ()
    return [call["function"]["arguments"] for call in calls if call["function"]["arguments"]]


def _with_json(message: Message) -> Message:
    calls = message.get("tool_calls")
    if not calls:
        return message
    texts = [json.dumps(call["function"]["arguments"], ensure_ascii=False) for call in calls]
    functions = [call["function"] | {"arguments": text} for call, text in zip(calls, texts, strict=True)]
    calls = [call | {"function": function} for call, function in zip(calls, functions, strict=True)]
    return message | {"tool_calls": calls}


def _refused(error: Exception) -> UnusableError:
    return UnusableError("refused by the chat template", str(error) or type(error).__name__)


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    alternatives = "|".join(re.escape(name) for name in sorted(filter(None, names), key=len, reverse=True))
    return re.compile(alternatives or r"(?!)")


def _common(*texts: str) -> int:
    """The length of what `texts` begin with alike."""
    parted = (at for at, letters in enumerate(zip(*texts, strict=False)) if len(set(letters)) > 1)
    return next(parted, min(map(len, texts)))


def _short(text: object) -> str:
    text = str(text)
    return repr(text if len(text) <= 60 else text[:57] + "...")
