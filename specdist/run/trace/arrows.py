# SPDX-License-Identifier: Apache-2.0
"""What one sees of a transfer once both ends of it are known: since when both were there, and an arrow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

Event = dict[str, Any]


class Slice(NamedTuple):
    """A slice of the timeline: its rank, its track, and its time in ns."""

    rank: int
    tid: int
    began: int
    ended: int


def us(ns: int) -> float:
    """The format's unit, to the ns."""
    return round(ns / 1e3, 3)


def slice_event(at: Slice, name: str, category: str, args: Mapping[str, Any]) -> Event:
    return {
        "name": name, "cat": category, "ph": "X", "ts": us(at.began), "dur": us(at.ended - at.began),
        "pid": at.rank, "tid": at.tid, "args": args,
    }  # fmt: skip


def join(number: int, send: Slice, receive: Slice, item: int, size: int) -> list[Event]:
    """The events of a transfer besides its two slices.

    An end that is there first waits for the other one. `moving`, inside either slice, is what is left of it: from when
    both were there. The arrow leads from the send to the moving of the receive: Perfetto takes the slice that begins
    first for the beginning of an arrow, and a receive is often posted before the send is issued.
    """
    events = []
    both = max(send.began, receive.began) + 1
    for end in (send, receive):
        if both < end.ended:
            args = {"item": item, "bytes": size, "GB/s": round(size / (end.ended - both), 3)}
            events.append(slice_event(end._replace(began=both), "moving", "transfer", args))
    for phase, end, moment in (("s", send, send.began), ("f", receive, receive.ended - 1)):
        arrow = {"name": "features", "cat": "transfer", "ph": phase, "id": number, "ts": us(moment)}
        events.append(arrow | {"pid": end.rank, "tid": end.tid} | ({"bp": "e"} if phase == "f" else {}))
    return events
