# SPDX-License-Identifier: Apache-2.0
"""How long each part of a rank's start took: ATTEMPT/start-up/rank-N.json, for the report (docs/report.md)."""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from specdist.core.attempts import AttemptRecord
from specdist.core.files import read_json, to_json, write_atomically


@dataclass(frozen=True)
class Part:
    """What a rank did from `began` on, in seconds since the epoch, until the next part began."""

    what: str
    began: float


@dataclass(frozen=True)
class RankStart:
    """The start of one rank, until its role's work began at `ended`."""

    rank: int
    role: str
    host: str
    parts: tuple[Part, ...]
    ended: float


@dataclass
class StartUp:
    """The clock of this rank's start; it begins with the process."""

    parts: list[Part] = field(default_factory=lambda: [Part("importing", psutil.Process().create_time())])

    def begin(self, what: str) -> None:
        """The part that was under way is over."""
        self.parts.append(Part(what, time.time()))

    def write(self, record: AttemptRecord, rank: int, role: str, host: str) -> None:
        """Keep it, if that can be: figures of a start are not worth a run."""
        file = directory(record) / f"rank-{rank}.json"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, to_json(RankStart(rank, role, host, tuple(self.parts), time.time())))
        except OSError as error:
            print(f"specdist: {file} cannot be written, and the run goes on: {error}", file=sys.stderr, flush=True)


def directory(record: AttemptRecord) -> Path:
    return record.directory / "start-up"


def read_starts(record: AttemptRecord) -> list[RankStart]:
    """The starts that are kept of an attempt, by rank. Raises DataError: a file holds something else."""
    found = [read_json(file, RankStart) for file in directory(record).glob("rank-*.json")]
    return sorted((start for start in found if start is not None), key=lambda start: start.rank)
