# SPDX-License-Identifier: Apache-2.0
"""The parts of all ranks as one timeline in the Chrome trace event format, which Perfetto opens (`specdist trace`).

A rank is a process of the timeline; its threads and the streams of its device are tracks. An arrow leads from a send
to the step of the draft rank that trains on the rows.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from specdist.core import trace
from specdist.core.attempts import AttemptRecord, attempts
from specdist.core.clock import ClockOffset
from specdist.core.errors import DataError, InputError
from specdist.core.files import write_atomically
from specdist.training.profile import PartInfo

Event = dict[str, Any]
_SPANS, _DEVICE_SPANS = "user_annotation", "gpu_user_annotation"
_SHOWN = (_SPANS, _DEVICE_SPANS, "kernel", "gpu_memcpy", "gpu_memset")
"""Categories of torch.profiler's events that are taken over. Operators stay in the ranks' own files: they are many."""


class _Args(msgspec.Struct):
    finished: bool = True


class _Slice(msgspec.Struct):
    """An event of a rank's profile; times in us, those of slices alone matter."""

    ph: str
    name: str = ""
    cat: str = ""
    ts: float = 0.0
    dur: float = 0.0
    tid: int | str = 0
    args: _Args = msgspec.field(default_factory=_Args)


class _ProfileFile(msgspec.Struct):
    """What torch.profiler has written: times count from `baseTimeNanoseconds` of the host's clock."""

    traceEvents: list[_Slice]
    baseTimeNanoseconds: int


def read_parts(directory: Path) -> list[PartInfo]:
    """The parts that are there, by rank. Raises DataError: a part is none."""
    parts = (_read(file, PartInfo) for file in directory.glob("rank-*.json") if not file.name.endswith(".profile.json"))
    return sorted(parts, key=lambda part: part.rank)


def _read(file: Path, kind: type[Any]) -> Any:
    try:
        return msgspec.json.decode(file.read_bytes(), type=kind)
    except (OSError, msgspec.MsgspecError) as error:
        raise DataError(f"{file} is not a rank's part of a trace: {error}") from error


def merge(directory: Path) -> dict[str, Any] | None:
    """The timeline of the parts that are there, as the value of a JSON file; times are in us from the first event.
    Raises DataError: a part is none."""
    parts = read_parts(directory)
    if not parts:
        return None
    names, events = list[Event](), list[Event]()
    for part in parts:
        track = _Tracks(part)
        profile = _read(directory / f"rank-{part.rank}.profile.json", _ProfileFile)
        clock, _ = _offset(part, parts)
        offset = 0 if clock is None else clock.offset
        shift = profile.baseTimeNanoseconds + offset
        slices = (_slice_event(e, part.rank, track.number(e), shift) for e in profile.traceEvents if _is_shown(e))
        first, end = part.items
        events += (event for event in slices if first <= event["args"].get("item", first) < end)
        for moment, counts in part.slots:
            events.append({"name": "slots", "ph": "C", "pid": part.rank, "ts": moment + offset, "args": counts})
        names += track.names()
    zero = min((event["ts"] for event in events), default=0)
    for event in events:
        event["ts"] = (event["ts"] - zero) / 1e3
    _note_speeds(events)
    events += _arrows(events)
    events.sort(key=lambda event: event["ts"])
    return {"traceEvents": names + events, "displayTimeUnit": "ms", "otherData": _about(parts)}


def _is_shown(event: _Slice) -> bool:
    """gloo's own ranges go from the issue of a transfer to when the host waits for it, across all others."""
    return event.cat in _SHOWN and not event.name.startswith("gloo:")


@dataclass
class _Tracks:
    """The tracks of one rank, numbered as they come."""

    part: PartInfo
    numbers: dict[str, int] = field(default_factory=lambda: {"host": 1})

    def number(self, event: _Slice) -> int:
        if event.cat != _SPANS:
            name = f"device, stream {event.tid}"
        else:
            thread = self.part.threads.get(int(event.tid), f"thread {event.tid}")
            name = "host" if thread == "MainThread" else thread.removeprefix("specdist-")
        return self.numbers.setdefault(name, len(self.numbers) + 1)

    def names(self) -> Iterator[Event]:
        rank = self.part.rank
        yield from _metadata(rank, "process", self.part.label, rank)
        for place, (name, tid) in enumerate(sorted(self.numbers.items(), key=lambda t: (t[0] != "host", t[0]))):
            yield from _metadata(rank, "thread", name, place, tid)


def _metadata(rank: int, kind: str, text: str, place: int, tid: int = 0) -> Iterator[Event]:
    """The name of a process or thread of the timeline, and its place among them."""
    common = {"ph": "M", "ts": 0, "pid": rank, "tid": tid}
    yield {"name": f"{kind}_name", "args": {"name": text}, **common}
    yield {"name": f"{kind}_sort_index", "args": {"sort_index": place}, **common}


def _slice_event(event: _Slice, rank: int, tid: int, shift: int) -> Event:
    """Its `ts` in ns of rank 0's clock."""
    name, values = trace.parse(event.name) if event.cat in (_SPANS, _DEVICE_SPANS) else (event.name, {})
    unfinished = {} if event.args.finished else {"unfinished": True}
    return {
        "name": name, "cat": event.cat, "ph": "X", "ts": round(event.ts * 1e3) + shift, "dur": max(event.dur, 0.001),
        "pid": rank, "tid": tid, "args": values | unfinished,
    }  # fmt: skip


def _note_speeds(events: Sequence[Event]) -> None:
    """GB/s of the transfers that both devices have timed, from when both ends were there: the first one waits."""
    sends = {}
    for event in events:
        if event.get("cat") == _DEVICE_SPANS and event["name"] == "send":
            sends[event["args"]["item"], event["pid"], event["args"]["destination"]] = event
    for event in events:
        if event.get("cat") == _DEVICE_SPANS and event["name"] == "receive":
            args = event["args"]
            send = sends.get((args["item"], args["source"], event["pid"]))
            if send is not None:
                moving = event["ts"] + event["dur"] - max(event["ts"], send["ts"])
                args["GB/s"] = round(args["bytes"] / max(moving, 0.001) / 1e3, 3)


def _arrows(events: Sequence[Event]) -> list[Event]:
    hosts = [event for event in events if event.get("cat") == _SPANS]
    uses = {(event["pid"], event["args"]["item"]): event for event in hosts if event["name"] == "loss mask"}
    arrows = []
    for number, send in enumerate(event for event in hosts if event["name"] == "send"):
        use = uses.get((send["args"]["destination"], send["args"]["item"]))
        if use is not None:
            for phase, end, ts in (("s", send, send["ts"]), ("f", use, use["ts"] + use["dur"] / 2)):
                arrow = {"name": "features", "cat": "transfer", "ph": phase, "id": number, "ts": ts}
                arrows.append(arrow | {"pid": end["pid"], "tid": end["tid"]} | ({"bp": "e"} if phase == "f" else {}))
    return arrows


def _offset(part: PartInfo, parts: Sequence[PartInfo]) -> tuple[ClockOffset | None, str]:
    """The way from a part's clock to rank 0's, where one is known, and how it is known."""
    if part.clock is not None:
        return part.clock, "control plane"
    of_host = next((p.clock for p in parts if p.host == part.host and p.clock is not None), None)
    return of_host, "wall clocks" if of_host is None else "another rank of the host"


def _about(parts: Sequence[PartInfo]) -> dict[str, Any]:
    there, clocks = {part.rank for part in parts}, []
    for part in parts:
        clock, how = _offset(part, parts)
        offset_us, error_us = (0.0, None) if clock is None else (clock.offset / 1e3, clock.error / 1e3)
        clocks.append({"rank": part.rank, "offset_us": offset_us, "error_us": error_us, "by": how})
    return {
        "first_step": parts[0].first_step,
        "last_step": parts[0].last_step,
        "ranks": parts[0].ranks,
        "missing_ranks": [rank for rank in range(parts[0].ranks) if rank not in there],
        "clocks": clocks,
    }


def collect(record: AttemptRecord) -> str | None:
    """Write the timeline of a start of the job; says in words what it holds. None where no rank has recorded a part.
    Raises DataError: a part is none."""
    timeline = merge(record.trace_parts)
    if timeline is None:
        return None
    write_atomically(record.trace, json.dumps(timeline, separators=(",", ":")) + "\n")
    about = timeline["otherData"]
    missing, known = about["missing_ranks"], [c for c in about["clocks"] if c["error_us"] is not None]
    lines = [
        f"{record.trace}: steps {about['first_step']} to {about['last_step']}, "
        f"{about['ranks'] - len(missing)} of {about['ranks']} ranks; open it at https://ui.perfetto.dev"
    ]
    if missing:
        lines.append(f"  nothing of ranks {', '.join(map(str, missing))}")
    if known:
        lines.append(f"  clocks agree within {max(c['error_us'] for c in known):.0f} us of rank 0's")
    if unknown := [str(c["rank"]) for c in about["clocks"] if c["error_us"] is None]:
        lines.append(f"  by the hosts' wall clocks only, of unknown error: ranks {', '.join(unknown)}")
    return "\n".join(lines)


def collect_newest(run_dir: Path, attempt: str | None = None) -> str:
    """The same for the newest start that has a part, or the one called `attempt`. Raises InputError: there is none."""
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
