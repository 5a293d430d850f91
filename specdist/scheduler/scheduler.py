# SPDX-License-Identifier: Apache-2.0
"""Which target replica computes which work item, and when it is sent: a state machine without I/O, threads or a clock.

An item goes to the replica that is expected to be done with it first, by measured speeds. A slow replica therefore gets
an item so far down the line that its turn comes when the rows are there. The pods of draft ranks have the items in
turn. The rows stay in the replica's send buffer until the item has a slot in the receive rings of its pod, lowest item
first; each pod frees its slots in item order.

No deadlock. A pod releases its lowest item, `low`, once the `together` items from it on, and those of the other pods,
are delivered.

1. These items can always have a slot in the rings of their pod. Any other takes one only where more are free than those
   of them lack, so at all times as many are free as they lack: a slot for one of them takes from both; a release of
   `low` gives one back, and lets at most one more item in. (A slot in doubt comes back when its replica is known to be
   gone.)
2. The first of them without a slot, of all pods, is `due`, and is always computed. A replica whose rows wait for a slot
   gets no other work, so it has a send buffer for each item that it was given. While none else computes, and as soon as
   waiting for those that do takes longer, such a one drops its rows, which are computed again, and gets `due`; and so
   do the rows go that a replica computes before `due`.
3. What has a slot is sent without waiting for anything but its receive, and is delivered.

So the lowest `low` is released, after finitely many other orders, for without its release the slots and the buffers run
out.
"""

from bisect import bisect, bisect_left, insort
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

from specdist.core.errors import WorldError
from specdist.scheduler.forecast import Forecast, Line
from specdist.scheduler.messages import Deliver, Dispatch, Send, Statistics
from specdist.scheduler.slots import Slots

_LOOK_S = 0.5
"""How often the clock alone is a reason to look for orders."""
_REACH = 8
"""Items a replica, beyond those that the rings hold: how far down the line the item of a slow one may be."""


class ProtocolError(WorldError):
    """A message that the protocol does not allow at this point: a defect of its sender."""


@dataclass(frozen=True)
class Culprit:
    """Who has kept the world waiting: target replicas or draft ranks by number, and since when."""

    role: Literal["target", "draft"]
    indices: tuple[int, ...]
    item: int
    seconds: float
    doing: Literal["computing", "sending", "reading"] = "reading"
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


class Scheduler:
    """The state of all items between the first dispatch and the last release.

    Args:
        draft_ranks: number of draft ranks, each with its own ring; 0 where features are dropped (target only).
        pods: of draft ranks, as many in each; they have the items in turn.
        slots: slots of every ring.
        queue_depth: items outstanding at a replica, which has a send buffer for each.
        timeout: seconds after which `watch` names who holds an item.
        together: items that the ranks of a pod need at once, those of a step. Fewer than `slots`.
        first_item: index of the first item (not 0 after a resume).
        end_item: one past the last item, or None for a stream without an end.
        elastic: whether replicas come and go (two worlds). The run then ends with its last item: what was sent beyond
            it is let go, for its replica may be gone.
    """

    def __init__(
        self,
        *,
        draft_ranks: int,
        slots: int,
        queue_depth: int,
        timeout: float,
        pods: int = 1,
        together: int = 1,
        first_item: int = 0,
        end_item: int | None = None,
        elastic: bool = False,
    ):
        if min(slots, queue_depth, together, pods) < 1 or draft_ranks < 0 or draft_ranks % pods or together > slots:
            ranks = f"{draft_ranks} draft ranks in {pods} pods"
            raise ValueError(f"{ranks}, {slots} slots for {together} items, queue {queue_depth}")
        self.draft_ranks, self.pod_ranks, self.timeout = draft_ranks, draft_ranks // pods, timeout
        self._pods = [Slots(slots, first_item + pod, pods, together) for pod in range(pods)]
        self._depth, self._together = queue_depth, together
        self._first = self._next = first_item
        self._end = self._data_end = end_item
        self._elastic = elastic
        self._halted = False
        self._waiting: list[int] = []
        """Items before `_next` that nobody has or had computed, sorted."""
        self._lines: dict[int, Line] = {}
        self._forecast = Forecast(self._lines)
        self._ready: dict[int, tuple[int, tuple[int, ...]]] = {}
        """Replica and `agreed` of the items that are computed and have no slot."""
        self._flights: dict[int, Flight] = {}
        self._orders: list[Dispatch | Send] = []
        self._changed, self._looked = True, 0.0
        """Whether there may be orders to give; when that was last looked at."""
        self._low_since = 0.0
        self._started: float | None = None
        self._accounted = 0.0
        self._delivered_count = 0
        self._target_wait = 0.0

    def pod(self, item: int) -> int:
        return (item - self._first) % len(self._pods)

    @property
    def finished(self) -> bool:
        """Whether nothing will be sent any more, and everything that was sent has been released."""
        ended = self._end is not None and self._low >= self._end
        over = (ended or self._halted) and all(flight.released for flight in self._flights.values())
        return over or (ended and self._elastic)

    @property
    def cut_short(self) -> bool:
        """Whether items are left that have not been released."""
        return self._data_end is None or self._low < self._data_end

    def next_orders(self, now: float) -> list[Dispatch | Send]:
        """Everything that replicas are to be told now, in order. Call it after every batch of events, and once a second
        in any case: a replica that is late is seen by the clock."""
        if self._started is None:
            self._started = self._accounted = self._low_since = now
        if not self._changed and now < self._looked + _LOOK_S:
            return []
        self._changed, self._looked = False, now
        self._account(now)
        self._send(now)
        needed = (item for slots in self._pods for item in slots.needed(self._end))
        due = min((item for item in needed if not self._is_computed(item)), default=None)
        if due is not None and not self._halted:
            self._hasten(due, now)
        while self._work_left and (choice := self._choose(due, now)) is not None:
            self._dispatch(*choice, now)
        orders, self._orders = self._orders, []
        return orders

    def on_computed(
        self, item: int, replica: int, now: float, agreed: tuple[int, ...] = (), tokens: int = 0, seconds: float = 0.0
    ) -> None:
        """`replica` has computed `item`, of so many tokens, in so many seconds; `agreed` is passed on.
        Raises ProtocolError: `item` is not the oldest one outstanding at `replica`."""
        line = self._lines.get(replica)
        if line is None:  # it was dropped meanwhile
            return
        if not line.items or line.items[0] != item:
            left = list(line.items)
            raise ProtocolError(f"target replica {replica} computed batch {item}; outstanding there: {left}")
        self._account(now)
        self._changed = True
        self._forecast.measure(replica, tokens, seconds)
        line.items.popleft()
        line.since = now
        if self._is_computed(item):  # another replica was first
            self._orders.append(Send(item, replica))
        elif self.draft_ranks:
            self._ready[item] = replica, agreed
            line.held.add(item)
        else:
            self._orders.append(Send(item, replica))
            self._flights[item] = Flight(replica, agreed, now, delivered=True)
            self._delivered_count += 1
            self._advance(item, now)

    def on_sent(self, item: int, replica: int, now: float) -> Deliver | None:
        """`replica` has sent `item` to its slot; None if it was dropped meanwhile. Raises ProtocolError: not so."""
        if replica not in self._lines:
            return None
        flight = self._flights.get(item)
        if flight is None or flight.replica != replica or flight.delivered:
            raise ProtocolError(f"target replica {replica} sent batch {item}, which it was not to send")
        holders = (1 << self.pod_ranks) - 1 << self.pod(item) * self.pod_ranks
        flight.delivered, flight.since, flight.holders = True, now, holders
        self._delivered_count += 1
        return Deliver(item, replica, self._slots(item)[item], flight.agreed, self._delivered_count - 1)

    def on_released(self, item: int, draft: int, now: float) -> None:
        """Draft rank number `draft` has freed the slot of `item`. Raises ProtocolError: it does not hold it."""
        flight = self._flights.get(item)
        if flight is None or not flight.holders >> draft & 1:
            raise ProtocolError(f"draft rank number {draft} released batch {item}, which it does not hold")
        flight.holders ^= 1 << draft
        if not flight.holders:
            self._advance(item, now)

    def stop_after(self, item: int) -> None:
        """Compute and send nothing beyond `item`; what already has a slot still goes its way to the release."""
        self._changed = True
        if item < self._first - 1:
            raise ProtocolError(f"stop after batch {item}: the first batch is {self._first}")
        self._end = item + 1 if self._end is None else min(self._end, item + 1)
        self._waiting = [waiting for waiting in self._waiting if waiting < self._end]

    def stop_now(self) -> None:
        self._halted = self._changed = True

    @property
    def replicas(self) -> tuple[int, ...]:
        return tuple(self._lines)

    def add_replica(self, replica: int, pods: Collection[int] | None = None) -> None:
        """Give work to one more replica, whose number no other has had. `pods`: that it computes for (None: all)."""
        self._lines[replica] = Line(pods=None if pods is None or len(pods) == len(self._pods) else pods)
        self._changed = True

    def drop_replica(self, replica: int) -> tuple[int, ...]:
        """Forget a replica; returns which of its items are to be computed again. Slots that it may still write to are
        in doubt until `settle_replica`."""
        line = self._lines.pop(replica)
        self._changed = True
        self._forecast.forget(replica)
        sending = [i for i, flight in self._flights.items() if flight.replica == replica and not flight.delivered]
        for item in sending:
            self._slots(item).doubt(item, replica)
            del self._flights[item]
        for item in line.held:
            del self._ready[item]
        return self._put_back({*line.items, *line.held, *sending})

    def settle_replica(self, replica: int) -> None:
        """A replica that was dropped is known to write no more."""
        for slots in self._pods:
            slots.clear(replica)

    def watch(self, now: float) -> Culprit | None:
        """Who has held an item for longer than the timeout since it could start; the longest wait wins."""
        late, lowest = self._slow_targets(now), self._lowest()
        if all(flight and flight.delivered for flight in lowest):  # else the draft ranks wait themselves
            since = max(self._low_since, *(flight.since for flight in lowest if flight))
            holders = self._flights[self._low].holders
            drafts = tuple(draft for draft in range(holders.bit_length()) if holders >> draft & 1)
            late.append(Culprit("draft", drafts, self._low, now - since, others=self.pod_ranks - len(drafts)))
        culprits = [culprit for culprit in late if culprit.seconds > self.timeout]
        return max(culprits, key=lambda culprit: culprit.seconds, default=None)

    def _slow_targets(self, now: float) -> list[Culprit]:
        # One whose rows wait for a slot may itself wait for a buffer: whoever holds the slots is to blame.
        computing = [(r, line) for r, line in self._lines.items() if line.items and not line.held]
        sending = [(item, flight) for item, flight in self._flights.items() if not flight.delivered]
        return [
            *(Culprit("target", (r,), line.items[0], now - line.since, "computing") for r, line in computing),
            *(Culprit("target", (f.replica,), item, now - f.since, "sending") for item, f in sending),
        ]

    def statistics(self, now: float) -> Statistics:
        if self._started is not None:
            self._account(now)
        busy = sum(bool(line.items) for line in self._lines.values())
        return Statistics(
            elapsed_s=0.0 if self._started is None else now - self._started,
            replicas=len(self._lines),
            dispatched=self._next - self._first - len(self._waiting),
            delivered=self._delivered_count,
            released=sum((slots.low - self._first) // len(self._pods) for slots in self._pods),
            computing=busy,
            queued=sum(len(line.items) for line in self._lines.values()) - busy,
            held=len(self._ready),
            slots=sum(slots.count for slots in self._pods),
            free=sum(slots.free for slots in self._pods),
            target_wait_s=self._target_wait,
        )

    def _slots(self, item: int) -> Slots:
        return self._pods[self.pod(item)]

    @property
    def _low(self) -> int:
        return min(slots.low for slots in self._pods)

    @property
    def _work_left(self) -> bool:
        return not self._halted and (bool(self._waiting) or self._end is None or self._next < self._end)

    def _needless(self, item: int) -> bool:
        return self._halted or (self._end is not None and item >= self._end)

    def _is_computed(self, item: int) -> bool:
        return item in self._flights or item in self._ready or item < self._slots(item).low

    def _put_back(self, items: Iterable[int]) -> tuple[int, ...]:
        """Let these items wait for a replica, but for those that are computed or being so; returns the others."""
        back = sorted(
            item
            for item in items
            if not self._is_computed(item)
            and not self._needless(item)
            and not any(item in line.items for line in self._lines.values())
        )
        for item in back:
            insort(self._waiting, item)
        return tuple(back)

    def _send(self, now: float) -> None:
        """Give slots to what is computed, lowest item of a pod first."""
        full = set[int]()
        for item in sorted(self._ready):
            pod = self.pod(item)
            if self._needless(item):
                self._drop(item, now)
            elif pod in full or not self._pods[pod].place(item, self._end):
                full.add(pod)
            else:
                replica, agreed = self._let_go(item, now)
                self._flights[item] = Flight(replica, agreed, now)
                self._orders.append(Send(item, replica, self._pods[pod][item]))

    def _drop(self, item: int, now: float) -> None:
        """Have the rows of `item` dropped, which has no slot."""
        replica, _ = self._let_go(item, now)
        self._orders.append(Send(item, replica))
        self._put_back([item])

    def _let_go(self, item: int, now: float) -> tuple[int, tuple[int, ...]]:
        replica, agreed = self._ready.pop(item)
        line = self._lines[replica]
        line.held.remove(item)
        if not line.held:  # until now it may have waited for a buffer
            line.since = now
        return replica, agreed

    def _dispatch(self, replica: int, place: int, now: float) -> None:
        """Have `replica` compute the item at `place` of those that nobody computes."""
        while len(self._waiting) <= place:
            self._waiting.append(self._next)
            self._next += 1
        self._compute(self._waiting.pop(place), replica, now)

    def _compute(self, item: int, replica: int, now: float) -> None:
        line = self._lines[replica]
        if not line.items:
            line.since = now
        line.items.append(item)
        self._orders.append(Dispatch(item, replica, self._low))

    def _choose(self, due: int | None, now: float) -> tuple[int, int] | None:
        """The replica that is given an item next, and the place of that item among those that nobody computes."""
        beyond, without = self._low + sum(slots.count for slots in self._pods) + _REACH * len(self._lines), set[int]()
        beyond = beyond if self._end is None else min(beyond, self._end)
        while (found := self._forecast.first(self._depth, due, now, without)) is not None:
            replica, place = found
            line = self._lines[replica]
            if place:  # what it has before that one comes first
                place = max(place, bisect(self._waiting, max(line.items, default=-1)))
            while (item := self._at(place)) < beyond and not line.serves(self.pod(item)):
                place += 1
            if item < beyond:
                return replica, place
            if line.pods is None:
                break
            without.add(replica)
        return None

    def _at(self, place: int) -> int:
        return self._waiting[place] if place < len(self._waiting) else self._next + place - len(self._waiting)

    def _hasten(self, due: int, now: float) -> None:
        """See to it that the item which the draft ranks wait for is computed; see the module's docstring."""
        helper = self._forecast.helper(self._depth, due, self.pod(due), now)
        for replica, line in self._lines.items():
            for item in sorted(line.held):
                if replica == helper or (item > due and due in line.items):
                    self._drop(item, now)
        place = bisect_left(self._waiting, due)
        if helper is not None and (due >= self._next or due in self._waiting):
            self._dispatch(helper, place + max(due - self._next, 0), now)
        elif helper is not None:
            self._compute(due, helper, now)

    def _advance(self, item: int, now: float) -> None:
        """Move the low-water mark of the pod of `item` past what is delivered and no draft rank holds."""
        slots, before = self._slots(item), self._low
        while (lowest := self._flights.get(slots.low)) is not None and lowest.released:
            del self._flights[slots.low]
            slots.release_low()
            self._changed = True
        if self._low > before:
            self._low_since = now

    def _account(self, now: float) -> None:
        """Add the time since the last change to what replicas have waited."""
        passed, self._accounted = now - self._accounted, now
        if self._work_left:
            # Dispatch is greedy, so a replica without work while there is some lacks nothing but slots.
            self._target_wait += passed * sum(not line.items for line in self._lines.values())

    def _lowest(self) -> list[Flight | None]:
        """The items that the pods need at once, from the lowest of all on, that will be sent and are not released."""
        items = range(low := self._low, low + self._together * len(self._pods))
        return [
            self._flights.get(item)
            for item in items
            if item == low or (item >= self._slots(item).low and not self._needless(item))
        ]
