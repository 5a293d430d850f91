# SPDX-License-Identifier: Apache-2.0
"""Which target replica computes which work item, and when: a state machine without I/O, threads or a clock.

Items are dispatched in index order, to the replica with the fewest outstanding ones. Credits bound what is in flight:
an item holds one slot of every draft rank's receive ring from dispatch to release, and slots are freed in item order.

No deadlock: the lowest unreleased item is always dispatched (it was first in line when a slot was free), a replica
computes in the order of dispatch without waiting for the draft side beyond its own send buffers, and every receive has
its slot before the data exists. Every message costs O(1) amortised, apart from a binary search over the replicas.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass
from typing import Literal

from specdist.core.errors import WorldError
from specdist.scheduler.messages import Deliver, Dispatch, Statistics
from specdist.scheduler.slots import Slots


class ProtocolError(WorldError):
    """A message that the protocol does not allow at this point: a defect of its sender."""


@dataclass(frozen=True)
class Culprit:
    """Who has kept the world waiting: target replicas or draft ranks by number, and since when."""

    role: Literal["target", "draft"]
    indices: tuple[int, ...]
    item: int
    seconds: float
    everyone: bool
    """Whether no draft rank has released the item: then any of them may be the one that hangs."""


@dataclass
class _Delivery:
    """A delivered item: since when it is, and how many draft ranks have not released it."""

    since: float
    holders: int


class Scheduler:
    """The state of all items between the first dispatch and the last release.

    Args:
        draft_ranks: number of draft ranks, each with its own ring; 0 where features are dropped (target only).
        slots: slots of every ring.
        queue_depth: items outstanding at a replica.
        timeout: seconds after which `watch` names who holds an item.
        first_item: index of the first item (not 0 after a resume).
        end_item: one past the last item, or None for a stream without an end.
        elastic: whether replicas come and go (two worlds). The run then ends with its last item: what was dispatched
            beyond it is let go, for its replica may be gone.
    """

    def __init__(
        self,
        *,
        draft_ranks: int,
        slots: int,
        queue_depth: int,
        timeout: float,
        first_item: int = 0,
        end_item: int | None = None,
        elastic: bool = False,
    ):
        if min(slots, queue_depth) < 1 or draft_ranks < 0:
            raise ValueError(f"{draft_ranks} draft ranks, {slots} slots, queue {queue_depth}")
        self.draft_ranks, self.timeout = draft_ranks, timeout
        self.slots = Slots(slots)
        self._depth = queue_depth
        self._first = self._next = self._low = first_item
        self._end = end_item
        self._elastic = elastic
        self.cut_short = False
        """Whether a stop has moved its end."""
        self._requeued: list[int] = []
        # Replicas with k items outstanding, sorted, for every k.
        self._room: list[list[int]] = [[] for _ in range(queue_depth + 1)]
        self._outstanding: dict[int, deque[int]] = {}
        self._head_since: dict[int, float] = {}
        self._delivered: dict[int, _Delivery] = {}
        self._next_release = [first_item] * draft_ranks
        self._low_since = 0.0
        self._started: float | None = None
        self._accounted = 0.0
        self._delivered_count = 0
        self._target_wait = self._draft_wait = 0.0

    @property
    def finished(self) -> bool:
        """Whether nothing will be dispatched any more and everything dispatched has been released."""
        if self._elastic:
            return self._end is not None and self._low >= self._end
        return self._low == self._next and not self._work_left

    def next_dispatches(self, now: float) -> list[Dispatch]:
        """Everything that may be dispatched now, in order. Call it after every batch of events."""
        if self._started is None:
            self._started = self._accounted = self._low_since = now
        dispatches: list[Dispatch] = []
        while (replica := self._replica_with_room()) is not None and self._work_left:
            if self._requeued:
                item = self._requeued.pop(0)
                self.slots.renew(item)
            elif self.slots.free:
                item, self._next = self._next, self._next + 1
                self.slots.take(item)
            else:
                break
            self._account(now)
            queue = self._outstanding[replica]
            if not queue:
                self._head_since[replica] = now
            self._move(replica, +1)
            queue.append(item)
            dispatches.append(Dispatch(item, replica, self.slots[item]))
        return dispatches

    def on_computed(self, item: int, replica: int, now: float, agreed: tuple[int, ...] = ()) -> Deliver | None:
        """`replica` has computed `item`; None if it was dropped meanwhile. `agreed` is passed on. Raises ProtocolError:
        `item` is not the oldest one outstanding at `replica`."""
        queue = self._outstanding.get(replica)
        if queue is None:
            return None
        if not queue or queue[0] != item:
            raise ProtocolError(f"target replica {replica} computed batch {item}; outstanding there: {list(queue)}")
        self._account(now)
        self._move(replica, -1)
        queue.popleft()
        self._head_since[replica] = now
        deliver = Deliver(item, replica, self.slots[item], agreed)
        self._delivered[item] = _Delivery(now, self.draft_ranks)
        self._delivered_count += 1
        if not self.draft_ranks:
            self._advance(now)
        return deliver

    def on_released(self, item: int, draft: int, now: float) -> None:
        """Draft rank number `draft` has freed the slot of `item`. Raises ProtocolError: `item` is not delivered, or not
        the next one of this draft rank in item order."""
        delivery = self._delivered.get(item)
        due = self._next_release[draft]
        if delivery is None or due != item:
            state = "delivered" if due in self._delivered else "not delivered yet"
            raise ProtocolError(
                f"draft rank number {draft} released batch {item}; its next one is batch {due}, which is {state}"
            )
        self._next_release[draft] = item + 1
        delivery.holders -= 1
        if not delivery.holders:
            self._advance(now)

    def stop_after(self, item: int) -> None:
        """Dispatch nothing beyond `item`; what already was dispatched still goes its way to the release."""
        if item < self._first - 1:
            raise ProtocolError(f"stop after batch {item}: the first batch is {self._first}")
        self.cut_short |= self._end is None or item + 1 < self._end
        self._end = item + 1 if self._end is None else min(self._end, item + 1)
        if self._elastic:
            self._requeued = [requeued for requeued in self._requeued if not self._needless(requeued)]

    def stop_now(self) -> None:
        """Dispatch nothing more."""
        self.stop_after(self._next - 1)

    @property
    def replicas(self) -> tuple[int, ...]:
        """The replicas that there are."""
        return tuple(self._outstanding)

    def add_replica(self, replica: int) -> None:
        """Give work to one more replica, whose number no other has had."""
        self._outstanding[replica], self._head_since[replica] = deque(), 0.0
        insort(self._room[0], replica)

    def drop_replica(self, replica: int) -> tuple[int, ...]:
        """Forget a replica; its items that were not delivered go back to the front of the line, in item order. Their
        slots stay in doubt (`slots`)."""
        queue = self._outstanding.pop(replica)
        self._room[len(queue)].remove(replica)
        self.slots.doubt(queue, replica)
        self._requeued = sorted([*self._requeued, *(item for item in queue if not self._needless(item))])
        return tuple(sorted(queue))

    def watch(self, now: float) -> Culprit | None:
        """Who has held an item for longer than the timeout since it could start; the longest wait wins."""
        culprits = [c for c in (self._slow_target(now), self._slow_draft(now)) if c and c.seconds > self.timeout]
        return max(culprits, key=lambda c: c.seconds, default=None)

    def statistics(self, now: float) -> Statistics:
        if self._started is not None:
            self._account(now)
        busy = sum(map(len, self._room[1:]))
        return Statistics(
            elapsed_s=0.0 if self._started is None else now - self._started,
            replicas=len(self._outstanding),
            dispatched=self._next - self._first,
            delivered=self._delivered_count,
            released=self._low - self._first,
            computing=busy,
            queued=sum(k * len(replicas) for k, replicas in enumerate(self._room)) - busy,
            slots=self.slots.count,
            target_wait_s=self._target_wait,
            draft_wait_s=self._draft_wait,
        )

    @property
    def _work_left(self) -> bool:
        return bool(self._requeued) or self._end is None or self._next < self._end

    def _needless(self, item: int) -> bool:
        return self._elastic and self._end is not None and item >= self._end

    def _replica_with_room(self) -> int | None:
        for replicas in self._room[: self._depth]:
            if replicas:
                return replicas[0]
        return None

    def _move(self, replica: int, step: Literal[-1, 1]) -> None:
        """Note that `replica` is about to have one more or one less outstanding."""
        count = len(self._outstanding[replica])
        del self._room[count][bisect_left(self._room[count], replica)]
        insort(self._room[count + step], replica)

    def _advance(self, now: float) -> None:
        """Move the low-water mark past every item that is delivered and that no draft rank holds."""
        self._account(now)
        while (lowest := self._delivered.get(self._low)) is not None and not lowest.holders:
            del self._delivered[self._low]
            self.slots.give_back(self._low)
            self._low += 1
            self._low_since = now

    def _account(self, now: float) -> None:
        """Add the time since the last change to the sides that waited in it."""
        passed, self._accounted = now - self._accounted, now
        if self._work_left:
            # Dispatch is greedy, so a replica without work while there is some lacks nothing but credits.
            self._target_wait += passed * len(self._room[0])
        if self.draft_ranks and self._low not in self._delivered and not self.finished:
            self._draft_wait += passed

    def _slow_target(self, now: float) -> Culprit | None:
        heads = [(self._head_since[r], r, queue[0]) for r, queue in self._outstanding.items() if queue]
        if not heads:
            return None
        since, replica, item = min(heads)
        return Culprit("target", (replica,), item, now - since, everyone=False)

    def _slow_draft(self, now: float) -> Culprit | None:
        lowest = self._delivered.get(self._low)
        if lowest is None:
            return None
        late = tuple(d for d, item in enumerate(self._next_release) if item == self._low)
        since = max(lowest.since, self._low_since)
        return Culprit("draft", late, self._low, now - since, everyone=len(late) == self.draft_ranks)
