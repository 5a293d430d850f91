# SPDX-License-Identifier: Apache-2.0
"""What a chat template shows the target at an assistant turn, and what the target then says.

For the assistant turn a of a conversation m, the server renders `prompt = render(m[:a], add_generation_prompt=True)`
and the target goes on from there. `render(m[:a + 1])` begins with that prompt; what follows is the answer, its
end-of-turn token, and whatever the template puts after it (a newline, a further token, the header of the next turn),
which no target generates. How a template ends a turn is found once, from a conversation whose answer is known.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import jinja2

from specdist.core.errors import DataError
from specdist.prompts.conversation import UNTAUGHT, WRITTEN_KEYS, Message
from specdist.prompts.report import UnusableError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
PROBE_ANSWER = "Probe7answer"
HARMONY_FINAL = "<|channel|>final<|message|>"
RENDER_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
"""What a template, which is a program of someone else's, raises over a conversation that it does not take."""

Tools = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class TurnEnding:
    """How the template ends a last assistant turn: `end` closes it, `rest` follows and is not generated."""

    end: str
    """Up to the end-of-turn token, inclusive; empty for a template that has none."""
    rest: str
    token: str | None


@dataclass(frozen=True)
class Turn:
    """One assistant turn as the server sees it. The target reads `prompt` and generates `answer`."""

    prompt: str
    answer: str
    spans: tuple[tuple[int, int], ...]
    """The supervised character ranges of `answer`."""
    token_ids: tuple[int, ...] = ()
    """Those of `answer`, where the target wrote other ones than tokenising it gives."""

    @property
    def text(self) -> str:
        return self.prompt + self.answer


class Template:
    """A tokenizer's chat template with its variables."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, variables: dict[str, Any]) -> None:
        self.tokenizer = tokenizer
        self.variables = variables
        names = {*tokenizer.all_special_tokens, *(str(t) for t in tokenizer.added_tokens_decoder.values())}
        alternatives = "|".join(re.escape(name) for name in sorted(filter(None, names), key=len, reverse=True))
        self._added = re.compile(alternatives or r"(?!)")

    def turn(self, messages: Sequence[Message], tools: Tools = ()) -> Turn:
        """The last message of `messages`, which is the assistant's.

        Raises:
            UnusableError: the template refuses the conversation, or renders no answer that a server could have given.
        """
        prompt, last = self.prompt(messages[:-1], tools), messages[-1]
        if "end" in last:
            answer = last["content"] + last["end"]
            return Turn(prompt, answer, ((0, len(answer)),), tuple(last.get("token_ids", ())))
        rendered, tags = self._render_tagged(messages, tools)
        if not rendered.startswith(prompt):
            answer = self._behind_another_prompt(prompt, rendered, messages, tools)
            tags = None
        else:
            answer = rendered[len(prompt) :]
        answer, body = self._without_rest(answer)
        self._check(answer[:body], last)
        if last.get("finish_reason") == "length":  # a limit ended it, not the target
            answer = answer[:body]
        if tags is None:
            return Turn(prompt, answer, ((0, len(answer)),))
        return Turn(prompt, answer, _clip(tags, len(prompt), body, len(answer)))

    def prompt(self, messages: Sequence[Message], tools: Tools = ()) -> str:
        """What the target reads before it answers `messages`. Raises UnusableError where the template refuses them."""
        return self._render(messages, tools, True)

    def last_added_token(self, text: str) -> int:
        """Where the last added (special) token of `text` begins, or 0: tokenisation starts afresh there."""
        last = 0
        for match in self._added.finditer(text):
            last = match.start()
        return last

    def ends_with_added_token(self, text: str) -> bool:
        last = self._added.match(text, self.last_added_token(text))
        return last is not None and last.end() == len(text)

    @cached_property
    def ending(self) -> TurnEnding | None:
        """How this template ends the turn of a plain answer; None where the probe tells nothing."""
        probe = [{"role": "user", "content": "Probe"}, {"role": "assistant", "content": PROBE_ANSWER}]
        try:
            rendered = self._render(probe, (), False)
        except UnusableError:
            return None
        found = rendered.rfind(PROBE_ANSWER)
        if found < 0:
            return None
        tail = rendered[found + len(PROBE_ANSWER) :]
        match = self._added.search(tail)
        if match is None:
            return TurnEnding("", tail, None)
        return TurnEnding(tail[: match.end()], tail[match.end() :], match.group())

    def _without_rest(self, answer: str) -> tuple[str, int]:
        """The answer up to its end-of-turn token inclusive, and the length of what comes before that token."""
        ending = self.ending
        if ending is not None and answer.endswith(ending.end + ending.rest):
            cut = len(answer) - len(ending.rest)
            return answer[:cut], cut - len(ending.end)
        answer = answer.rstrip()
        last = self.last_added_token(answer)
        return answer, last if self.ends_with_added_token(answer) else len(answer)

    def _check(self, body: str, message: Message) -> None:
        if not body.strip():
            raise UnusableError("empty answer", f"the chat template renders nothing of {_shown(message['content'])}")
        token = self.ending.token if self.ending else None
        if token is not None and token in body:
            raise UnusableError(
                "not what the server generates", f"the answer goes on after the end-of-turn token {token}"
            )

    def _behind_another_prompt(self, prompt: str, rendered: str, messages: Sequence[Message], tools: Tools) -> str:
        """The answer where the generation prompt says more than the rendered turn (`<think>` of DeepSeek-R1).

        Such a template leaves the reasoning out of every rendered turn, also the last. What the target generated is
        then the raw content, without the part of it that the generation prompt had already said.
        """
        content = messages[-1]["content"]
        probe = self._render([*messages[:-1], {"role": "assistant", "content": PROBE_ANSWER}], tools, False)
        header = probe[: probe.rfind(PROBE_ANSWER)]
        tail = probe[len(header) + len(PROBE_ANSWER) :]
        known = PROBE_ANSWER in probe and prompt.startswith(header)
        said = prompt[len(header) :] if known else prompt[-40:]
        if known and rendered.startswith(header):
            visible = rendered[len(header) : len(rendered) - len(tail)].strip()
            hides = content.strip() != visible and content.strip().endswith(visible)
            if content.startswith(said):
                return content[len(said) :] + tail
            if content.startswith(said.strip()):
                return content[len(said.strip()) :].lstrip("\n") + tail
            if hides and said.strip() not in content:
                return content + tail
        raise UnusableError(
            "not what the server generates",
            f"the prompt for this turn ends {_shown(said or prompt[-40:])}, and the answer in the file does not go on "
            "from there; prompts.template_kwargs or prompts.chat_template may be other than the server's",
        )

    def _render(self, messages: Sequence[Message], tools: Tools, generation_prompt: bool) -> str:
        self.source(bool(tools))
        try:
            text = self.tokenizer.apply_chat_template(
                self._sent(messages, tools),
                tools=list(tools) or None,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **self.variables,
            )
        except RENDER_ERRORS as error:
            raise UnusableError("refused by the chat template", str(error) or type(error).__name__) from error
        return str(text)

    def _render_tagged(self, messages: Sequence[Message], tools: Tools) -> tuple[str, list[tuple[int, int]] | None]:
        """The rendering, and the ranges inside the template's `{% generation %}` blocks if it has any."""
        source = self.source(bool(tools))
        if not GENERATION_TAG.search(source):
            return self._render(messages, tools, False), None
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, tags = cast(Any, render_jinja_template)(
                [self._sent(messages, tools)],
                tools=list(tools) or None,
                chat_template=source,
                return_assistant_tokens_mask=True,
                **{**self.tokenizer.special_tokens_map, **self.variables},
            )
        except RENDER_ERRORS as error:
            raise UnusableError("refused by the chat template", str(error) or type(error).__name__) from error
        return texts[0], tags[0]

    def _sent(self, messages: Sequence[Message], tools: Tools) -> list[Message]:
        """The messages as a server gets them back. An answer that is there to the letter is divided as a server
        divides it: into thought and content where the template takes them apart, and without Harmony's channels."""
        sent = []
        for message in messages:
            bare = {key: value for key, value in message.items() if key not in (*WRITTEN_KEYS, UNTAUGHT)}
            if "end" in message:
                thought, closed, content = message["content"].rpartition("</think>")
                if HARMONY_FINAL in message["content"]:
                    bare["content"] = message["content"].rpartition(HARMONY_FINAL)[2]
                elif closed and "reasoning_content" in self.source(bool(tools)):
                    thought = thought.rpartition("<think>")[2].strip("\n")
                    bare |= {"reasoning_content": thought, "content": content.lstrip("\n")}
            sent.append(bare)
        return sent

    def source(self, tools: bool = False) -> str:
        """The Jinja text of the template.

        Raises:
            DataError: the tokenizer has none.
        """
        try:
            return self.tokenizer.get_chat_template(None, [{}] if tools else None)
        except ValueError as error:
            raise DataError(
                f"the tokenizer in {self.tokenizer.name_or_path} has no chat template for conversations: "
                f"give prompts.chat_template ({error})",
                "prompts.chat_template",
            ) from error


def _clip(tags: list[tuple[int, int]], start: int, body: int, length: int) -> tuple[tuple[int, int], ...]:
    """Tagged ranges of the rendering as ranges of an answer that begins at `start`.

    Authors tag more than is generated (the turn's header, the newline after it) or less (the content without its
    end-of-turn token): the first is clipped, and a range that reaches the end-of-turn token takes it in.
    """
    ranges = []
    for first, last in tags:
        first, last = max(first - start, 0), min(last - start, length)
        if first < last:
            ranges.append((first, length if last >= body else last))
    return tuple(ranges)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
