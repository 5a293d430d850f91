# SPDX-License-Identifier: Apache-2.0
"""Who has kept the world waiting: what each item that is sent waits for, and since when."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from specdist.scheduler.forecast import Line


@dataclass(frozen=True)
class Culprit:
    """Who has kept the world waiting: target replicas or draft ranks by number, and since when."""

    role: Literal["target", "draft"]
    indices: tuple[int, ...]
    item: int
    seconds: float
    doing: Literal["computing", "sending", "reading"]
    others: int = 0
    """Draft ranks that have released the item; 0: any of its pod may be the one that hangs."""


@dataclass
class Flight:
    """An item with a slot, from the order to send it until it is released."""

    replica: int
    agreed: tuple[int, ...]
    since: float
    """When it was to be sent, and then when it was delivered."""
    delivered: bool = False
    holders: int = 0
    """A bit for each draft rank that was told and has not released it."""

    @property
    def released(self) -> bool:
        return self.delivered and not self.holders


def slow_target(lines: Mapping[int, Line], flights: Mapping[int, Flight], now: float) -> Culprit | None:
    """The replica that has computed or sent its item for longest."""
    # One whose rows wait for a slot may itself wait for a buffer: whoever holds the slots is to blame.
    since: list[tuple[float, int, int, Literal["computing", "sending"]]] = [
        *((x.since, r, x.items[0], "computing") for r, x in lines.items() if x.items and not x.held),
        *((f.since, f.replica, item, "sending") for item, f in flights.items() if not f.delivered),
    ]
    if not since:
        return None
    began, replica, item, doing = min(since)
    return Culprit("target", (replica,), item, now - began, doing)


def slow_draft(item: int, flight: Flight, ranks: int, seconds: float) -> Culprit:
    """Those of the `ranks` draft ranks of a pod that have not released `item` so many seconds after they could."""
    late = tuple(draft for draft in range(flight.holders.bit_length()) if flight.holders >> draft & 1)
    return Culprit("draft", late, item, seconds, "reading", others=ranks - len(late))
