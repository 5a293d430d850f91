# SPDX-License-Identifier: Apache-2.0
"""One replica's part of the answers: it claims shares of the prompts, and writes what the target says to its file.

Replicas and ranks see the same prompts files, and a number is all that passes between them: share n is the SHARE
records from number n * SHARE on.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Collection, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec.structs import replace

from specdist.core.errors import DataError, WorldError, say
from specdist.generate.config import GenerateConfig
from specdist.generate.conversation import Conversation, Written, parse
from specdist.generate.engine import GREEDY, Engine, Reply, Request, Sampling
from specdist.generate.files import Line, Source, Tally
from specdist.prompts.config import PromptsConfig
from specdist.prompts.conversation import is_held_out
from specdist.prompts.read import Piece, SourceFile, pieces, samples
from specdist.prompts.report import BadSample, UnusableError
from specdist.prompts.template import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARE = 16
TICK_S = 0.2
_TELL_AGAIN_S = 60.0


@dataclass(frozen=True)
class Record:
    """A record of a prompts file; `at` is its number among all."""

    at: int
    source: int
    place: str
    content: Conversation | BadSample
    held: bool


def records(
    prompts: PromptsConfig, config: GenerateConfig, sources: Sequence[Source], claim: Callable[[], int]
) -> Iterator[Record]:
    """The records of the shares that `claim` gives, until there are no more: ascending numbers, each to one replica."""
    share, first = claim(), 0
    for source, piece in _pieces(sources):
        end = first + _rows(piece)
        if share * SHARE < end:
            found = samples(piece, lambda record, file, line: parse(record, config.turns))
            for i, content in enumerate(found):
                if (first + i) // SHARE > share:
                    share = claim()
                if (first + i) // SHARE == share:
                    held, part = sources[source].held, prompts.holdout
                    if isinstance(part, float) and isinstance(content, Conversation):
                        held = held or is_held_out(content.group, part)
                    yield Record(first + i, source, _place(piece, i), content, held)
        first = end


def count(sources: Sequence[Source]) -> int:
    return sum(_rows(piece) for _, piece in _pieces(sources))


def _rows(piece: Piece) -> int:
    return len(piece.texts) or piece.last - piece.first + 1


def _pieces(sources: Sequence[Source]) -> Iterator[tuple[int, Piece]]:
    for number, source in enumerate(sources):
        for piece in pieces(SourceFile(source.file, source.kind), every_column=True):  # type: ignore[arg-type]
            yield number, piece


def _place(piece: Piece, i: int) -> str:
    entry = piece.texts[i] if piece.texts else piece.first + i
    return (
        f"{piece.file}:{entry if isinstance(entry, int) else entry.line if isinstance(entry, BadSample) else entry[0]}"
    )


class Author:
    """Turns conversations into lines of a part file, by one engine. `ends`: the tokens that end an answer. `sampling`:
    of answers that are not held out, which are greedy."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: PromptsConfig,
        config: GenerateConfig,
        sampling: Sampling,
        ends: Collection[int],
    ) -> None:
        self._tokenizer, self._prompts, self._config = tokenizer, prompts, config
        self._template = Template(tokenizer, dict(prompts.template_kwargs))
        self._sampling, self._ends = sampling, ends

    async def line(self, engine: Engine, record: Record) -> Line:
        """Have one record answered. Raises DataError where it is a bad one and `prompts.on_bad` is stop."""
        line = Line(at=record.at, source=record.source, tally=Tally(conversations=1))
        try:
            if isinstance(record.content, BadSample):
                raise UnusableError(record.content.reason, record.content.detail)
            line.record = await self._converse(engine, record, record.content, line)
            line.tally.answered = int(line.record is not None)
            if line.record is None and not line.notes:
                line.notes.append(f"{record.place}: held out, and no answer in it is the target's to write")
        except UnusableError as error:
            if self._prompts.on_bad == "stop":
                raise DataError(f"{record.place}: {error} (prompts.on_bad=stop)", "prompts.on_bad") from error
            line.notes.append(f"{record.place}: {error}")
        return line

    async def _converse(self, engine: Engine, record: Record, content: Conversation, line: Line) -> object:
        dialogue, turn, longest = content.dialogue(self._template, record.held), 0, self._prompts.max_length
        try:
            prompt = next(dialogue)
            while True:
                tokens = self._encode(prompt)
                limit = min(longest - len(tokens), self._config.max_new_tokens or longest)
                if limit < 1 and not turn:
                    detail = f"a prompt of {len(tokens):,} tokens, and prompts.max_length is {longest:,}"
                    raise UnusableError("overlong", detail)
                written = None
                if limit > 0:
                    seed = (self._config.seed * 1_000_003 + record.at * 61 + turn) % 2**31
                    request = Request(tokens, limit, GREEDY if record.held else self._sampling, seed)
                    written = self._written(await engine.write(request), request, prompt, record.place, line)
                prompt, turn = dialogue.send(written), turn + 1
        except StopIteration as end:
            return end.value

    def _written(self, reply: Reply, request: Request, prompt: str, place: str, line: Line) -> Written | None:
        """A reply as text that training takes to the letter; None for one that says nothing."""
        tally, ids, end = line.tally, reply.token_ids, [] if reply.end is None else [reply.end]
        if ids is not None and ids and ids[-1] in self._ends and reply.finish_reason == "stop":
            ids, end = ids[:-1], ids[-1:]
        text = reply.text if ids is None else self._decode(ids)
        if reply.finish_reason == "error" or not text.strip():
            tally.refused += 1
            line.notes.append(
                f"{place}: {'refused: ' + reply.text if reply.finish_reason == 'error' else 'an empty answer'}"
            )
            return None
        cut = reply.finish_reason == "length"
        closed = self._decode(end) if end else "" if cut else self._template.end
        whole = self._encode(text + closed)
        wrote = whole if ids is None else ids + (end or self._encode(closed))
        tally.finished, tally.cut, tally.tokens = tally.finished + (not cut), tally.cut + cut, tally.tokens + len(wrote)
        again = wrote == whole and (ids is None or self._encode(prompt + text + closed) == request.prompt + whole)
        return Written(text, "length" if cut else "stop", closed, None if again else wrote)

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


class Watch:
    """Counts what is written and looks after it: `tick` is called often, by who waits and by engines that block.
    `report`: told of the tally; what it raises ends the work, and what `held` does before anything is written."""

    def __init__(
        self, name: str, timeout_s: float, report: Callable[[Tally], object], held: Callable[[], None] = lambda: None
    ) -> None:
        self.tally, self._name, self._timeout_s, self._report, self.held = Tally(), name, timeout_s, report, held
        self._tokens = 0
        self._told = dict[str, float]()
        self._trouble = "It has said nothing of what is wrong"
        self.touch()

    def touch(self) -> None:
        self._since = time.monotonic()

    def note(self, trouble: str) -> None:
        """What an engine has met, in words; it goes on."""
        now = time.monotonic()
        if now - self._told.get(trouble, -math.inf) > _TELL_AGAIN_S:
            say(f"{trouble}; trying again")
            self._told[trouble] = now
        self._trouble = trouble

    def alive(self, tokens: int) -> None:
        """The same as `touch` and `tick`, from an engine that blocks. `tokens`: what it has written since."""
        self._tokens += tokens
        self.touch()
        self.tick()

    def tick(self) -> None:
        self._report(replace(self.tally, tokens=max(self.tally.tokens, self._tokens)))  # of unfinished answers, too
        if time.monotonic() - self._since > self._timeout_s:
            raise WorldError(
                f"{self._name} has written no answer for {self._timeout_s:.0f} s (generate.timeout_s). {self._trouble}"
            )


async def attended(engine: Engine, watch: Watch, work: Callable[[], Coroutine[Any, Any, None]], times: int = 1) -> None:
    """Open the engine, have `work` done `times` at once, while `watch` looks after it, and close the engine. Of several
    errors the first is raised."""

    async def attend() -> None:
        while True:
            watch.tick()
            await asyncio.sleep(TICK_S)

    try:
        await engine.open()
        watch.touch()
        async with asyncio.TaskGroup() as group:
            attending = group.create_task(attend())
            await asyncio.wait([group.create_task(work()) for _ in range(times)])
            attending.cancel()
    except ExceptionGroup as several:
        raise several.exceptions[0] from several
    finally:
        await engine.close()


async def write_answers(
    engine: Engine, author: Author, todo: Iterator[Record], done: Collection[int], part: Path, watch: Watch
) -> None:
    """Have all of `todo` answered but those in `done`, and append each to the file `part` at once. Raises ConfigError,
    DataError, WorldError: of the engine, see there; of `watch`."""

    async def converse() -> None:
        for record in todo:
            if record.at not in done:
                line = await author.line(engine, record)
                watch.held()
                file.write(_encoded(line) + b"\n")
                file.flush()  # all of it, or an error
                watch.tally.add(line.tally)
                watch.touch()

    with part.open("ab") as file:
        await attended(engine, watch, converse, engine.concurrency)


def _encoded(line: Line) -> bytes:
    try:
        return msgspec.json.encode(line)
    except UnicodeEncodeError as error:  # a lone surrogate, in a field that is not the conversation's
        notes = [*line.notes, f"a field of the record is not text: {error}"]
        return msgspec.json.encode(Line(at=line.at, source=line.source, tally=Tally(1, refused=1), notes=notes))
