# SPDX-License-Identifier: Apache-2.0
"""The control plane: its bytes, its rules without sockets, and servers with clients in threads and processes."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import typing
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import zmq

from specdist.core.attempts import Failure
from specdist.core.clock import clock_offset
from specdist.core.errors import ConfigError, Dismissed, WorldError
from specdist.core.stop import StopReason
from specdist.core.topology import Topology
from specdist.scheduler import messages
from specdist.scheduler.client import ControlClient
from specdist.scheduler.config import ControlConfig
from specdist.scheduler.coordinator import Coordinator, Observer
from specdist.scheduler.messages import (
    Computed,
    DecodeError,
    Deliver,
    Dispatch,
    Failed,
    Goodbye,
    Heartbeat,
    Hello,
    LastItem,
    Message,
    Produced,
    ProducerReport,
    Ready,
    Released,
    Send,
    Sent,
    StartWork,
    Stop,
    StopRequest,
    decode,
    encode,
)
from specdist.scheduler.scheduler import Scheduler
from specdist.scheduler.server import ControlServer
from specdist.scheduler.wire import identity, numbered, prove

QUICK = ControlConfig(heartbeat_s=0.2, silence_s=30.0, load_timeout_s=30.0)
WORLD = Topology("split", ("a", "a", "a", "b", "b", "b", "c"), ((0, 1), (2, 3)), ((4,), (5,), (6,)), 3)
"""Two target replicas of two ranks each, three draft ranks."""


def make_scheduler(topology: Topology = WORLD, **changes: typing.Any) -> Scheduler:
    settings = {"slots": 4, "queue_depth": 2, "timeout": 20.0}
    return Scheduler(draft_ranks=len(topology.draft_ranks), **{**settings, **changes})


def failed(message: str) -> Failed:
    """A rank's word that it failed with a ValueError."""
    return Failed(Failure("error", message, exception="ValueError", traceback="Traceback: of ValueError", time=1.0))


# ---- the bytes


def some_message(cls: type, rng: random.Random) -> Message:
    values = {
        int: lambda: rng.randint(-(2**63), 2**63 - 1),
        float: lambda: rng.uniform(-1e9, 1e9),
        bool: lambda: rng.random() < 0.5,
        str: lambda: "".join(rng.choices("aß漢🙂\n\0", k=rng.randint(0, 40))),
    }

    def value(kind: typing.Any) -> typing.Any:
        if type(None) in typing.get_args(kind):
            return rng.choice([None, value(typing.get_args(kind)[0])])
        if typing.get_origin(kind) is tuple:
            return tuple(value(typing.get_args(kind)[0]) for _ in range(2))
        if typing.get_origin(kind) is typing.Literal:
            return rng.choice(typing.get_args(kind))
        if typing.get_origin(kind) is dict:
            return dict(zip(*(tuple(value(part) for _ in range(2)) for part in typing.get_args(kind)), strict=True))
        if kind is StopReason:
            return rng.choice(list(StopReason))
        return values[kind]() if kind in values else kind(*map(value, typing.get_type_hints(kind).values()))

    return typing.cast(Message, value(cls))


@pytest.mark.parametrize("cls", typing.get_args(Message))
def test_every_message_survives_its_encoding_and_no_damage_goes_unseen(cls: type) -> None:
    rng = random.Random(0)
    for _ in range(20):
        message = some_message(cls, rng)
        payload = encode(message)
        assert decode(payload) == message
        for damaged in (payload[:-1], payload + b"x"):
            with pytest.raises(DecodeError):
                decode(damaged)


def test_random_bytes_raise_decode_error_only() -> None:
    rng = random.Random(0)
    for _ in range(8000):
        payload = bytearray(encode(some_message(rng.choice(typing.get_args(Message)), rng)))
        for _ in range(rng.randrange(1, 4)):
            payload[rng.randrange(len(payload))] = rng.randrange(256)
        try:
            decode(bytes(payload))
        except DecodeError:
            continue
    with pytest.raises(DecodeError, match="no control message"):
        decode(b"")
    with pytest.raises(DecodeError, match="utf-8"):
        decode(encode(Heartbeat(1.0, 2, "phase", "ab"))[:-1] + b"\xff")
    with pytest.raises(DecodeError, match="recursion"):
        decode(encode(Produced(ProducerReport()))[:10] + b"\x81\xa3abc" + b"\x91" * 60000)


def test_a_long_text_keeps_both_ends() -> None:
    text = messages.shorten("ValueError: 漢" + "é" * 9001 + "the last line\udc80")
    assert text.startswith("ValueError: 漢é")
    assert text.endswith("éthe last line?")
    assert "[...]" in text
    assert len(text.encode()) <= messages.MAX_TEXT_BYTES


def test_control_config_is_checked() -> None:
    with pytest.raises(ConfigError, match=r"control\.silence_s"):
        ControlConfig(heartbeat_s=5.0, silence_s=6.0)


# ---- the rules, without sockets


class Office:
    """A coordinator whose messages are collected, with a clock that the test moves."""

    def __init__(
        self,
        scheduler: Scheduler | None,
        topology: Topology = WORLD,
        config: ControlConfig = QUICK,
        observer: Observer | None = None,
    ):
        self.sent: list[tuple[tuple[int, ...], Message]] = []
        self.lost: set[int] = set()
        self.now = 0.0
        self.coordinator = Coordinator(
            scheduler, topology, config, self.send, join_timeout_s=10.0, now=0.0, observer=observer
        )

    def send(self, ranks: Iterable[int], payload: bytes) -> list[int]:
        ranks = tuple(ranks)
        self.sent.append((ranks, decode(payload)))
        return [rank for rank in ranks if rank in self.lost]

    def hear(self, rank: int, *heard: Message) -> list[tuple[tuple[int, ...], Message]]:
        """Apply messages of a rank; returns what was sent in answer."""
        self.sent.clear()
        for message in heard:
            self.coordinator.receive(rank, encode(message), self.now)
        self.coordinator.advance(self.now)
        return list(self.sent)

    def produce(self, item: int, *ranks: int) -> None:
        """The ranks of a replica compute an item, and send it."""
        for message in (Computed(item), Sent(item)):
            for rank in ranks:
                self.hear(rank, message)

    def open(self) -> list[tuple[tuple[int, ...], Message]]:
        answers = []
        for rank in range(len(WORLD.hosts)):
            answers += self.hear(rank, Hello(messages.PROTOCOL_VERSION, 1000 + rank), Ready())
        return answers

    def tick(self, seconds: float, alive: Iterable[int] = ()) -> str:
        """Let time pass with these ranks heard at its end; returns the abort, as a rank would raise it, or nothing."""
        self.now += seconds
        for rank in alive:
            self.coordinator.receive(rank, encode(Heartbeat(0.0, -1, "idle")), self.now)
        self.coordinator.tick(self.now)
        return self.error

    @property
    def error(self) -> str:
        return str(self.coordinator.aborted.error()) if self.coordinator.aborted else ""


def test_work_begins_when_all_are_ready_and_goes_round() -> None:
    office = Office(make_scheduler(end_item=1))
    for rank in range(6):
        assert office.hear(rank, Hello(messages.PROTOCOL_VERSION, 1), Ready()) == []
    assert office.hear(6, Hello(messages.PROTOCOL_VERSION, 1)) == []
    assert office.hear(6, Ready()) == [(tuple(range(7)), StartWork()), ((0, 1), Dispatch(0, 0, 0))]
    assert office.hear(1, Computed(0)) == []
    assert office.hear(0, Computed(0)) == [((0, 1), Send(0, 0, 0))]
    assert office.hear(1, Sent(0)) == []
    assert office.hear(0, Sent(0)) == [((4, 5, 6), Deliver(0, 0, 0))]
    assert office.hear(4, Released(0)) == []
    assert office.hear(6, Released(0)) == []
    answers = office.hear(5, Released(0))
    assert answers[-1] == (tuple(range(7)), Stop())
    assert not office.coordinator.done(0.0)
    first, second = ProducerReport(items=1), ProducerReport(items=0)
    for rank in (2, 3, 1):
        assert office.hear(rank, Produced(second)) == []
    assert office.hear(0, Produced(first)) == [((4,), messages.Reports((second, first)))]
    for rank in range(7):
        assert office.hear(rank, Goodbye()) == []
    assert office.coordinator.done(0.0)
    assert not office.error


def test_a_run_that_is_resumed_at_its_end_starts_before_it_stops() -> None:
    office = Office(make_scheduler(first_item=4, end_item=4))
    everyone = tuple(range(7))
    for rank in range(7):
        assert office.hear(rank, Hello(messages.PROTOCOL_VERSION, 1)) == []
    for rank in range(6):
        assert office.hear(rank, Ready()) == []
    answers = office.hear(6, Ready())
    assert [(ranks, message) for ranks, message in answers if not isinstance(message, messages.Pulse)] == [
        (everyone, StartWork()),
        (everyone, Stop()),
    ]


def test_stop_is_asked_for_by_any_rank_and_decided_by_the_first_draft_rank() -> None:
    office = Office(make_scheduler())
    office.open()
    everyone = tuple(range(7))
    office.produce(0, 0, 1)
    assert office.hear(2, StopRequest(StopReason.TERMINATE)) == [(everyone, StopRequest(StopReason.TERMINATE, 2))]
    assert office.hear(3, StopRequest(StopReason.TERMINATE)) == []  # one word is enough
    assert office.hear(4, LastItem(1)) == []


def test_a_stop_before_the_run_began_dismisses_everyone_also_who_comes_later() -> None:
    early = Office(make_scheduler())
    for rank, heard in ((0, [StopRequest(StopReason.TERMINATE)]), (1, [])):
        [(ranks, told)] = early.hear(rank, Hello(messages.PROTOCOL_VERSION, 1), *heard)
        assert ranks == (rank,)
        assert isinstance(told, messages.Abort)
        with pytest.raises(Dismissed, match=r"before the first step \(SIGTERM on rank 0\)"):
            raise told.error()
    other = Office(make_scheduler())
    other.open()
    other.hear(5, LastItem(1))
    assert "LastItem(item=1) is not for the scheduler, or not from this rank" in other.error


def test_without_a_scheduler_the_last_item_ends_the_run() -> None:
    office = Office(None)
    office.open()
    assert [message for _, message in office.hear(4, LastItem(7))] == [messages.Pulse(messages.Statistics()), Stop()]


@pytest.mark.parametrize(
    ("rank", "message", "text"),
    [
        (4, Computed(0), "it belongs to no target replica"),
        (0, Released(0), "not from this rank"),
        (4, Released(0), "which it does not hold"),
        (2, Dispatch(0, 0, 0), "is not for the scheduler"),
        (2, Goodbye(), "left before the end of the run"),
        (2, Hello(messages.PROTOCOL_VERSION, 7), "two processes say they are this rank: pid 1002 and pid 7"),
        (2, Hello(99, 7), "version 99"),
        (5, failed("bad\nline"), "ValueError: bad\nline"),
    ],
)
def test_what_may_not_be_sent_aborts_and_names_the_sender(rank: int, message: Message, text: str) -> None:
    office = Office(make_scheduler())
    office.open()
    answers = office.hear(rank, message)
    told = [ranks for ranks, answer in answers if isinstance(answer, messages.Abort)]
    assert told == [tuple(office.coordinator.peers.present)]
    assert office.error.startswith(f"rank {rank} (")
    assert text in office.error


def test_the_first_failure_is_the_one_told_also_to_late_comers() -> None:
    office = Office(make_scheduler())
    for rank in range(5):
        office.hear(rank, Hello(messages.PROTOCOL_VERSION, 1))
    office.hear(3, failed("out of memory"))
    assert office.hear(4, failed("a consequence")) == []
    answers, role = office.hear(6, Hello(messages.PROTOCOL_VERSION, 1)), "target replica 1 tp 1"
    assert answers == [
        ((6,), messages.Abort(replace(failed("out of memory").failure, rank=3, role=role, host="b", traceback="")))
    ]
    assert not office.coordinator.done(0.1)
    assert office.coordinator.done(0.3)  # one heartbeat of grace


def test_all_ranks_know_of_a_failure_before_it_is_recorded() -> None:
    """The disk may be full, or slow."""

    class Disk(Observer):
        def failed(self, failure: Failure) -> None:
            told.extend(rank for ranks, message in office.sent if isinstance(message, messages.Abort) for rank in ranks)

    told: list[int] = []
    office = Office(make_scheduler(), observer=Disk())
    office.open()
    office.hear(3, failed("out of memory"))
    assert sorted(told) == list(range(len(WORLD.hosts)))


def test_ranks_that_do_not_come_up_are_named() -> None:
    office = Office(make_scheduler())
    for rank in (0, 1, 3, 4, 5):
        office.hear(rank, Hello(messages.PROTOCOL_VERSION, 1))
    assert office.tick(9.0, (0, 1, 3, 4, 5)) == ""
    error = office.tick(2.0, (0, 1, 3, 4, 5))
    assert "2 of 7 ranks did not join the control plane in 10 s" in error
    assert "rank 2 (target replica 1 tp 0, host a) has sent nothing in 11 s" in error
    assert "rank 6 (draft dp 2 cp 0, host c)" in error


def test_ranks_that_never_become_ready_are_named_with_their_phase() -> None:
    office = Office(make_scheduler())
    for rank in range(7):
        office.hear(rank, Hello(messages.PROTOCOL_VERSION, 1))
        if rank != 3:
            office.hear(rank, Ready())
    office.hear(3, Heartbeat(4.0, -1, "loading the target"))
    assert office.tick(29.0, (0, 1, 2, 4, 5, 6)) == ""
    error = office.tick(2.0, (0, 1, 2, 4, 5, 6))
    assert error.startswith("rank 3 (target replica 1 tp 1, host b): 1 of 7 ranks not ready after 30 s")
    assert "phase 'loading the target' for 35 s" in error


def test_a_silent_rank_is_named() -> None:
    office = Office(make_scheduler(timeout=1000.0))
    office.open()
    office.hear(5, Heartbeat(1.0, 2, "backward item 3"))
    alive = [rank for rank in range(7) if rank != 5]
    assert office.tick(30.0, alive) == ""
    error = office.tick(2.0, alive)
    assert error.startswith("rank 5 (draft dp 1 cp 0, host b): silent for more than 30 s")
    assert "last message 32 s ago, phase 'backward item 3' for 33 s, pid 1005" in error


def test_a_slow_replica_and_a_slow_draft_rank_are_named() -> None:
    office = Office(make_scheduler())
    office.open()
    error = office.tick(21.0, range(7))
    assert "rank 0 (target replica 0 tp 0, host a): target replica 0 has been computing batch 0 for 21 s" in error
    assert "rank 1 (target replica 0 tp 1, host a) last message 0 s ago, phase 'idle'" in error

    office = Office(make_scheduler())
    office.open()
    office.hear(0, Computed(0))  # the other rank of the replica has not
    assert office.tick(21.0, range(7)).startswith("rank 1 (target replica 0 tp 1, host a): target replica 0 has been")

    office = Office(make_scheduler(end_item=1))
    office.open()
    office.hear(0, Computed(0))
    office.hear(1, Computed(0), Sent(0))
    assert "rank 0 (target replica 0 tp 0, host a): target replica 0 has been sending" in office.tick(21.0, range(7))

    office = Office(make_scheduler(end_item=2))
    office.open()
    office.produce(0, 0, 1)
    office.produce(1, 2, 3)
    office.hear(4, Released(0))
    error = office.tick(21.0, range(7))
    assert error.startswith(
        "rank 5 (draft dp 1 cp 0, host b): has not released batch 0 for 21 s (limit 20 s); 1 others"
    )
    assert "rank 6" in error


def test_in_a_common_hang_the_rank_in_a_rare_phase_comes_first() -> None:
    office = Office(make_scheduler(end_item=1))
    office.open()
    office.produce(0, 0, 1)
    office.tick(21.0 - 1.0, range(7))
    for rank in range(7):
        office.coordinator.receive(rank, encode(Heartbeat(1.0, -1, "backward" if rank != 5 else "take")), office.now)
    error = office.tick(1.0)
    assert "no other has either" in error
    assert error.index("rank 5 (draft dp 1 cp 0, host b) last message") < error.index(
        "rank 4 (draft dp 0 cp 0, host b) last"
    )


def test_a_rank_that_is_gone_failed_before_the_one_that_says_so() -> None:
    office = Office(make_scheduler())
    office.open()
    office.lost.add(6)
    office.hear(5, failed("Connection closed by peer"))
    assert office.error.startswith("rank 6 (draft dp 2 cp 0, host c): the connection to it is lost")


def test_who_cannot_be_reached_after_the_end_is_lost_unless_its_goodbye_is_read_next() -> None:
    office = Office(make_scheduler(end_item=1))
    office.open()
    office.produce(0, 0, 1)
    for rank in (4, 5, 6):
        office.hear(rank, Released(0))
    assert office.sent[-1] == (tuple(range(7)), Stop())
    office.lost |= {0, 6}
    assert office.tick(1.0, range(7)) == ""
    office.hear(0, Goodbye())
    assert "rank 6 (draft dp 2 cp 0, host c): the connection to it is lost" in office.tick(1.0, range(6))


def test_a_stop_request_ends_a_run_that_has_no_trainer_to_decide() -> None:
    topology = Topology("target_only", ("a",) * 7, tuple((rank,) for rank in range(7)), (), 1)
    office = Office(make_scheduler(topology), topology)
    assert [message for _, message in office.open()] == [
        StartWork(),
        *(Dispatch(item, item % 7, 0) for item in range(14)),
    ]
    asked, _, stop = office.hear(1, StopRequest(StopReason.TERMINATE))
    assert asked == (tuple(range(7)), StopRequest(StopReason.TERMINATE, 1))
    assert stop == (tuple(range(7)), Stop())
    assert office.hear(0, Computed(0)) == []
    assert not office.error


def test_a_lost_connection_fails_the_run() -> None:
    office = Office(make_scheduler())
    office.open()
    office.lost.add(6)
    assert "rank 6 (draft dp 2 cp 0, host c): the connection to it is lost" in office.tick(1.0)


# ---- sockets


class Run:
    """A server and clients of its world in this process."""

    def __init__(self, scheduler: Scheduler | None, topology: Topology = WORLD, config: ControlConfig = QUICK):
        self.token, self.config, self.topology = os.urandom(16), config, topology
        self.server = ControlServer("127.0.0.1", self.token, topology, scheduler, config, join_timeout_s=20.0)
        self.server.start()
        self.clients: list[ControlClient] = []

    def client(self, rank: int, **settings: typing.Any) -> ControlClient:
        client = ControlClient(self.server.address, self.token, rank, self.config, **settings)
        self.clients.append(client)
        return client

    def join_all(self) -> list[ControlClient]:
        clients = [self.client(rank) for rank in range(self.topology.world_size)]
        for client in clients:
            client.ready()
        return clients

    def close(self) -> None:
        for client in self.clients:
            client.close()
        self.server.close()


@pytest.fixture
def runs() -> Iterator[typing.Callable[..., Run]]:
    opened: list[Run] = []

    def open_run(*args: typing.Any, **settings: typing.Any) -> Run:
        opened.append(Run(*args, **settings))
        return opened[-1]

    yield open_run
    for run in opened:
        run.close()


def collect(client: ControlClient, count: int, timeout_s: float = 60.0) -> list[Message]:
    """What came until there were `count` messages."""
    seen: list[Message] = []
    deadline = time.monotonic() + timeout_s
    while len(seen) < count and time.monotonic() < deadline:
        seen += client.poll(0.5)
    return seen


def wait_error(client: ControlClient, timeout_s: float = 60.0) -> str:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            client.poll(0.5)
        except WorldError as error:
            return str(error)
    raise AssertionError("no failure has come")


def test_any_rank_may_ask_what_time_it_is_on_rank_0(runs):
    run = runs(make_scheduler())
    clients = run.join_all()
    for client in (clients[0], clients[6]):
        readings = [client.ask_clock(20.0) for _ in range(20)]
        assert all(r.asked <= r.told <= r.answered for r in readings)  # one process has one clock
        assert clock_offset(readings).offset == 0
    assert run.server.peers.malformed == 0
    clients[3].fail(ValueError("a defect"))
    wait_error(clients[6])
    with pytest.raises(WorldError, match=r"rank 3 .*a defect"):
        clients[6].ask_clock(20.0)


def test_while_its_process_is_suspended_no_rank_counts_as_silent(runs, monkeypatch):
    """Nor does what they held up count as theirs: all may have been suspended, as a batch system does it."""
    run = runs(make_scheduler())
    clients = run.join_all()
    now, passed = time.monotonic, [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now() + passed[0])
    for _ in range(2):
        passed[0] += 5000.0
        until = now() + 1.5  # longer than the server takes to look for the silent
        while now() < until:
            for client in clients:
                client.poll(0.05)
    run.server.check()


def be_target(run: Run, rank: int) -> list[int]:
    place = run.topology.target_place(rank)
    assert place is not None
    computed: list[int] = []
    with run.client(rank) as client:
        client.ready()
        while True:
            for message in client.poll(10.0):
                if isinstance(message, Stop):
                    return computed
                if isinstance(message, Dispatch):
                    assert message.replica == place.replica
                    client.phase = f"forward item {message.item}"
                    computed.append(message.item)
                    client.send(Computed(message.item))
                if isinstance(message, Send) and message.slot >= 0:
                    client.send(Sent(message.item))


def be_draft(run: Run, rank: int, last: int | None = None) -> list[int]:
    """Trains on what is delivered, in item order, after items have arrived in any; ends the run after item `last`."""
    draft = run.topology.draft_ranks.index(rank)
    trained: list[int] = []
    arrived: set[int] = set()
    with run.client(rank) as client:
        client.ready()
        while True:
            for message in client.poll(10.0):
                if isinstance(message, Stop):
                    assert not arrived
                    return trained
                if isinstance(message, Deliver):
                    assert message.item not in arrived
                    arrived.add(message.item)
            while len(trained) in arrived or (arrived and last is not None and len(trained) > last):
                arrived.remove(item := min(arrived))
                client.send(Released(item))
                trained.append(item)
                if item == last and draft == 0:
                    client.send(LastItem(last))


@pytest.mark.parametrize("last", [None, 20])
def test_a_world_of_threads_computes_and_trains_every_item_once(
    runs: typing.Callable[..., Run], last: int | None
) -> None:
    items = 60
    run = runs(make_scheduler(end_item=items if last is None else None))
    with ThreadPoolExecutor(7) as pool:
        targets = [pool.submit(be_target, run, rank) for rank in WORLD.target_ranks]
        drafts = [pool.submit(be_draft, run, rank, last) for rank in WORLD.draft_ranks]
        computed = [future.result(timeout=60) for future in targets]
        trained = [future.result(timeout=60) for future in drafts]
    run.server.join(10.0)
    run.server.check()
    assert computed[0] == computed[1]
    assert computed[2] == computed[3]
    assert set(trained[0]) == set(trained[1]) == set(trained[2]) <= {*computed[0], *computed[2]}
    final = run.clients[0].statistics
    assert final.slots == 4
    if last is None:
        assert trained[0] == list(range(items)) == sorted(computed[0] + computed[2])
        assert final.released == final.dispatched == items
    else:
        assert trained[0][: last + 1] == list(range(last + 1))
        assert len(trained[0]) <= last + 1 + 4  # what had a slot in the ring when the word came


def test_messages_keep_their_order(runs: typing.Callable[..., Run]) -> None:
    items = 500
    topology = Topology("split", ("a", "b"), ((1,),), ((0,),), 1)
    run = runs(make_scheduler(topology, slots=items, queue_depth=items, end_item=items), topology)
    draft, target = run.join_all()
    assert collect(target, items) == [Dispatch(item, 0, 0) for item in range(items)]
    for item in range(items):
        target.send(Computed(item))
    assert collect(target, items) == [Send(item, 0, item) for item in range(items)]
    for item in range(items):
        target.send(Sent(item))
    assert collect(draft, items) == [Deliver(item, 0, item, number=item) for item in range(items)]
    for item in range(items):
        draft.send(Released(item))
    assert collect(target, 1) == [Stop()]


def test_an_empty_poll_returns_in_time(runs: typing.Callable[..., Run]) -> None:
    client = runs(None).client(0)
    began = time.monotonic()
    assert client.poll(0.2) == []
    assert client.poll(0.0) == []
    assert 0.19 < time.monotonic() - began < 10.0


def await_refusals(run: Run, count: int) -> None:
    deadline = time.monotonic() + 60
    while run.server.peers.refused < count:
        assert time.monotonic() < deadline, f"{run.server.peers.refused} refusals instead of {count}"
        time.sleep(0.02)


class Recorder:
    """Stands between a rank and its server, and keeps the bytes that the rank sends."""

    def __init__(self, address: str):
        host, port = address.removeprefix("tcp://").split(":")
        self._server, self._listener = (host, int(port)), socket.create_server(("127.0.0.1", 0))
        self.address = "tcp://127.0.0.1:" + str(self._listener.getsockname()[1])
        self.sent, self.away = b"", socket.socket()
        self.lose: bool | None = None  # what comes next from the rank (True) or the server (False)
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            rank, _ = self._listener.accept()
            self.away = socket.create_connection(self._server)
            threading.Thread(target=self._pass, args=(self.away, rank, False), daemon=True).start()
            threading.Thread(target=self._pass, args=(rank, self.away, True), daemon=True).start()

    def _pass(self, source: socket.socket, destination: socket.socket, keep: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if self.lose == keep:
                    self.lose = None
                    continue
                destination.sendall(data)
                self.sent += data if keep else b""
        for end in (source, destination):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def recorded(run: Run, config: ControlConfig = QUICK) -> tuple[Recorder, ControlClient, ControlClient]:
    """Rank 1 behind a recorder, and rank 0, at work."""
    recorder = Recorder(run.server.address)
    client, other = ControlClient(recorder.address, run.token, 1, config), run.client(0)
    run.clients.append(client)
    for each in (client, other):
        each.ready()
    assert client.expect(StartWork, 20.0) is not None
    return recorder, client, other


def test_a_rank_that_is_ready_waits_for_the_others(runs: typing.Callable[..., Run]) -> None:
    assert {client.phase for client in runs(None).join_all()} == {"waiting for the other ranks"}


def test_strangers_and_garbage_change_nothing(runs: typing.Callable[..., Run]) -> None:
    run = runs(None)
    clients = run.join_all()
    host, port = run.server.address.removeprefix("tcp://").split(":")
    context = zmq.Context()
    stranger = context.socket(zmq.DEALER)  # another secret, and rank 2's identity
    prove(stranger, os.urandom(16))
    plain = context.socket(zmq.DEALER)  # none at all
    keyless = context.socket(zmq.DEALER)  # knows the server's public key only
    prove(keyless, run.token)
    keyless.curve_publickey, keyless.curve_secretkey = zmq.curve_keypair()
    for dealer in (stranger, plain, keyless):
        refused = run.server.peers.refused
        dealer.setsockopt(zmq.IDENTITY, identity(2))
        dealer.connect(run.server.address)
        with contextlib.suppress(zmq.Again):  # it may have been refused already
            dealer.send(encode(failed("me too")), zmq.NOBLOCK)
        await_refusals(run, refused + 1)
    refused = run.server.peers.refused
    for garbage in (b"GET / HTTP/1.1\r\n\r\n" * 100, b"\xff" + bytes(8) + b"\x7f\x03\x00NULL", os.urandom(4096)):
        with socket.create_connection((host, int(port))) as raw:
            raw.sendall(garbage)
    await_refusals(run, refused + 1)
    context.destroy(linger=0)
    clients[1].send(StopRequest(StopReason.USER1))
    assert collect(clients[2], 1) == [StopRequest(StopReason.USER1, 1)]


def test_recorded_frames_sent_again_and_forged_ones_are_refused(runs: typing.Callable[..., Run]) -> None:
    topology = Topology("split", ("a", "b"), ((1,),), ((0,),), 1)
    run = runs(None, topology)
    recorder, client, other = recorded(run, replace(QUICK, heartbeat_s=10.0))  # what a new connection may take
    client.send(StopRequest(StopReason.USER1))
    assert collect(other, 1) == [StopRequest(StopReason.USER1, 1)]
    assert encode(StopRequest(StopReason.USER1)) not in recorder.sent
    host, port = run.server.address.removeprefix("tcp://").split(":")
    with socket.create_connection((host, int(port))) as raw:  # the whole connection once more
        raw.sendall(recorder.sent)
        await_refusals(run, 1)
    recorder.away.sendall(recorder.sent[recorder.sent.rindex(b"\x07MESSAGE") - 2 :])  # a frame once more, in its midst
    await_refusals(run, 2)
    assert collect(client, 1) == [StopRequest(StopReason.USER1, 1)]
    assert collect(other, 1, 0.5) == []
    client.check()
    other.check()


@pytest.mark.parametrize("of_the_rank", [True, False])
def test_messages_that_are_lost_are_missed(runs: typing.Callable[..., Run], of_the_rank: bool) -> None:
    run = runs(None, Topology("split", ("a", "b"), ((1,),), ((0,),), 1))
    recorder, _, other = recorded(run)
    recorder.lose = of_the_rank
    lost = "messages of it were lost" if of_the_rank else "did not reach rank 1: they were lost with the connection"
    assert re.match(rf"rank 1 \(target replica 0 tp 0, host b\): .*{lost}", wait_error(other), re.DOTALL)


def test_malformed_bytes_of_a_rank_are_counted_and_survived(runs: typing.Callable[..., Run]) -> None:
    run = runs(None)
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.IDENTITY, identity(3))
    prove(dealer, run.token)
    dealer.connect(run.server.address)
    client = run.client(0)
    count = itertools.count()

    def send(payload: bytes) -> None:
        dealer.send(numbered(next(count), payload))

    for payload in (
        b"",
        b"\xff" * 100,
        encode(Computed(1))[:-1],
        encode(StopRequest(StopReason.USER1)) + b"y",
        b"p" * 60000,
    ):
        send(payload)
    dealer.send_multipart([encode(Ready()), b"a second frame"])
    send(encode(Hello(messages.PROTOCOL_VERSION, 5)))
    send(encode(StopRequest(StopReason.USER2)))
    with pytest.raises(Dismissed, match="SIGUSR2 on rank 3"):
        collect(client, 1)
    assert run.server.peers.malformed == 5
    assert run.server.peers.refused == 1
    send(encode(Goodbye()))
    context.destroy(linger=100)


def test_a_failure_reaches_everyone_and_names_its_rank(runs: typing.Callable[..., Run]) -> None:
    run = runs(make_scheduler())
    clients = [run.client(rank) for rank in range(6)]
    failing = run.client(6)
    assert failing.poll(0.3) == []
    failing.__exit__(ValueError, ValueError("loss is NaN"), None)
    text = "rank 6 (draft dp 2 cp 0, host c): ValueError: loss is NaN"
    for client in clients:
        assert wait_error(client) == text
        with pytest.raises(WorldError):
            client.send(Ready())
        client.close()
    with pytest.raises(WorldError, match="loss is NaN"):
        run.server.check()
    with pytest.raises(WorldError, match="loss is NaN"):
        run.server.join(10.0)


def test_on_abort_is_called_while_the_rank_is_busy(runs: typing.Callable[..., Run]) -> None:
    run = runs(None)
    told: list[str] = []
    event = threading.Event()

    def on_abort(error: WorldError) -> None:
        told.append(str(error))
        event.set()

    busy = run.client(0, on_abort=on_abort)
    other = run.client(1)
    time.sleep(0.3)
    other.fail(RuntimeError("gone wrong"))
    assert event.wait(60.0)
    assert told == ["rank 1 (target replica 0 tp 1, host a): RuntimeError: gone wrong"]
    with pytest.raises(WorldError):
        busy.check()


def test_a_failure_ends_a_long_poll_at_once(runs: typing.Callable[..., Run]) -> None:
    run = runs(None)
    waiting, other = run.client(0), run.client(1)
    assert waiting.poll(0.3) == []
    began = time.monotonic()
    threading.Timer(0.2, other.fail, [RuntimeError("gone wrong")]).start()
    with pytest.raises(WorldError, match="gone wrong"):
        waiting.poll(20.0)
    assert time.monotonic() - began < 10.0


def test_an_error_in_the_server_thread_surfaces_everywhere(
    runs: typing.Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = make_scheduler()

    def broken(now: float) -> list[Dispatch | Send]:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(scheduler, "next_orders", broken)
    run = runs(scheduler)
    clients = run.join_all()
    assert "the scheduler failed: ZeroDivisionError: a defect" in wait_error(clients[5])
    with pytest.raises(ZeroDivisionError):
        run.server.join(10.0)


def test_who_poses_as_the_scheduler_is_not_listened_to() -> None:
    with socket.create_server(("127.0.0.1", 0)) as impostor:
        address = f"tcp://127.0.0.1:{impostor.getsockname()[1]}"
        client = ControlClient(address, bytes(16), 1, QUICK)
        connection, _ = impostor.accept()
        connection.sendall(b"HTTP/1.1 200 OK\r\n" * 20)
        assert "rank 0, the scheduler at tcp://127.0.0.1:" in wait_error(client, 20.0)
        client.close()


def test_a_silent_scheduler_is_noticed(runs: typing.Callable[..., Run]) -> None:
    run = runs(None)
    quick = replace(QUICK, silence_s=1.0)
    client = ControlClient(run.server.address, run.token, 7, quick)  # there is no such rank: nobody answers
    run.clients.append(client)
    error = wait_error(client)
    assert "rank 0, the scheduler at tcp://127.0.0.1:" in error
    assert "has sent rank 7 nothing for more than 1 s" in error


def test_a_rank_with_another_secret_learns_it(runs: typing.Callable[..., Run]) -> None:
    run = runs(None)
    client = ControlClient(run.server.address, os.urandom(16), 1, run.config)
    run.clients.append(client)
    assert "does not let rank 1 in: the secret (SPECDIST_TOKEN) is another one there" in wait_error(client)


def test_a_scheduler_that_is_gone_is_noticed_long_before_it_counts_as_silent() -> None:
    run = Run(None)
    client = run.client(1)
    client.poll(0.5)
    run.server.close()
    error = wait_error(client)
    client.close()
    assert "rank 0, the scheduler at tcp://127.0.0.1:" in error
    assert "is gone: the connection to it from rank 1 is lost" in error


def test_close_does_not_wait_for_a_server_that_is_gone() -> None:
    run = Run(None)
    client = run.client(1)
    run.server.close()
    began = time.monotonic()
    client.close()
    client.close()
    assert time.monotonic() - began < 5.0


def test_the_end_of_a_run_waits_for_nobody_who_has_left() -> None:
    """A word to a rank that leaves at this moment stays unsent: closing then took two seconds, or for ever."""
    topology = Topology("split", ("a", "b"), ((0,),), ((1,),), 1)
    with ThreadPoolExecutor(2) as pool:
        for _ in range(200):
            run = Run(make_scheduler(topology, end_item=2), topology)
            for rank in [pool.submit(be_target, run, 0), pool.submit(be_draft, run, 1)]:
                rank.result()
            run.server.join(10.0)
            closing = threading.Thread(target=run.close, daemon=True)
            closing.start()
            closing.join(1.9)
            assert not closing.is_alive()


def test_the_socket_binds_to_one_interface_only() -> None:
    with pytest.raises(ValueError, match="one interface"):
        ControlServer("0.0.0.0", b"", WORLD, None, QUICK, join_timeout_s=1.0)
    with pytest.raises(WorldError, match=r"control socket on 203\.0\.113\.7"):
        ControlServer("203.0.113.7", b"", WORLD, None, QUICK, join_timeout_s=1.0)


PEER = """
import sys, time
from specdist.scheduler.client import ControlClient
from specdist.scheduler.config import ControlConfig
client = ControlClient(sys.argv[1], bytes.fromhex(sys.argv[2]), int(sys.argv[3]), ControlConfig(heartbeat_s=0.2))
client.ready()
client.phase = "forward item 17"
print("up", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("number", "text"),
    [(signal.SIGSTOP, "silent for more than 5 s"), (signal.SIGKILL, "the connection to it is lost")],
)
def test_a_process_that_stops_or_dies_is_named(
    runs: typing.Callable[..., Run], number: signal.Signals, text: str
) -> None:
    topology = Topology("split", ("a", "b"), ((1,),), ((0,),), 1)
    run = runs(None, topology, replace(QUICK, silence_s=5.0))
    mine = run.client(0)
    mine.ready()
    arguments = [sys.executable, "-c", PEER, run.server.address, run.token.hex(), "1"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as peer:
        try:
            assert peer.stdout is not None
            assert peer.stdout.readline() == b"up\n"
            mine.poll(0.5)  # a few of its heartbeats
            os.kill(peer.pid, number)
            error = wait_error(mine)
        finally:
            peer.kill()
    assert error.startswith("rank 1 (target replica 0 tp 0, host b): ")
    assert text in error
    assert "phase 'forward item 17'" in error
    assert f"pid {peer.pid}" in error
