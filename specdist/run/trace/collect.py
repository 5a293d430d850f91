# SPDX-License-Identifier: Apache-2.0
"""`specdist trace RUN_DIR`: puts the parts of a run's ranks together, as far as they are there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from specdist.core.attempts import AttemptRecord, attempts
from specdist.core.errors import InputError
from specdist.core.files import write_atomically
from specdist.run.trace.merge import merge
from specdist.run.trace.part import read_parts


def collect(record: AttemptRecord) -> str | None:
    """Write the timeline of a start of the job; says in words what it holds. None where no rank has recorded a part.

    Raises:
        DataError: a part is none.
    """
    parts = read_parts(record.trace_parts)
    if not parts:
        return None
    timeline = merge(parts)
    write_atomically(record.trace, json.dumps(timeline, separators=(",", ":")) + "\n")
    return _describe(record.trace, timeline["otherData"])


def collect_newest(run_dir: Path, attempt: str | None = None) -> str:
    """The same for the newest start that has a part, or the one called `attempt`.

    Raises:
        InputError: there is none, or no such start.
    """
    begun = attempts(run_dir)
    if attempt is not None and attempt not in (record.name for record in begun):
        names = ", ".join(record.name for record in begun) or "none"
        raise InputError(f"{run_dir} has no start called {attempt}; it has {names}")
    for record in reversed(begun):
        if attempt in (None, record.name) and (words := collect(record)) is not None:
            return words
    raise InputError(
        f"{run_dir} holds no trace{f' of {attempt}' if attempt else ''}: start the job with trace.steps=5, which "
        "records 5 steps of it once it has warmed up (trace.start says from which on)"
    )


def _describe(file: Path, about: dict[str, Any]) -> str:
    missing, known = about["missing_ranks"], [c for c in about["clocks"] if c["error_us"] is not None]
    lines = [
        f"{file}: steps {about['first_step']} to {about['last_step']}, "
        f"{about['ranks'] - len(missing)} of {about['ranks']} ranks; open it at https://ui.perfetto.dev"
    ]
    if missing:
        lines.append(f"  nothing of ranks {', '.join(map(str, missing))}")
    if known:
        lines.append(f"  clocks agree within {max(c['error_us'] for c in known):.0f} us of rank 0's")
    if unknown := [str(c["rank"]) for c in about["clocks"] if c["error_us"] is None]:
        lines.append(f"  by the hosts' wall clocks only, wrong by nobody knows how much: ranks {', '.join(unknown)}")
    if about["dropped_records"]:
        lines.append(f"  {about['dropped_records']:,} records found no room: trace fewer steps")
    return "\n".join(lines)
