# SPDX-License-Identifier: Apache-2.0
"""The prompts of an evaluation: records of several shapes, rendered by the target's own chat template."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdist.core.errors import DataError
from specdist.prompts.conversation import ROLES, Sample, conversation_key, is_held_out, to_sample
from specdist.prompts.read import find_files, pieces, samples
from specdist.prompts.report import BadSample, UnusableError
from specdist.prompts.template import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHAPES = ("messages", "conversations", "prompt", "turns", "text")
STAND_IN = {"role": "assistant", "content": "-"}
"""In the place of the answer, which a prompt may lack: it then reads as a training sample does. Dropped again."""


@dataclass(frozen=True)
class EvaluationPrompt:
    """One prompt, ready to decode, and where it was read."""

    file: str
    line: int
    tokens: tuple[int, ...]


def read_prompts(
    files: Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    share: float | None = None,
    key: str = "evaluate.prompts",
) -> list[EvaluationPrompt]:
    """Read and render the first `limit` prompts of everything that is named in `files` (all of them by default).

    Files are those that training reads (JSONL, JSON, Parquet, Arrow, directories and patterns of them). A record has
    one of
      - `messages` or `conversations`, as for training; what the assistant says last is dropped, for the target to say;
      - `prompt`: a user's message;
      - `turns`: the user's messages of a conversation, of which the first is asked (MT-Bench);
      - `text`: plain text to go on with, tokenised as it is, without the chat template.

    Args:
        template_kwargs: variables of the chat template, as `prompts.template_kwargs` gives them for training.
        share: take those conversations alone that `prompts.holdout` of this share holds out.
        key: the configuration key that names `files`. Of conversations that a run has prepared (`prompts.files`,
            `prompts.holdout`), those that cannot be asked are left out, as the preparation, which names them, has done.

    Raises:
        DataError: a file cannot be read, a record has another shape, or the template does not take it; the message
            names the file and the line.
    """
    prompts, template = list[EvaluationPrompt](), Template(tokenizer, dict(template_kwargs or {}))
    for file in map(str, files):
        found = 0
        for sample in _read(file, key):
            if limit is not None and found >= limit:
                break
            try:
                if isinstance(sample, BadSample):
                    raise UnusableError(sample.reason, sample.detail)
                if share is not None and not is_held_out(conversation_key(sample), share):
                    continue
                tokens = _tokens(sample, template)
            except UnusableError as error:
                if key == "evaluate.prompts":
                    raise DataError.at(key, f": {sample.file}:{sample.line}: {error}") from error
                continue
            prompts.append(EvaluationPrompt(file, sample.line, tuple(tokens)))
            found += 1
        if not found and share is None:
            raise DataError.at(key, f": there is no prompt in {file}")
    return prompts


def _read(file: str, key: str) -> Iterator[Sample | BadSample]:
    for source in find_files((file,), key):
        for piece in pieces(source):
            yield from samples(piece, lambda record, *place: to_sample(_answered(record), *place))


def _answered(record: object) -> object:
    """The record as a conversation that ends with an answer; what is neither prompt nor conversation, as it is."""
    if not isinstance(record, dict):
        return record
    for key in ("messages", "conversations"):
        turns = record.get(key)
        if isinstance(turns, list) and turns and isinstance(turns[-1], dict):
            last = turns[-1].get("role", turns[-1].get("from"))
            answered = isinstance(last, str) and ROLES.get(last.strip().lower()) == "assistant"
            return {**record, key: [*(turns[:-1] if answered else turns), STAND_IN]}
    if record.keys().isdisjoint(SHAPES):
        keys = ", ".join(map(str, record)) or "none"
        raise UnusableError("unknown format", f"none of {', '.join(SHAPES)} among the keys: {keys}")
    if record.keys().isdisjoint(("prompt", "turns")):
        return record
    turns = record.get("turns")
    asked = record.get("prompt", turns[0] if isinstance(turns, list) and turns else None)
    if not isinstance(asked, str) or not asked.strip():
        raise UnusableError("not text", f"the prompt is {asked!r:.60}, not a text with something in it")
    return {"messages": [{"role": "user", "content": asked}, STAND_IN]}


def _tokens(sample: Sample, template: Template) -> list[int]:
    if sample.text is not None:
        return list(template.tokenizer.encode(sample.text))
    prompt = template.prompt(sample.messages[:-1], sample.tools)
    return list(template.tokenizer.encode(prompt, add_special_tokens=False))
