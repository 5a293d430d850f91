# SPDX-License-Identifier: Apache-2.0
"""Draft ranks, here threads that hesitate at random, post receives at the same places among their steps, whenever each
learns of a delivery, each those of its pod; and all leave at the same step when one is asked to stop or is cut off."""

import random
import threading
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from specdist.core.errors import WorldError
from specdist.core.stop import StopFlag, StopReason
from specdist.prompts.schedule import Schedule
from specdist.run.feature_source import RemoteSource
from specdist.scheduler.messages import Deliver
from specdist.training.trainer import Course, Trainer, _CutOffError
from tests.order import find_circle

RANKS, STEPS, TOGETHER = 4, 20, 2


class Items(list[Any]):
    def __init__(self, pods: int) -> None:
        self.schedule = Schedule(0, 0, STEPS, TOGETHER, pods=pods)
        super().__init__(SimpleNamespace(index=i, pod=i % pods, evaluated=False) for i in range(self.schedule.end_item))


class Client:
    """Tells of the deliveries to a pod in their order, of some of them at a time."""

    def __init__(self, order: Sequence[int], pods: int, pod: int, chance: random.Random, received: set[int]):
        """`received`: the items that some rank has; the one sender to two pods waits for each before the next."""
        self._received, self._one_by_one = received, pods > 1
        every = [Deliver(item, 0, 0, number=number) for number, item in enumerate(order)]
        self._left, self._chance = [delivery for delivery in every if delivery.item % pods == pod], chance
        self.phase, self.lost = "", False

    def poll(self, timeout_s: float) -> list[Deliver]:
        if self.lost:
            raise WorldError("the world has failed")
        time.sleep(self._chance.uniform(0, 0.001))
        count = self._chance.choice((0, 0, 1, 2))
        if self._one_by_one and self._left[:1] and self._left[0].number > len(self._received):
            count = 0
        elif self._one_by_one:
            count = min(count, 1)
        told, self._left = self._left[:count], self._left[count:]
        return told


class Rank(Trainer):
    """A draft rank without a model. `issued` is what it gives to its GPU."""

    def __init__(
        self,
        number: int,
        pods: int,
        order: Sequence[int],
        agreement: threading.Barrier,
        said: dict[int, tuple[int, ...]],
        received: set[int],
    ):
        self.issued: list[str] = []
        self.number, self._agreement, self._said, self._pod = number, agreement, said, number % pods
        self.client = Client(order, pods, self._pod, random.Random(number), received)
        self.items = Items(pods)  # type: ignore[assignment]
        receiver = SimpleNamespace(
            post=lambda item, replica, slot: (self.issued.append(f"receive {item.index}"), received.add(item.index)),
            take=lambda item, timeout_s: torch.empty(0),
            release=lambda item, freed: None,
        )
        encoding = SimpleNamespace(
            parcel=lambda item: SimpleNamespace(wire=item, sizes=[0]), decode=lambda parcel, shard, received: received
        )
        self.stop, place = StopFlag(), (torch.device("cpu"), (self._pod, 0), STEPS * TOGETHER)
        self.source = RemoteSource(self.client, receiver, encoding, self.items, self.stop, 120.0, *place)  # type: ignore[arg-type]

    def _highest(self, *values: int) -> list[int]:
        self._said[self.number] = values
        self._agreement.wait()
        found = [max(column) for column in zip(*self._said.values(), strict=True)]
        self._agreement.wait()
        return found

    def receive(self, item: Any) -> Any:
        return SimpleNamespace(item=item, rows=self.source.take(item))

    def work(self, event: tuple[int, str]) -> None:
        """All steps, until the ranks agree to leave; at the step of `event` something happens to rank 1."""
        for step in range(STEPS):
            if self.number == 1 and step == event[0]:
                self.stop.request(StopReason.TERMINATE) if event[1] == "stop" else setattr(self.client, "lost", True)
            received, course = self._receive_all(self.items.schedule.training(step), self.stop, due=False)
            if course is Course.STOP:
                return
            for micro in received:
                self.issued.append(f"step {step}")
                self.source.release(micro.item)
                self._agree(Course.GO, micro.item.index)


def deliveries(seed: int, pods: int) -> list[int]:
    order = list(range(STEPS * TOGETHER * pods))
    for place in range(0, len(order) - 1, 2):  # replicas overtake each other
        if random.Random(seed + place).random() < 0.5:
            order[place], order[place + 1] = order[place + 1], order[place]
    return order


def play(seed: int, event: tuple[int, str], pods: int = 1) -> tuple[list[list[str]], list[_CutOffError]]:
    order = deliveries(seed, pods)
    agreement, said, errors = threading.Barrier(RANKS, timeout=120), dict[int, Any](), list[_CutOffError]()
    received = set[int]()
    ranks = [Rank(number, pods, order, agreement, said, received) for number in range(RANKS)]

    def body(rank: Rank) -> None:
        try:
            rank.work(event)
        except _CutOffError as error:
            errors.append(error)

    threads = [threading.Thread(target=body, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [rank.issued for rank in ranks], errors


def same(issued: Sequence[object]) -> bool:
    return all(one == issued[0] for one in issued)


@pytest.mark.parametrize("seed", range(3))
def test_all_ranks_issue_the_same_in_the_same_order(seed: int) -> None:
    issued, errors = play(seed, (STEPS, "nothing"))
    assert not errors
    assert same(issued)
    assert len(issued[0]) == 2 * STEPS * TOGETHER
    assert any(
        a.startswith("receive") and b.startswith("step 3") for a, b in zip(issued[0], issued[0][1:], strict=False)
    )


def test_two_pods_receive_their_own_up_to_the_same_delivery() -> None:
    """Else a step, in which all are, could wait for what one sender sends to a pod behind what the other awaits."""
    issued, errors = play(1, (STEPS, "nothing"), pods=2)
    assert not errors
    for pod in (0, 1):
        assert same(issued[pod::2])
        received = [line for line in issued[pod] if line.startswith("receive")]
        assert sorted(received) == sorted(f"receive {item}" for item in range(pod, 2 * STEPS * TOGETHER, 2))
    operations = {
        rank: [f"link {rank}" if line.startswith("receive") else "draft" for line in lines]
        for rank, lines in enumerate(issued)
    }
    sender = [f"link {rank}" for item in deliveries(1, 2) for rank in range(RANKS) if rank % 2 == item % 2]
    assert not find_circle(operations | {RANKS: sender})


def test_all_stop_before_the_same_step() -> None:
    issued, errors = play(0, (7, "stop"))
    assert not errors
    assert same(issued)
    assert "step 6" in issued[0]
    assert "step 8" not in issued[0]


def test_who_was_suspended_while_it_waited_goes_on_waiting_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as a batch system, or a terminal's Ctrl-Z, has suspended all of them."""
    passed, step, real = [0.0], [5000.0], time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: real() + passed[0])
    rank = Rank(0, 1, [0], threading.Barrier(1), {}, set())
    told = iter([[], [Deliver(0, 0, 0, number=0)]])

    def poll(timeout_s: float) -> list[Deliver]:
        passed[0] += step[0]
        return next(told, [])

    rank.client.poll = poll  # type: ignore[method-assign]
    assert rank.source._await_more(0)  # noqa: SLF001
    rank.source._known.clear()  # noqa: SLF001
    step[0] = 2.0
    with pytest.raises(WorldError, match="no target replica delivered batch 0 within 120 s"):
        rank.source._await_more(0)  # noqa: SLF001


def test_all_leave_when_one_is_cut_off() -> None:
    issued, errors = play(0, (7, "lost"))
    assert sorted(map(str, errors)) == [
        *["another draft rank is cut off from the world"] * (RANKS - 1),
        "the world has failed",
    ]
    assert all("step 6" in one and "step 8" not in one for one in issued)
