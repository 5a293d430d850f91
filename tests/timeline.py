# SPDX-License-Identifier: Apache-2.0
"""What every timeline must be for Perfetto and chrome://tracing to show it right, and how tests look into one."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

Event = dict[str, Any]


def check_format(timeline: dict[str, Any]) -> None:
    """The Chrome trace event format: required keys, order, named tracks, proper nesting, arrows with two ends."""
    events = timeline["traceEvents"]
    named = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    processes = {e["pid"] for e in events if e["name"] == "process_name"}
    shown = [e for e in events if e["ph"] != "M"]
    assert [e["ts"] for e in shown] == sorted(e["ts"] for e in shown)
    for event in shown:
        assert {"name", "ph", "ts", "pid"} <= event.keys(), event
        assert event["ph"] in ("X", "C", "s", "f"), event
        assert event["ts"] >= 0, event
        assert event["pid"] in processes, event
        assert event["ph"] == "C" or (event["pid"], event["tid"]) in named, event
    for track in slices_by_track(timeline).values():
        check_nesting(track)
    check_arrows(timeline)


def slices_by_track(timeline: dict[str, Any]) -> dict[tuple[int, int], list[Event]]:
    tracks: dict[tuple[int, int], list[Event]] = defaultdict(list)
    for event in timeline["traceEvents"]:
        if event["ph"] == "X":
            assert event["dur"] > 0, event
            tracks[event["pid"], event["tid"]].append(event)
    return tracks


def check_nesting(track: list[Event]) -> None:
    """Slices of a track lie one after another or inside each other (to the ns, in which times are given)."""
    inside: list[float] = []
    for event in sorted(track, key=lambda e: (e["ts"], -e["dur"])):
        end = event["ts"] + event["dur"]
        while inside and inside[-1] <= event["ts"] + 1e-4:
            inside.pop()
        assert not inside or end <= inside[-1] + 1e-4, event
        inside.append(end)


def check_arrows(timeline: dict[str, Any]) -> None:
    """Every arrow has one beginning and one end, each in a slice of its track. Perfetto binds them to the innermost
    ones, and lets the arrow begin at the one that begins first."""
    ends: dict[int, list[Event]] = defaultdict(list)
    tracks = slices_by_track(timeline)
    for event in timeline["traceEvents"]:
        if event["ph"] in "sf":
            ends[event["id"]].append(event)
    for pair in ends.values():
        (start,), (end,) = ([e for e in pair if e["ph"] == phase] for phase in "sf")
        assert end["bp"] == "e"
        assert innermost(tracks, start)["ts"] < innermost(tracks, end)["ts"], pair


def innermost(tracks: dict[tuple[int, int], list[Event]], event: Event) -> Event:
    around = [s for s in tracks[event["pid"], event["tid"]] if s["ts"] <= event["ts"] < s["ts"] + s["dur"]]
    return max(around, key=lambda s: s["ts"])


def slices(timeline: dict[str, Any], name: str, rank: int | None = None) -> list[Event]:
    """The slices called `name`, of one rank or of all."""
    found = [e for e in timeline["traceEvents"] if e["ph"] == "X" and e["name"] == name]
    return [e for e in found if rank in (None, e["pid"])]


def arrows(timeline: dict[str, Any]) -> int:
    return sum(e["ph"] == "s" for e in timeline["traceEvents"])
