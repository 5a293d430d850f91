# SPDX-License-Identifier: Apache-2.0
"""A target rank whose main thread computes while its other one sends."""

import threading
from types import SimpleNamespace
from typing import Any

import torch

from specdist.channel.encoding import Plain
from specdist.core.progress import Cursor
from specdist.core.records import FeatureLayout, PackedTokens, Shard, WorkItem
from specdist.run.target_loop import Producer
from specdist.scheduler.messages import Computed, Dispatch, Message, Send, Stop

LAYOUT = FeatureLayout((0,), 4, final=False, dtype=torch.float32)
LIMIT_S = 120.0


class Scheduler:
    """The scheduler's end: has item 0 sent while item 1 is to be computed."""

    phase = ""

    def __init__(self) -> None:
        self.computed = [threading.Event(), threading.Event()]
        self._left: list[tuple[int | None, list[Message]]] = [
            (None, [Dispatch(0, 0, 0)]), (0, [Dispatch(1, 0, 0), Send(0, 0, 0)]), (1, [Send(1, 0), Stop()]),
        ]  # fmt: skip

    def poll(self, timeout_s: float) -> list[Message]:
        first, messages = self._left.pop(0)
        assert first is None or self.computed[first].wait(LIMIT_S)
        return messages

    def send(self, message: Message) -> None:
        assert isinstance(message, Computed)
        self.computed[message.item].set()


class Items(list[WorkItem]):
    """Item 1 is looked up while item 0 is being sent."""

    def __init__(self, sending: threading.Event):
        self.sending = sending
        super().__init__(WorkItem(i, Cursor(), Cursor(), (Shard((i,), (2,)),)) for i in range(2))

    def __getitem__(self, index: Any) -> Any:
        assert index == 0 or self.sending.wait(LIMIT_S)
        return super().__getitem__(index)

    def forget(self, before: int) -> None:
        """Nothing is."""


def test_a_timeline_covers_a_send_that_is_under_way() -> None:
    sending, launched, oldest = threading.Event(), threading.Event(), dict[int, int]()
    sent, dropped = list[int](), list[int]()

    def send(item: WorkItem, rows: torch.Tensor, slot: int) -> None:
        sending.set()
        assert launched.wait(LIMIT_S)
        sent.append(item.index)

    def reach(first: int, newest: int) -> None:
        oldest[newest] = first
        if newest:
            launched.set()

    sender: Any = SimpleNamespace(
        available=True, buffer=lambda item: LAYOUT.empty(item.tokens), send=send, drop=lambda rows: dropped.append(1),
        flush=lambda timeout_s: None, check=lambda: None,
    )  # fmt: skip
    engine: Any = SimpleNamespace(device=torch.device("cpu"), forward=lambda batch, out, final=None: out.zero_())
    prompts: Any = SimpleNamespace(pack=lambda s: PackedTokens.from_documents([torch.zeros(2)], [torch.zeros(2)]))
    profile: Any = SimpleNamespace(ends_at=lambda first: False, reach=reach)
    client, items = Scheduler(), Items(sending)
    producer = Producer(engine, sender, Plain(LAYOUT), client, items, prompts, 0, LIMIT_S, profile, alone=True)  # type: ignore[arg-type]
    assert producer.run().items == 2
    assert (sent, dropped) == ([0], [1])
    assert oldest == {0: 0, 1: 0}
