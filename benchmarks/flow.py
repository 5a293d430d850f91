# SPDX-License-Identifier: Apache-2.0
"""A world around the real state machine of the scheduler: target replicas, draft ranks and the messages between them,
on a clock of its own. No GPU and no process takes part; a second is whatever the caller takes for one.

Messages of one sender to one receiver keep their order, as ZeroMQ's do; nothing else is ordered.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.measure import count, positive
from specdist.scheduler.messages import Dispatch, Send
from specdist.scheduler.scheduler import Scheduler


@dataclass(frozen=True)
class Case:
    """Replicas, and what they work with. Times are in forwards of a replica of speed 1."""

    speeds: tuple[float, ...]
    slots: int = 16
    """Of a receive ring."""
    pods: int = 1
    """Of draft ranks, each with rings of its own."""
    jitter: float = 0.0
    """Standard deviation of a forward's time over its mean."""
    draft_rate: float = 1.25
    """What the draft side can train over what the replicas would compute at speed 1."""
    transfer: float = 0.1
    message: float = 0.002
    queue_depth: int = 2
    send_buffers: int = 2

    @classmethod
    def of(cls, words: Sequence[str], **rest: Any) -> Case:
        """`words`: speeds, each of one replica, or of n as `SPEEDxN`."""
        pairs = [word.partition("x") for word in words]
        return cls(tuple(speed for one, _, n in pairs for speed in [positive(one)] * count(n or "1")), **rest)

    @property
    def ideal(self) -> float:
        """The share of the full rate at which no replica ever waits."""
        return sum(self.speeds) / len(self.speeds)

    def __str__(self) -> str:
        speeds = ", ".join(f"{count} of speed {speed:g}" for speed, count in Counter(self.speeds).items())
        pods = f", {self.pods} pods" if self.pods > 1 else ""
        return speeds + (f", jitter {self.jitter:.0%}" if self.jitter else "") + pods


CASES = (
    Case((1.0,) * 7 + (0.5,)),
    Case((1.0,) * 7 + (0.25,)),
    Case((1.0,) * 7 + (0.5,), slots=8),
    Case((1.0,) * 12),
    Case((1.0,) * 12, jitter=0.1),
    Case((1.0,) * 12, slots=8),
    Case((1.0,) * 12, slots=8, jitter=0.1),
    Case((1.0,) * 11 + (0.5,), jitter=0.1),
    Case((1.0,) * 60 + (0.5,) * 4, slots=8, jitter=0.1, pods=8),
)
"""Of issue 20 and the review before it: 16 slots are those of configs/qwen3-8b.yaml, 8 those of the default memory."""


TOKENS, TICK = 1000, 1.0
"""Of an item; seconds between two looks at the clock."""


def no_time(*_: int) -> float:
    return 0.0


@dataclass
class Times:
    """How long things take, in seconds. Each function is called once for each occurrence, so it may draw at random."""

    forward: Callable[[int, int], float]
    """Of a replica, for an item."""
    train: Callable[[int, int], float] = no_time
    """A draft rank's step over an item."""
    transfer: Callable[[int, int], float] = no_time
    """Of a replica's item, from the moment at which both ends have begun it."""
    message: Callable[[], float] = lambda: 0.0

    @classmethod
    def of(cls, case: Case, rng: random.Random) -> Times:
        def forward(replica: int, item: int) -> float:
            return max(0.1, rng.gauss(1.0, case.jitter)) / case.speeds[replica]

        step = case.pods / (case.draft_rate * len(case.speeds))
        return cls(forward, lambda *_: step, lambda *_: case.transfer, lambda: case.message)


@dataclass
class Target:
    """A replica: items that it was given, and what its send buffers hold."""

    orders: deque[Dispatch | Send] = field(default_factory=deque)
    issued: deque[int] = field(default_factory=deque)
    """Forwards, of which the first is computed."""
    held: int = 0
    """Buffers in use, those of forwards among them."""
    dispatched: list[int] = field(default_factory=list)
    delivered: list[int] = field(default_factory=list)


class World:
    """Replicas `0 .. replicas - 1` and the draft ranks of `scheduler`, until nothing moves any more. A step begins when
    its `together` items of every pod have arrived."""

    def __init__(
        self,
        scheduler: Scheduler,
        replicas: int,
        times: Times,
        send_buffers: int = 2,
        together: int = 1,
        end: int | None = None,
        in_turn: bool = False,
    ):
        """`end`: one past the last item, as the scheduler knows it; `in_turn`: see `Producer`."""
        self.scheduler, self.times, self.send_buffers = scheduler, times, send_buffers
        self.together, self.end, self.in_turn = together, math.inf if end is None else end, in_turn
        self.pods = scheduler.draft_ranks // max(scheduler.pod_ranks, 1)
        self.now = 0.0
        self.targets = {r: Target() for r in range(replicas)}
        self.dropped = 0
        """Items whose rows were computed in vain."""
        self.arrivals: dict[int, dict[int, float]] = {}
        """When an item's rows were there, by draft rank of its pod."""
        self.trained = [0] * scheduler.draft_ranks
        """Items of the steps that each draft rank has ended, those of other pods among them."""
        self.last: int | None = None
        """After a stop: the last item that is trained on."""
        self.released_at: list[float] = []
        """When each was released by the last draft rank, of the items in the order in which they were."""
        self._free_at = [0.0] * scheduler.draft_ranks
        self._releases: Counter[int] = Counter()
        self._in_slot: dict[tuple[int, int], int] = {}
        self._slot_of: dict[int, int] = {}
        self._drained: list[set[int]] = [set() for _ in range(scheduler.draft_ranks)]
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._ticket = itertools.count()
        self._last: dict[object, float] = defaultdict(float)

    def at(self, time: float, action: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self._events, (time, next(self._ticket), action, args))

    def run(self) -> None:
        """Until nothing happens any more, whether or not the scheduler has come to its end."""
        self._dispatch()
        while self._events:
            if self._events[0][0] > self.now + TICK and not self.scheduler.finished:
                self.now += TICK  # as the server does: what is late is seen by the clock
            else:
                self.now, _, action, args = heapq.heappop(self._events)
                action(*args)
            self._dispatch()

    def lose(self, replica: int, drain: float = 0.0) -> None:
        """`replica` is gone, and the scheduler knows it; what it sent is on its way for `drain` seconds."""
        self.scheduler.drop_replica(replica)
        del self.targets[replica]
        self.at(self.now + drain, self.scheduler.settle_replica, replica)

    def stop(self) -> None:
        """The draft ranks end the steps that one of them has begun, and let go what comes beyond."""
        self.scheduler.stop_now()
        self.last = max(self.trained, default=0) - 1
        self.scheduler.stop_after(self.last)
        for draft in range(self.scheduler.draft_ranks):
            self._train(draft)

    def _message(self, channel: object, action: Callable[..., None], *args: Any) -> None:
        self._last[channel] = max(self._last[channel], self.now + self.times.message())
        self.at(self._last[channel], action, *args)

    def _dispatch(self) -> None:
        for order in self.scheduler.next_orders(self.now):
            if isinstance(order, Dispatch):
                self.targets[order.replica].dispatched.append(order.item)
            else:
                self._use(order.slot, order.item)
            self._message(("target", order.replica), self._receive, order.replica, order)

    def _use(self, slot: int, item: int) -> None:
        if slot < 0:
            return
        place = self.scheduler.pod(item), slot
        earlier = self._in_slot.get(place, item)
        released = self._releases[earlier] == self.scheduler.pod_ranks or self._slot_of.get(earlier) != slot
        assert earlier == item or released, "the slot is in use"
        self._in_slot[place], self._slot_of[item] = item, slot

    def _receive(self, replica: int, order: Dispatch | Send) -> None:
        if replica not in self.targets:
            return
        if isinstance(order, Send) and (order.slot < 0 or not self.in_turn):
            self._obey(replica, order)
        else:
            self.targets[replica].orders.append(order)
        self._begin(replica)

    def _begin(self, replica: int) -> None:
        """The replica issues what comes next, and computes what it has issued."""
        target = self.targets[replica]
        while target.orders:
            order = target.orders[0]
            if isinstance(order, Send):
                self._obey(replica, order)
            elif len(target.issued) < 2 and target.held < self.send_buffers:
                target.held += 1
                target.issued.append(order.item)
                if len(target.issued) == 1:
                    self._compute(replica)
            else:
                return
            target.orders.popleft()

    def _compute(self, replica: int) -> None:
        seconds = self.times.forward(replica, self.targets[replica].issued[0])
        self.at(self.now + seconds, self._end, replica, seconds)

    def _end(self, replica: int, seconds: float) -> None:
        target = self.targets.get(replica)
        if target is None:
            return
        self._message(("computed", replica), self._computed, target.issued.popleft(), replica, seconds)
        if target.issued:
            self._compute(replica)
        self._begin(replica)

    def _computed(self, item: int, replica: int, seconds: float) -> None:
        self.scheduler.on_computed(item, replica, self.now, tokens=TOKENS, seconds=seconds)

    def _obey(self, replica: int, order: Send) -> None:
        if order.slot < 0:
            self.dropped += 1
            self.targets[replica].held -= 1
        else:
            self._message(("computed", replica), self._sent, order.item, replica)

    def _sent(self, item: int, replica: int) -> None:
        message = self.scheduler.on_sent(item, replica, self.now)
        if message is None:
            return
        assert item not in self.arrivals, f"item {item} was delivered twice"
        self.targets[replica].delivered.append(item)
        each, arrivals = self.scheduler.pod_ranks, dict[int, float]()
        first, moved = self.scheduler.pod(item) * each, self.times.transfer(replica, item)
        for draft in range(first, first + each):
            self._last["draft", draft] = max(self._last["draft", draft], self.now + self.times.message())
            arrivals[draft] = self._last["draft", draft] + moved
        self.arrivals[item] = arrivals
        self.at(max(arrivals.values(), default=self.now), self._free_buffer, replica)
        for draft in range(self.scheduler.draft_ranks):
            self._train(draft)

    def _free_buffer(self, replica: int) -> None:
        if replica in self.targets:
            self.targets[replica].held -= 1
            self._begin(replica)

    def _train(self, draft: int) -> None:
        """The draft rank takes what has come, in item order, and says when it is through with each."""
        while self.last is None or self.trained[draft] <= self.last:
            first = self.trained[draft]
            items = range(first, int(min(first + self.together * self.pods, self.end)))
            if not items or not all(item in self.arrivals for item in items):
                return
            for item in items:
                if draft in self.arrivals[item]:
                    self._take(item, draft, self.times.train(draft, item))
            self.trained[draft] = items.stop
        left = (item for item, ranks in self.arrivals.items() if item > self.last and draft in ranks)
        for item in sorted(item for item in left if item not in self._drained[draft]):
            self._drained[draft].add(item)
            self._take(item, draft, 0.0)

    def _take(self, item: int, draft: int, seconds: float) -> None:
        begin = max(self._free_at[draft], self.arrivals[item][draft], self.now)
        self._free_at[draft] = begin + seconds
        self.at(self._free_at[draft], self._train_ended, item, draft)

    def _train_ended(self, item: int, draft: int) -> None:
        self._message(("released", draft), self._release, item, draft)

    def _release(self, item: int, draft: int) -> None:
        self._releases[item] += 1
        if self._releases[item] == self.scheduler.pod_ranks:
            self.released_at.append(self.now)
        self.scheduler.on_released(item, draft, self.now)
