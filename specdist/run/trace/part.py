# SPDX-License-Identifier: Apache-2.0
"""What one rank has recorded, as it lies in ATTEMPT/trace/rank-N.json: a rank that dies takes nobody else's with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from specdist.core.clock import ClockOffset
from specdist.core.errors import DataError
from specdist.core.files import write_atomically
from specdist.core.trace import Value

FORMAT = 1


class Span(NamedTuple):
    """Something that took time, in ns of the rank's monotonic clock."""

    track: str
    name: str
    began: int
    ended: int
    args: Mapping[str, Value]


class Count(NamedTuple):
    """Quantities at a moment."""

    name: str
    time: int
    values: Mapping[str, int]


@dataclass(frozen=True)
class Part:
    """One rank's part of the timeline.

    Attributes:
        label: the rank's role and coordinates.
        first_step, last_step: the traced steps.
        clock: the way to rank 0's clock, None where it could not be asked (the run had failed).
        wall_ns: the wall clock minus the monotonic one, the way to other hosts' clocks where `clock` is None.
        device_error_ns: how far times of the device may be off, against this rank's own clock.
        dropped: records that found no room.
    """

    rank: int
    ranks: int
    label: str
    host: str
    first_step: int
    last_step: int
    clock: ClockOffset | None
    wall_ns: int
    device_error_ns: int = 0
    dropped: int = 0
    spans: list[Span] = field(default_factory=list)
    counts: list[Count] = field(default_factory=list)

    def write(self, directory: Path) -> None:
        """Raises OSError where the directory cannot be written."""
        directory.mkdir(parents=True, exist_ok=True)
        clock = None if self.clock is None else asdict(self.clock)
        text = json.dumps({"format": FORMAT, **vars(self), "clock": clock}, separators=(",", ":"))
        write_atomically(directory / f"rank-{self.rank}.json", text + "\n")

    @classmethod
    def read(cls, file: Path) -> Part:
        """Raises DataError, naming the file, where it is none of this format."""
        try:
            raw = json.loads(file.read_text())
            if raw.pop("format") != FORMAT:
                raise ValueError("it was written by another version")
            raw["clock"] = raw["clock"] and ClockOffset(**raw["clock"])
            raw["spans"] = [Span(*span) for span in raw["spans"]]
            raw["counts"] = [Count(*count) for count in raw["counts"]]
            return cls(**raw)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{file} is not a rank's part of a trace: {error}") from error


def read_parts(directory: Path) -> list[Part]:
    """The parts that are there, by rank."""
    return sorted((Part.read(file) for file in directory.glob("rank-*.json")), key=lambda part: part.rank)
