# SPDX-License-Identifier: Apache-2.0
"""What an engine is asked for, what it gives, and how answers are sampled."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from specdist.core.model_config import model_settings
from specdist.generate.config import GenerateConfig


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. None: as whoever serves the model does when it is not told."""

    temperature: float | None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def given(self) -> dict[str, float]:
        """By name what an engine has to be told; all of the tokens (`top_k` 0) are what it samples from anyway."""
        return {
            name: value for name, value in vars(self).items() if value is not None and (name, value) != ("top_k", 0)
        }


GREEDY = Sampling(0.0, 1.0, 0, 0.0, 1.0)


@dataclass(frozen=True)
class Request:
    """One answer to be written.

    Attributes:
        prompt: token ids.
        limit: new tokens at most.
        seed: the answer's own.
    """

    prompt: list[int]
    limit: int
    sampling: Sampling
    seed: int


@dataclass(frozen=True)
class Drafted:
    """What became of drafts. `forwards`: target forwards that verified some. `accepted`: of the draft in every
    position, how many of them accepted it; None where the engine does not say. Engines count drafts behind the end of
    an answer, too."""

    forwards: int
    accepted: list[int] | None = None


@dataclass(frozen=True)
class Reply:
    """What an engine wrote.

    Attributes:
        finish_reason: `stop`, `length`, or `error`: then `text` says why, and it is not asked again.
        token_ids: as written; None where the engine tells no ids, and `text` has the answer.
        end: the token that ended it, where the engine says so beside the ids or the text.
        drafted: what became of the drafts, where some were made and the engine tells of every answer.
    """

    finish_reason: str
    token_ids: list[int] | None = None
    text: str = ""
    end: int | None = None
    drafted: Drafted | None = None


class Engine(Protocol):
    """Writes answers, many at once. `close` frees what it holds."""

    concurrency: int
    """Conversations to have in flight."""

    async def open(self) -> None: ...

    async def write(self, request: Request) -> Reply: ...

    async def close(self) -> None: ...


def sampling_of(config: GenerateConfig, directory: str | Path | None) -> Sampling:
    """As configured, else as generation_config.json of the model `directory` says, else None, as SGLang and vLLM do.
    Without a directory it is left to the server to look there."""
    if config.temperature == 0:
        return GREEDY
    given = {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}
    found = {} if directory is None else model_settings(directory)
    found |= {name: value for name, value in given.items() if value is not None}
    return Sampling(**{name: found.get(name) for name in Sampling.__dataclass_fields__})
