# SPDX-License-Identifier: Apache-2.0
"""What came of the measurements in a directory: its steps, the figures of all training steps, and what else was told.

python -m benchmarks.offline.table runs/offline
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import headline
from benchmarks.measure import table
from benchmarks.step import StepSpeed

LINES = 16
"""Of what a step has printed, at most."""


@dataclass(frozen=True)
class Step:
    """A line of the file `steps`."""

    name: str
    begin: int
    seconds: int
    status: str

    @classmethod
    def read(cls, line: str) -> Step:
        name, begin, seconds, status = line.split("\t")
        return cls(name, int(begin), int(seconds), "limit" if status == "124" else status)


@dataclass(frozen=True)
class Speed:
    """A row of `specdist bench step`, of the step that is called so."""

    name: str
    found: StepSpeed

    def __getattr__(self, name: str) -> Any:
        return getattr(self.found, name)


def printed(path: Path) -> tuple[Any, list[str]]:
    """The JSON that a benchmark begins with, if it does, and the other lines of its output."""
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    try:
        return json.loads(lines[0]), lines[1:]
    except (IndexError, ValueError):
        return None, lines


def render(directory: Path) -> Iterator[str]:
    """A table of all steps, then what they say, of which those of one kind share a table."""
    steps = [Step.read(line) for line in (directory / "steps").read_text().splitlines()]
    yield table({"step": "name", "at, s": "begin", "s": "seconds", "status": "status"}, steps)
    heads, speeds, others = dict[str, list[Any]](), list[Speed](), list[str]()
    for step in steps:
        found, lines = printed(directory / f"{step.name}.out")
        if isinstance(found, dict) and step.name.startswith("headline"):
            for each in [found, *(json.loads(line) for line in lines if line.startswith("{"))]:
                for name, runs in each.items():
                    heads.setdefault(name, []).extend(runs)
        elif isinstance(found, list) and found and "busy_ms" in found[0]:
            speeds += [Speed(step.name, StepSpeed(**row)) for row in found]
        elif lines:
            others.append("\n".join([f"{step.name}:", *lines[-LINES:]]))
    if heads:
        yield headline.render(heads)
    if speeds:
        columns = {
            "": "name", "batch": "batch", "ranks": "ranks", "tokens/s": "tokens_per_s:,.0f", "ms": "ms:.1f",
            "spread": "spread_ms:.1f", "host": "host_ms:.1f", "busy host": "busy_share:.1%", "GiB": "memory_gib:.1f",
            "exposed": "exposed_share:.2%", "slow link": "exposed_share_at_link:.2%", "recompiled": "compilations",
        }  # fmt: skip
        yield table(columns, speeds)
    yield from others


if __name__ == "__main__":
    print("\n\n".join(render(Path(sys.argv[1]))))
