# SPDX-License-Identifier: Apache-2.0
"""A world around the real state machine of the scheduler: target replicas, draft ranks and the messages between them,
on a clock of its own. No GPU and no process takes part; a second is whatever the caller takes for one.

Messages of one sender to one receiver keep their order, as ZeroMQ's do; nothing else is ordered.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from specdist.scheduler.messages import Deliver
from specdist.scheduler.scheduler import Scheduler


@dataclass(frozen=True)
class Case:
    """Replicas, and what they work with. Times are in forwards of a replica of speed 1."""

    speeds: tuple[float, ...]
    slots: int = 16
    """Of a receive ring."""
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
        return cls(tuple(float(speed) for speed, _, count in pairs for _ in range(int(count or 1))), **rest)

    @property
    def ideal(self) -> float:
        """The share of the full rate at which no replica ever waits."""
        return sum(self.speeds) / len(self.speeds)

    def __str__(self) -> str:
        speeds = ", ".join(f"{count} of speed {speed:g}" for speed, count in Counter(self.speeds).items())
        return speeds + (f", jitter {self.jitter:.0%}" if self.jitter else "")


CASES = (
    Case((1.0,) * 7 + (0.5,)),
    Case((1.0,) * 7 + (0.25,)),
    Case((1.0,) * 7 + (0.5,), slots=8),
    Case((1.0,) * 12),
    Case((1.0,) * 12, jitter=0.1),
    Case((1.0,) * 12, slots=8),
    Case((1.0,) * 12, slots=8, jitter=0.1),
    Case((1.0,) * 11 + (0.5,), jitter=0.1),
)
"""Of issue 20 and the review before it: 16 slots are those of configs/qwen3-8b.yaml, 8 those of the default memory."""


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

        step = 1.0 / (case.draft_rate * len(case.speeds))
        return cls(forward, lambda *_: step, lambda *_: case.transfer, lambda: case.message)


@dataclass
class Target:
    """A replica: items that it was given, and what its send buffers hold."""

    queue: deque[int] = field(default_factory=deque)
    computing: bool = False
    held: int = 0
    """Buffers in use, that of a forward that runs among them."""
    dispatched: list[int] = field(default_factory=list)
    delivered: list[int] = field(default_factory=list)


class World:
    """Replicas `0 .. replicas - 1` and the draft ranks of `scheduler`, until nothing moves any more."""

    def __init__(self, scheduler: Scheduler, replicas: int, times: Times, send_buffers: int = 2):
        self.scheduler, self.times, self.send_buffers = scheduler, times, send_buffers
        self.now = 0.0
        self.targets = {r: Target() for r in range(replicas)}
        self.arrivals: dict[int, list[float]] = {}
        """When an item's rows were there, by draft rank."""
        self.trained = [0] * scheduler.draft_ranks
        self.released_at: list[float] = []
        """When each item was released by the last draft rank, in item order."""
        self._free_at = [0.0] * scheduler.draft_ranks
        self._releases: Counter[int] = Counter()
        self._in_slot: dict[int, int] = {}
        self._events: list[tuple[float, int, Callable[..., None], tuple[int, ...]]] = []
        self._ticket = itertools.count()
        self._last: dict[object, float] = defaultdict(float)

    def at(self, time: float, action: Callable[..., None], *args: int) -> None:
        heapq.heappush(self._events, (time, next(self._ticket), action, args))

    def run(self) -> None:
        self._dispatch()
        while self._events:
            self.now, _, action, args = heapq.heappop(self._events)
            action(*args)
            self._dispatch()

    def lose(self, replica: int) -> None:
        """`replica` is gone, and the scheduler knows it."""
        self.scheduler.drop_replica(replica)
        del self.targets[replica]

    def _message(self, channel: object, action: Callable[..., None], *args: int) -> None:
        self._last[channel] = max(self._last[channel], self.now + self.times.message())
        self.at(self._last[channel], action, *args)

    def _dispatch(self) -> None:
        for message in self.scheduler.next_dispatches(self.now):
            item, replica = message.item, message.replica
            self._use(message.slot, item)
            self.targets[replica].dispatched.append(item)
            self._message(("target", replica), self._receive, replica, item)

    def _use(self, slot: int, item: int) -> None:
        earlier = self._in_slot.get(slot)
        assert earlier in (None, item) or self._releases[earlier] == self.scheduler.draft_ranks, "the slot is in use"
        self._in_slot[slot] = item

    def _receive(self, replica: int, item: int) -> None:
        if replica in self.targets:
            self.targets[replica].queue.append(item)
            self._begin(replica)

    def _begin(self, replica: int) -> None:
        target = self.targets[replica]
        if target.queue and not target.computing and target.held < self.send_buffers:
            target.computing = True
            target.held += 1
            self.at(self.now + self.times.forward(replica, target.queue[0]), self._end, replica)

    def _end(self, replica: int) -> None:
        target = self.targets.get(replica)
        if target is None:
            return
        item = target.queue.popleft()
        target.computing = False
        self._message(("computed", replica), self._computed, item, replica)
        self._begin(replica)

    def _computed(self, item: int, replica: int) -> None:
        message = self.scheduler.on_computed(item, replica, self.now)
        if message is not None:
            self._deliver(message)

    def _deliver(self, message: Deliver) -> None:
        item, replica = message.item, message.replica
        assert item not in self.arrivals, f"item {item} was delivered twice"
        self.targets[replica].delivered.append(item)
        ranks = range(self.scheduler.draft_ranks)
        self.arrivals[item] = []
        moved = self.times.transfer(replica, item)
        for draft in ranks:
            self._last["draft", draft] = max(self._last["draft", draft], self.now + self.times.message())
            self.arrivals[item].append(self._last["draft", draft] + moved)
        self.at(max(self.arrivals[item], default=self.now), self._sent, replica)
        for draft in ranks:
            self._train(draft)

    def _sent(self, replica: int) -> None:
        if replica in self.targets:
            self.targets[replica].held -= 1
            self._begin(replica)

    def _train(self, draft: int) -> None:
        """The draft rank takes what has come, in item order, and says when it is through with each."""
        while (item := self.trained[draft]) in self.arrivals:
            begin = max(self._free_at[draft], self.arrivals[item][draft])
            self._free_at[draft] = begin + self.times.train(draft, item)
            self.trained[draft] += 1
            self.at(self._free_at[draft], self._train_ended, item, draft)

    def _train_ended(self, item: int, draft: int) -> None:
        self._message(("released", draft), self._release, item, draft)

    def _release(self, item: int, draft: int) -> None:
        self._releases[item] += 1
        if self._releases[item] == self.scheduler.draft_ranks:
            self.released_at.append(self.now)
        self.scheduler.on_released(item, draft, self.now)
