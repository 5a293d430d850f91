# SPDX-License-Identifier: Apache-2.0
"""Draft ranks, here threads that hesitate at random, post receives at the same places among their steps, whenever each
learns of a delivery; and all leave at the same step when one is asked to stop or is cut off."""

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
from specdist.run.feature_source import RemoteSource
from specdist.scheduler.messages import Deliver
from specdist.training.trainer import Course, Trainer, _CutOffError

RANKS, STEPS, TOGETHER = 3, 20, 2


class Items(list[Any]):
    schedule = SimpleNamespace(first_item=0)


class Client:
    """Tells of the deliveries in their order, of some of them at a time."""

    def __init__(self, order: Sequence[int], chance: random.Random):
        self._left, self._chance = [Deliver(item, 0, 0) for item in order], chance
        self.phase, self.lost = "", False

    def poll(self, timeout_s: float) -> list[Deliver]:
        if self.lost:
            raise WorldError("the world has failed")
        time.sleep(self._chance.uniform(0, 0.001))
        count = self._chance.choice((0, 0, 1, 2))
        told, self._left = self._left[:count], self._left[count:]
        return told


class Rank(Trainer):
    """A draft rank without a model. `issued` is what it gives to its GPU."""

    def __init__(
        self, number: int, order: Sequence[int], agreement: threading.Barrier, said: dict[int, tuple[int, ...]]
    ):
        self.issued: list[str] = []
        self.number, self._agreement, self._said = number, agreement, said
        self.client = Client(order, random.Random(number))
        self.items = Items(SimpleNamespace(index=index) for index in range(STEPS * TOGETHER))  # type: ignore[assignment]
        receiver = SimpleNamespace(
            post=lambda item, replica, slot: self.issued.append(f"receive {item.index}"),
            take=lambda item, timeout_s: torch.empty(0),
            release=lambda item, freed: None,
        )
        encoding = SimpleNamespace(
            parcel=lambda item: SimpleNamespace(wire=item, sizes=[0]), decode=lambda parcel, shard, received: received
        )
        self.stop, cpu = StopFlag(), torch.device("cpu")
        self.source = RemoteSource(self.client, receiver, encoding, self.items, self.stop, 20.0, cpu, 0)  # type: ignore[arg-type]

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
            received, course = self._receive_all(range(step * TOGETHER, (step + 1) * TOGETHER), self.stop, due=False)
            if course is Course.STOP:
                return
            for micro in received:
                self.issued.append(f"step {step}")
                self.source.release(micro.item)
                self._agree(Course.GO, micro.item.index)


def play(seed: int, event: tuple[int, str]) -> tuple[list[list[str]], list[_CutOffError]]:
    order = list(range(STEPS * TOGETHER))
    for place in range(0, len(order) - 1, 2):  # replicas overtake each other
        if random.Random(seed + place).random() < 0.5:
            order[place], order[place + 1] = order[place + 1], order[place]
    agreement, said, errors = threading.Barrier(RANKS, timeout=20), dict[int, Any](), list[_CutOffError]()
    ranks = [Rank(number, order, agreement, said) for number in range(RANKS)]

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


@pytest.mark.parametrize("seed", range(3))
def test_all_ranks_issue_the_same_in_the_same_order(seed: int) -> None:
    issued, errors = play(seed, (STEPS, "nothing"))
    assert not errors
    assert issued[0] == issued[1] == issued[2]
    assert len(issued[0]) == 2 * STEPS * TOGETHER
    assert any(
        a.startswith("receive") and b.startswith("step 3") for a, b in zip(issued[0], issued[0][1:], strict=False)
    )


def test_all_stop_before_the_same_step() -> None:
    issued, errors = play(0, (7, "stop"))
    assert not errors
    assert issued[0] == issued[1] == issued[2]
    assert "step 6" in issued[0]
    assert "step 8" not in issued[0]


def test_all_leave_when_one_is_cut_off() -> None:
    issued, errors = play(0, (7, "lost"))
    assert sorted(map(str, errors)) == [*["another draft rank is cut off from the world"] * 2, "the world has failed"]
    assert all("step 6" in one and "step 8" not in one for one in issued)
