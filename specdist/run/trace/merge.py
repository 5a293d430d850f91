# SPDX-License-Identifier: Apache-2.0
"""The parts of all ranks as one timeline in the Chrome trace event format, which Perfetto opens.

A rank is a process of the timeline; its threads, its device and each of its links are tracks. An arrow leads from a
send to the receive of the same rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from specdist.run.trace.arrows import Event, Slice, join, slice_event, us
from specdist.run.trace.part import Part, Span

_FIRST_TRACKS = ("host", "device")
_TRANSFER = ("item", "source", "destination", "bytes")
"""What the two ends of a transfer have in common."""


@dataclass(frozen=True)
class _Clock:
    """How a part's times become rank 0's. `error`: ns, None where nobody knows."""

    offset: int
    error: int | None
    how: str


def merge(parts: Sequence[Part]) -> dict[str, Any]:
    """The timeline of the parts that are there, as the value of a JSON file; times are in µs from the first event."""
    clocks = _clocks(parts)
    starts = [span.began + clocks[p.rank].offset for p in parts for span in p.spans]
    starts += [count.time + clocks[p.rank].offset for p in parts for count in p.counts]
    zero = min(starts, default=0)
    names: list[Event] = []
    events: list[Event] = []
    transfers: dict[tuple[Any, ...], dict[str, Slice]] = defaultdict(dict)
    for part in parts:
        shift = clocks[part.rank].offset - zero
        names += _metadata(part.rank, "process_name", part.label, part.rank)
        for tid, (track, spans) in enumerate(_lanes(part.spans), start=1):
            names += _metadata(part.rank, "thread_name", track, tid, tid)
            for span in spans:
                at = Slice(part.rank, tid, span.began + shift, max(span.ended, span.began + 1) + shift)
                events.append(slice_event(at, span.name, "transfer" if "source" in span.args else track, span.args))
                if "source" in span.args:
                    transfers[tuple(span.args[key] for key in _TRANSFER)][span.name] = at
        for count in part.counts:
            common = {"name": count.name, "ph": "C", "pid": part.rank}
            events.append({**common, "ts": us(count.time + shift), "args": count.values})
    for number, ((item, _, _, size), ends) in enumerate(transfers.items()):
        if ends.keys() >= {"send", "receive"}:
            events += join(number, ends["send"], ends["receive"], item, size)
    events.sort(key=lambda event: event["ts"])
    return {"traceEvents": names + events, "displayTimeUnit": "ms", "otherData": _about(parts, clocks)}


def _clocks(parts: Sequence[Part]) -> dict[int, _Clock]:
    asked = {p.rank: _Clock(p.clock.offset, p.clock.error, "control plane") for p in parts if p.clock is not None}
    of_host = {p.host: asked[p.rank] for p in parts if p.rank in asked}
    known = next((p for p in parts if p.rank in asked), None)
    clocks = {}
    for part in parts:
        if part.rank in asked:
            clocks[part.rank] = asked[part.rank]
        elif part.host in of_host:
            clocks[part.rank] = _Clock(of_host[part.host].offset, of_host[part.host].error, "another rank of the host")
        else:
            reference = known or parts[0]
            offset = 0 if known is None else asked[known.rank].offset
            clocks[part.rank] = _Clock(offset + part.wall_ns - reference.wall_ns, None, "wall clocks")
    return clocks


def _lanes(spans: Iterable[Span]) -> list[tuple[str, list[Span]]]:
    """The tracks and their spans. The format wants the slices of a track to lie one after another or inside each other,
    so transfers that overlap on a link get a further track."""
    tracks: dict[str, list[Span]] = defaultdict(list)
    for span in sorted(spans, key=lambda s: (s.began, -s.ended)):
        tracks[span.track].append(span)
    lanes = []
    for track in sorted(tracks, key=lambda t: (_FIRST_TRACKS.index(t) if t in _FIRST_TRACKS else len(t), t)):
        for number, lane in enumerate(_split(tracks[track], nested=not track.startswith("link"))):
            lanes.append((track if number == 0 else f"{track} ({number + 1})", lane))
    return lanes


def _split(spans: Sequence[Span], nested: bool) -> list[list[Span]]:
    lanes: list[list[Span]] = []
    open_spans: list[list[Span]] = []
    for span in spans:
        for lane, stack in zip(lanes, open_spans, strict=True):
            while stack and stack[-1].ended <= span.began:
                stack.pop()
            if not stack or (nested and span.ended <= stack[-1].ended):
                lane.append(span)
                stack.append(span)
                break
        else:
            lanes.append([span])
            open_spans.append([span])
    return lanes


def _metadata(rank: int, name: str, text: str, place: int, tid: int = 0) -> list[Event]:
    """The name of a process or thread of the timeline, and its place among them."""
    kind = name.removesuffix("_name")
    common = {"ph": "M", "ts": 0, "pid": rank, "tid": tid}
    return [
        {"name": name, "args": {"name": text}, **common},
        {"name": f"{kind}_sort_index", "args": {"sort_index": place}, **common},
    ]


def _about(parts: Sequence[Part], clocks: Mapping[int, _Clock]) -> dict[str, Any]:
    """What one has to know of the timeline to judge it."""
    there = {part.rank for part in parts}
    return {
        "first_step": parts[0].first_step,
        "last_step": parts[0].last_step,
        "ranks": parts[0].ranks,
        "missing_ranks": [rank for rank in range(parts[0].ranks) if rank not in there],
        "dropped_records": sum(part.dropped for part in parts),
        "clocks": [
            {
                "rank": part.rank,
                "offset_us": clocks[part.rank].offset / 1e3,
                "error_us": None if (error := clocks[part.rank].error) is None else error / 1e3,
                "by": clocks[part.rank].how,
                "device_error_us": part.device_error_ns / 1e3,
            }
            for part in parts
        ],
    }
