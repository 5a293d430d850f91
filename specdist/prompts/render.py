# SPDX-License-Identifier: Apache-2.0
"""From a conversation to token sequences with a supervision mask that is exact.

The rule: a supervised token is one that the target generates, in the very context in which the server makes it generate
that token. For assistant turn a that context is the rendering of the turns before it with the generation prompt
(template.py). If the rendering for a later turn begins with the text of this turn's prompt and answer, one sequence
teaches both. It does not for templates that rewrite earlier turns: Qwen3 drops the `<think>` block of an answer once
the user speaks again, gpt-oss ends an earlier answer with another token. A rewritten answer is one the target never
generated, and the tokens after a kept one would be conditioned on text that the server does not have. So the
conversation becomes several sequences, one for each stretch of turns that share an unrewritten past, and in each only
the turns that it shows as generated are supervised. `supervise=last` makes one sequence, of the last turn alone.

Tokens follow the server too: it tokenises the prompt and generates the answer's tokens one by one, so no token may span
the two. The whole text is tokenised once and cut by character offsets where that gives the same tokens (it nearly
always does; each boundary is checked by tokenising its neighbourhood); otherwise prompt and answer are tokenised apart.

A plain text is supervised everywhere, with the special tokens that the tokenizer itself adds to a text.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from specdist.core.errors import DataError
from specdist.core.model_config import read_tokenizer
from specdist.prompts.config import PromptsConfig
from specdist.prompts.conversation import UNTAUGHT, Sample
from specdist.prompts.parts import ARGUMENTS, left_out
from specdist.prompts.report import PrepareReport, UnusableError
from specdist.prompts.template import Template, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


KINDS = ("prompt", "thought", "content", "tool call", "marks")
"""What tokens are of. All but those of prompts are supervised; `marks` are ends of turns, roles and channels."""


@dataclass(frozen=True)
class Sequenced:
    """One training sequence: `tokens` int32 [T], and of each its kind, uint8 [T], an index of `KINDS`."""

    tokens: np.ndarray
    kinds: np.ndarray

    @property
    def supervised(self) -> np.ndarray:
        """bool [T]"""
        return self.kinds > 0

    @classmethod
    def of(cls, tokens: list[int], kinds: np.ndarray) -> Sequenced:
        return cls(np.asarray(tokens, dtype=np.int32), kinds)


@dataclass(frozen=True)
class Rendering:
    """The sequences of one sample, cut to length, and what the report says of the sample, but for its tokens."""

    sequences: tuple[Sequenced, ...]
    report: PrepareReport


def load_tokenizer(directory: str | Path, config: PromptsConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory, with the chat template that the configuration asks for. Raises DataError:
    there is no tokenizer, or the template file cannot be read."""
    if not Path(directory).is_dir():
        raise DataError(f"the tokenizer directory {directory} does not exist")
    try:
        tokenizer = read_tokenizer(directory)
        if config.chat_template is not None:
            tokenizer.chat_template = Path(config.chat_template).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())  # transformers says it in many lines
        raise DataError(
            f"no usable tokenizer in {directory}, or no template at prompts.chat_template: {why}",
            "prompts.chat_template",
        ) from error
    return tokenizer


class Renderer:
    """Renders samples with one tokenizer. Not thread-safe; every worker process has its own. `ends`: see `Template`."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, config: PromptsConfig, ends: frozenset[int] | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.template = Template(tokenizer, dict(config.template_kwargs), ends)
        self._backend = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()

    @classmethod
    def from_directory(cls, directory: str | Path, config: PromptsConfig) -> Renderer:
        return cls(load_tokenizer(directory, config), config)

    def render(self, sample: Sample) -> Rendering:
        """The training sequences of a sample, none longer than max_length, each with something to learn. Raises
        UnusableError: with the reason, where the sample gives none."""
        if sample.text is not None:
            return self._cut([self._text(sample.text)], PrepareReport(kept=1))
        turns, lack = self._turns(sample)
        report = PrepareReport(kept=1, turns=len(turns), most_turns=len(turns), left_out=dict.fromkeys(lack, 1))
        return self._cut(self._sequences(turns), report)

    def _turns(self, sample: Sample) -> tuple[list[Turn], frozenset[str]]:
        """The turns that are learnt, and what the last prompt lacks of what comes before (`parts.left_out`)."""
        ends = [
            i
            for i, message in enumerate(sample.messages, start=1)
            if message["role"] == "assistant" and UNTAUGHT not in message
        ]
        if not ends:
            raise UnusableError("empty loss mask", "every answer has weight 0")
        if self.config.supervise == "last":
            ends = ends[-1:]
        turns = [self.template.turn(sample.messages[:end], sample.tools, sample.variables) for end in ends]
        lack = left_out(turns[-1].prompt, sample.messages[: ends[-1] - 1], sample.tools)
        return turns, lack | {ARGUMENTS} if any(turn.lacks_arguments for turn in turns) else lack

    def _sequences(self, turns: list[Turn]) -> list[Sequenced]:
        chains: list[list[Turn]] = []
        for turn in turns:
            if chains and turn.prompt.startswith(chains[-1][-1].text):
                chains[-1].append(turn)
            else:
                chains.append([turn])
        found: list[Sequenced] = []
        for chain in chains:
            whole = self._tokenize_whole(chain)
            found += self._tokenize_apart(chain) if whole is None else [whole]
        return found

    def _text(self, text: str) -> Sequenced:
        bos = self.tokenizer.bos_token
        tokens = self.tokenizer.encode(text, add_special_tokens=not (bos and text.startswith(bos)))
        return Sequenced.of(tokens, np.full(len(tokens), KINDS.index("content"), np.uint8))

    def _cut(self, sequences: list[Sequenced], report: PrepareReport) -> Rendering:
        limit = self.config.max_length
        kept: list[Sequenced] = []
        longest = max(len(sequence.tokens) for sequence in sequences)
        if longest > limit and self.config.overlong == "stop":
            raise UnusableError("overlong", f"{longest:,} tokens, more than prompts.max_length = {limit:,}")
        for sequence in sequences:
            overlong = len(sequence.tokens) > limit
            if overlong and self.config.overlong == "skip":
                report.skipped += 1
            elif not sequence.supervised[1:limit].any():  # nothing predicts the first token
                report.cut_away += 1
            else:
                kept.append(Sequenced(sequence.tokens[:limit], sequence.kinds[:limit]))
                report.truncated += overlong
        if kept:
            return Rendering(tuple(kept), report)
        if report.skipped:
            raise UnusableError("overlong", f"{longest:,} tokens, more than prompts.max_length = {limit:,}")
        where = f"in the first {limit:,} of {longest:,} tokens" if longest > limit else f"in {longest:,} tokens"
        raise UnusableError("empty loss mask", f"no assistant token {where}")

    def _tokenize_whole(self, chain: list[Turn]) -> Sequenced | None:
        """Tokenise the text once; None where some prompt, tokenised as the server does, gives other tokens."""
        if self._backend is None or any(turn.token_ids for turn in chain):
            return None
        text = chain[-1].text
        tokens, starts = self._encode(text)
        if starts is None or (np.diff(starts) < 0).any():
            return None
        kinds = np.zeros(len(tokens), np.uint8)
        for turn in chain:
            begin, end = len(turn.prompt), len(turn.text)
            anchor = self.template.last_added_token(turn.prompt)
            checked = [begin]
            if end < len(text) and not self.template.ends_with_added_token(turn.answer):
                checked.append(end)
            for boundary in checked:
                first, last = np.searchsorted(starts, (anchor, boundary))
                if self._encode(text[anchor:boundary])[0] != tokens[first:last]:
                    return None
            first, last = np.searchsorted(starts, (begin, end))
            kinds[first:last] = _kinds(turn, starts[first:last] - begin)
        return Sequenced.of(tokens, kinds)

    def _tokenize_apart(self, chain: list[Turn]) -> list[Sequenced]:
        """Prompts and answers apart; a turn joins the one before it if its prompt begins with the same tokens."""
        sequences: list[Sequenced] = []
        tokens: list[int] = []
        kinds = np.zeros(0, np.uint8)
        for turn in chain:
            prompt = self._encode(turn.prompt)[0]
            answer, starts = self._encode(turn.answer) if not turn.token_ids else (list(turn.token_ids), None)
            if tokens and prompt[: len(tokens)] != tokens:
                sequences.append(Sequenced.of(tokens, kinds))
                kinds = np.zeros(0, np.uint8)
            between = np.zeros(len(prompt) - len(kinds), np.uint8)
            told = _kinds(turn, starts if starts is not None else np.zeros(len(answer), np.int64))
            kinds = np.concatenate((kinds, between, told))
            tokens = prompt + answer
        return [*sequences, Sequenced.of(tokens, kinds)]

    def _encode(self, text: str) -> tuple[list[int], np.ndarray | None]:
        """Token ids without added special tokens, and the character at which each begins (fast tokenizers)."""
        if self._backend is None:
            return self.tokenizer.encode(text, add_special_tokens=False), None
        encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, np.fromiter((offset[0] for offset in encoding.offsets), np.int64, len(encoding.ids))


def _kinds(turn: Turn, starts: np.ndarray) -> np.ndarray:
    """uint8 [A], the kinds of an answer's tokens, which begin at the characters `starts`, int64 [A]."""
    kinds = np.full(len(starts), KINDS.index("tool call" if turn.calls else "marks"), np.uint8)
    for kind, begin, end in turn.spans:
        kinds[(starts >= begin) & (starts < end)] = KINDS.index(kind)
    return kinds
