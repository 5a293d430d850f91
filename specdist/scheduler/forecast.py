# SPDX-License-Identifier: Apache-2.0
"""When target replicas will be done with what they have to do, as far as their measured speeds tell."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

from specdist.scheduler.messages import WARM_ITEMS

_WEIGHT = 0.2
"""Of the newest item in the moving averages."""
_OVERDUE = 2.0
_OVERDUE_S = 1.0
"""An item that takes so many times as long as expected, and so many seconds, may be computed elsewhere as well ..."""
_GAIN = 1.5
"""... if waiting for it is expected to take this many times as long."""


@dataclass
class Line:
    items: deque[int] = field(default_factory=deque)
    """To compute, in this order."""
    held: set[int] = field(default_factory=set)
    """Computed, without a slot."""
    since: float = 0.0
    """When it could begin the first of `items`."""
    pods: Collection[int] | None = None
    """Those that it computes for; None: all."""

    def serves(self, pod: int) -> bool:
        return self.pods is None or pod in self.pods


class Forecast:
    """Moving averages of the tokens per second of each replica, and of the tokens of an item.

    A replica of which nothing is known is taken for the mean of the others; while nothing is known at all an item takes
    a second, of whatever length. What is late is expected to take as long again as it is late.
    """

    def __init__(self, lines: dict[int, Line]):
        self._lines = lines
        self._speeds: dict[int, float] = {}
        self._measured: dict[int, int] = {}
        self._tokens = 0.0

    def measure(self, replica: int, tokens: int, seconds: float) -> None:
        """`replica` has computed an item. The first ones compile kernels: each replaces what was known."""
        if not tokens or seconds <= 0:
            return
        count = self._measured[replica] = self._measured.get(replica, 0) + 1
        known = self._speeds.get(replica) if count > WARM_ITEMS else None
        speed = tokens / seconds
        self._speeds[replica] = speed if known is None else known + _WEIGHT * (speed - known)
        self._tokens += (tokens - self._tokens) * (_WEIGHT if self._tokens else 1.0)

    def forget(self, replica: int) -> None:
        self._speeds.pop(replica, None)

    def first(self, depth: int, due: int | None, now: float, but: Collection[int] = ()) -> tuple[int, int] | None:
        """Of the replicas `but` some, with fewer than `depth` items to compute and no rows that wait for a slot, the
        one that would be done first with one more; and how many items the others will be done with before, though they
        have no room for them yet: those whose rows wait get none before `due` is computed, which the draft ranks wait
        for."""
        lines = {replica: line for replica, line in self._lines.items() if replica not in but}
        room = [replica for replica, line in lines.items() if not line.held and len(line.items) < depth]
        if not room:
            return None
        later = min((self._computed_in(due, owner, now) for owner in self._owners(due)), default=0.0)
        times = {}
        for replica, line in self._lines.items():
            free = self._free_in(replica, now)
            each = self._seconds(replica)
            times[replica] = (max(free, later) + each if line.held else free), each
        end, replica = min((sum(times[r]), r) for r in room)
        return replica, sum(max(math.ceil((end - free) / each - 1e-6) - 1, 0) for free, each in times.values())

    def helper(self, depth: int, due: int, pod: int, now: float) -> int | None:
        """Of the replicas for this pod with fewer than `depth` items to compute the one that should be given `due` now,
        for those that have it, or will have room for it, would be done so much later; None if there is none."""
        owners = self._owners(due)
        if len(owners) > 1 or (owners and not self._is_late(owners[0], now)):
            return None
        lines = {replica: line for replica, line in self._lines.items() if line.serves(pod)}
        others = (r for r, line in lines.items() if r not in owners and len(line.items) < depth)
        end, replica = min(((self._end(r, now), r) for r in others), default=(math.inf, -1))
        if owners:
            expected = self._computed_in(due, owners[0], now) / _GAIN
        else:
            busy = (r for r, line in lines.items() if line.items and not line.held)
            expected = min((self._end(r, now) for r in busy), default=math.inf)
        return replica if end < expected else None

    def _owners(self, item: int | None) -> list[int]:
        return [replica for replica, line in self._lines.items() if item in line.items]

    def _computed_in(self, item: int | None, owner: int, now: float) -> float:
        items = self._lines[owner].items
        behind = len(items) - 1 - items.index(item) if item is not None else 0
        return self._free_in(owner, now) - self._seconds(owner) * behind

    def _is_late(self, replica: int, now: float) -> bool:
        limit = max(_OVERDUE * self._seconds(replica), _OVERDUE_S)
        return bool(self._speeds) and now - self._lines[replica].since > limit

    def _seconds(self, replica: int) -> float:
        if not self._speeds:
            return 1.0
        speed = self._speeds.get(replica)
        return self._tokens / (sum(self._speeds.values()) / len(self._speeds) if speed is None else speed)

    def _free_in(self, replica: int, now: float) -> float:
        """Seconds until `replica` could begin one more item."""
        line, each = self._lines[replica], self._seconds(replica)
        return abs(each - (now - line.since)) + each * (len(line.items) - 1) if line.items else 0.0

    def _end(self, replica: int, now: float) -> float:
        """Seconds until `replica` has computed one more item and, again, the rows that it would drop for it."""
        return self._free_in(replica, now) + self._seconds(replica) * (1 + len(self._lines[replica].held))
