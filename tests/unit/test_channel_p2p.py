# SPDX-License-Identifier: Apache-2.0
"""In what order the point-to-point channel issues transfers and waits for them, with transfers that are played.
tests/distributed/test_channel_contract.py moves real rows."""

from __future__ import annotations

import contextlib
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from specdist.channel.base import Wire
from specdist.channel.config import ChannelConfig
from specdist.channel.p2p import P2PReceiver, P2PSender
from specdist.core.errors import WorldError
from specdist.core.launch_env import Attempt, RankFacts
from specdist.core.progress import Cursor
from specdist.core.records import FeatureLayout, Shard, WorkItem
from specdist.core.topology import Link, Topology, WorldConfig
from specdist.world.groups import Groups, World

HOSTS = ("n1", "n2")
TOPOLOGY = Topology.build(WorldConfig(), HOSTS, replicas=1, tp=1, dp=1, cp=1)
ROWS, SLOTS = 4, 6


class Played:
    """Transfers in the order of their issue, and all that is asked of them, in `said`. None ends before `end`."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.ended: set[int] = set()
        self._issued = 0

    def start(self, rows: torch.Tensor, partner: int, group: object) -> PlayedWork:
        number, self._issued = self._issued, self._issued + 1
        self.said.append(f"issue {number}")
        return PlayedWork(self, number)

    def announce(self, index: int) -> None:
        self.said.append(f"announce {index}")

    def end(self, number: int) -> None:
        self.ended.add(number)


class PlayedWork:
    def __init__(self, played: Played, number: int):
        self._played, self._number = played, number

    def is_completed(self) -> bool:
        return self._number in self._played.ended

    def wait(self, timeout: timedelta | None = None) -> None:
        """With a timeout the host waits, as over gloo; without one a stream does, as over NCCL."""
        self._played.said.append(f"{'order behind' if timeout is None else 'wait for'} {self._number}")
        if timeout is not None and not self.is_completed():
            raise RuntimeError("timed out")


class PlayedEvent:
    recorded = False

    def record(self) -> None:
        """On the stream that reads the slot."""
        self.recorded = True


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    played = Played()
    monkeypatch.setattr(dist, "isend", played.start)
    monkeypatch.setattr(dist, "irecv", played.start)
    monkeypatch.setattr(dist, "get_backend", lambda group: "nccl")
    return played


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, played: Played) -> None:
    """The device is played, too: its memory is the host's."""

    class PlayedStream:
        def __init__(self, device: torch.device):
            self.device = device

        def wait_event(self, event: Any) -> None:
            assert isinstance(event, PlayedEvent)
            if event.recorded:  # CUDA waits for nothing where nothing was recorded
                played.said.append("order behind the reads")

    monkeypatch.setattr(Wire, "on_gpu", True)
    monkeypatch.setattr(torch.cuda, "Stream", PlayedStream)
    monkeypatch.setattr(torch.cuda, "Event", PlayedEvent)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())


def make_item(index: int) -> WorkItem:
    return WorkItem(index, Cursor(), Cursor(), (Shard((0,), (ROWS,)),))


def wire(rank: int, timeout_s: float = 20.0) -> Wire:
    facts = RankFacts(rank, 2, local_rank=0, local_world_size=1, host=HOSTS[rank])
    world = World(facts, torch.device("cpu"), HOSTS, (None, None), dist.HashStore(), Attempt("j"))
    link: Any = object()
    groups = Groups("", links={Link(0, 1): link})
    layout = FeatureLayout((0, 1, 2), 4, True, torch.bfloat16)
    return Wire(ChannelConfig(transport="nccl"), TOPOLOGY, world, groups, layout, timeout_s)


def send(sender: P2PSender, index: int) -> None:
    item = make_item(index)
    sender.send(item, sender.buffer(item), slot=0)


@pytest.mark.usefixtures("gpu")
def test_on_a_gpu_sends_are_issued_though_none_has_ended(played: Played) -> None:
    """A buffer's next use is ordered behind its send by the device; the host waits for nothing."""
    sender = P2PSender(wire(0), ROWS, played.announce)
    for index in range(4):
        send(sender, index)
    first, second = ["announce 0", "issue 0"], ["announce 1", "issue 1"]
    third, fourth = ["order behind 0", "announce 2", "issue 2"], ["order behind 1", "announce 3", "issue 3"]
    assert played.said == [*first, *second, *third, *fourth]


def test_on_a_host_as_many_sends_are_issued_ahead_as_there_are_buffers(played: Played) -> None:
    sender = P2PSender(wire(0), ROWS, played.announce)
    send(sender, 0)
    send(sender, 1)
    played.end(0)
    send(sender, 2)
    assert played.said == ["announce 0", "issue 0", "announce 1", "issue 1", "wait for 0", "announce 2", "issue 2"]


@pytest.mark.usefixtures("gpu")
def test_receives_are_posted_for_the_whole_ring_though_none_has_ended(played: Played) -> None:
    receiver = P2PReceiver(wire(1), SLOTS, ROWS, lambda: None)
    for index in range(SLOTS):
        receiver.post(make_item(index), 0, index)
    assert played.said == [f"issue {index}" for index in range(SLOTS)]


@pytest.mark.usefixtures("gpu")
def test_a_slot_is_received_into_again_behind_the_reads_of_it(played: Played) -> None:
    receiver = P2PReceiver(wire(1), SLOTS, ROWS, lambda: None)
    items = [make_item(index) for index in range(SLOTS + 1)]
    for slot, item in enumerate(items[:SLOTS]):
        receiver.post(item, 0, slot)
    played.end(0)
    receiver.take(items[0], timeout_s=20)
    freed: list[int] = []
    receiver.release(items[0], lambda: freed.append(0))
    assert freed == [0]
    played.said.clear()
    receiver.post(items[SLOTS], 0, 0)
    assert played.said == ["order behind the reads", f"issue {SLOTS}"]


@pytest.mark.usefixtures("gpu")
def test_who_does_not_send_is_named(played: Played) -> None:
    receiver = P2PReceiver(wire(1), SLOTS, ROWS, lambda: None)
    item = make_item(0)
    receiver.post(item, 0, 0)
    with pytest.raises(
        WorldError, match=r"did not receive its hidden states of batch 0 from rank 0 \(target replica 0 tp 0, "
    ):
        receiver.take(item, timeout_s=0.05)
