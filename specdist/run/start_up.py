# SPDX-License-Identifier: Apache-2.0
"""What the time to the first step of a start went to: ATTEMPT/start-up/rank-N.json (docs/report.md)."""

import importlib
import sys
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from specdist.core.attempts import AttemptRecord
from specdist.core.errors import say
from specdist.core.files import read_json, to_json, write_atomically

_TOLD = 0.05
"""Parts that took less than this share of the whole are told together."""


class Doing(Protocol):
    """Who says what this rank is doing, see `ControlClient.phase`."""

    phase: str


@dataclass(frozen=True)
class Part:
    """What a rank did from `began` on, in seconds since the epoch, until the next part began."""

    what: str
    began: float


@dataclass(frozen=True)
class RankStart:
    rank: int
    role: str
    host: str
    parts: tuple[Part, ...]
    """From the launch on."""
    ended: float
    """When its role's work began."""
    cpu_s: float = 0.0
    """Processor time that the rank had taken until then, which other work on the host does not change."""
    stepped: float | None = None
    """When its first optimizer step was done, with which the last part ends; None before it, and of a target rank."""

    def took(self) -> list[tuple[str, float]]:
        marks = [part.began for part in self.parts] + [self.stepped or self.ended]
        return [(part.what, end - began) for part, (began, end) in zip(self.parts, pairwise(marks), strict=True)]

    def told(self) -> str:
        """The whole in a line, the longest parts first."""
        took = sorted(((seconds, what) for what, seconds in self.took()), reverse=True)
        total = sum(seconds for seconds, _ in took)
        named = [f"{what} {seconds:.1f} s" for seconds, what in took if seconds >= _TOLD * total]
        rest = sum(seconds for seconds, _ in took if seconds < _TOLD * total)
        goal = "to the first step" if self.stepped else "until work began"
        return f"{total:.1f} s {goal}: {', '.join(named)}, other {rest:.1f} s"


class StartUp:
    """The clock of this rank's start, from `parts` on."""

    def __init__(self, *parts: Part) -> None:
        self.parts = [*parts]
        self.kept: RankStart | None = None
        """What is written of it; of the first rank of each role."""
        self._file = Path()
        self._compiled: list[tuple[float, float]] = []
        """When torch.compile began, and its seconds."""

    def begin(self, what: str) -> None:
        """The part that was under way is over."""
        self.parts.append(Part(what, time.time()))

    def write(self, record: AttemptRecord, rank: int, role: str, host: str) -> None:
        """The role's work begins. Keep what came before, if that can be: figures of a start are not worth a run."""
        now, parts, started = time.time(), self.parts, record.started()
        if started is not None:  # clocks of hosts differ
            launch = {"starting the ranks": started.time}
            if started.launched is not None:
                prompts = {"preparing the prompts": started.launched} if started.prompts_s else {}
                launch = prompts | {"launching": started.launched + started.prompts_s} | launch
            marks = [Part(what, min(began, parts[0].began)) for what, began in launch.items()]
            parts = [*marks, *parts]
        self._file = directory(record) / f"rank-{rank}.json"
        self._keep(RankStart(rank, role, host, tuple(parts), now, time.process_time()))

    def stepped(self, evaluated_s: float) -> None:
        """The first optimizer step is done, and began with an evaluation of `evaluated_s` seconds."""
        start, now = self.kept, time.time()
        if start is None:
            return
        judged = start.ended + evaluated_s
        judging = judged - sum(seconds for began, seconds in self._compiled if began < judged)
        stepping = judging + sum(seconds for _, seconds in self._compiled)
        marks = {"evaluating": start.ended, "compiling": judging, "the first step": stepping}
        later = tuple(Part(what, min(began, now)) for what, began in marks.items())
        self._keep(replace(start, parts=start.parts + later, stepped=now))

    def _keep(self, start: RankStart) -> None:
        self.kept = start
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._file, to_json(start))
        except OSError as error:
            say(f"{self._file} cannot be written, and the run goes on: {error}")

    def watch_compiler(self, client: Doing) -> None:
        """Note how long torch.compile takes, and say when it is at work, which may be for minutes."""
        if "torch._dynamo" not in sys.modules:
            return
        handler = importlib.import_module("torch._dynamo.callback").callback_handler
        began, doing = 0.0, ""

        def start(_: object) -> None:
            nonlocal began, doing
            began, doing = time.time(), client.phase
            client.phase = f"compiling ({doing})"

        def end(_: object) -> None:
            client.phase = doing
            self._compiled.append((began, time.time() - began))

        handler.register_start_callback(start)
        handler.register_end_callback(end)


def directory(record: AttemptRecord) -> Path:
    return record.directory / "start-up"


def read_starts(record: AttemptRecord) -> list[RankStart]:
    """The starts that are kept of an attempt, by rank. Raises DataError: a file holds something else."""
    found = [read_json(file, RankStart) for file in directory(record).glob("rank-*.json")]
    return sorted((start for start in found if start is not None), key=lambda start: start.rank)


def last_to_start(record: AttemptRecord) -> RankStart | None:
    """Of the ranks that keep their start the one that came last to its first step, or to its work."""
    return max(read_starts(record), key=lambda start: start.stepped or start.ended, default=None)
