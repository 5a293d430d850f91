# SPDX-License-Identifier: Apache-2.0
"""What the scheduler does with target worlds that come and go: rule by rule, without sockets and with a clock that the
test moves."""

from __future__ import annotations

import dataclasses
import random
import stat
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from specdist.channel.config import ChannelConfig
from specdist.core.attempts import Failure
from specdist.core.errors import ConfigError
from specdist.core.progress import Batching, Cursor, Progress
from specdist.core.stop import StopReason
from specdist.core.topology import Topology, WorldConfig
from specdist.draft.config import draft_config
from specdist.job.resume_plan import ResumePlan
from specdist.prompts.corpus import Corpus, Side, make_corpus
from specdist.prompts.schedule import Schedule
from specdist.run.worlds.search import ControlAddress, Rendezvous
from specdist.run.worlds.terms import Terms, common_facts
from specdist.scheduler.config import ControlConfig
from specdist.scheduler.coordinator import Coordinator
from specdist.scheduler.messages import (
    PROTOCOL_VERSION,
    Abort,
    Computed,
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
    RemotePlace,
    Reports,
    RingAddress,
    Send,
    Sent,
    Stop,
    StopRequest,
    Welcome,
    decode,
    encode,
)
from specdist.scheduler.replicas import RemoteRules
from specdist.scheduler.scheduler import Scheduler
from specdist.scheduler.slots import Slots
from tests.unit.prompts_tokenizers import write_store

DRAFT = Topology("split", ("d", "d"), (), ((0,), (1,)), 2)
CONFIG = ControlConfig(heartbeat_s=1.0, silence_s=5.0, replica_timeout_s=20.0)
DRAIN_S = 3.0
START = "start one with `specdist train CONFIG --role target`"
SLOTS = 4
A, B = "a" * 16, "b" * 16
REPORT = ProducerReport(2, 20, 1.0, 2.0)


class Office:
    """The coordinator of a draft world of two ranks, whose messages are collected."""

    def __init__(self, end_item: int = 100):
        self.now, self.sent, self.lost = 0.0, list[tuple[tuple[int, ...], Message]](), set[int]()
        settings = {"slots": SLOTS, "queue_depth": 2, "timeout": 1000.0, "end_item": end_item}
        self.scheduler = Scheduler(draft_ranks=2, elastic=True, **settings)  # type: ignore[arg-type]
        rules = RemoteRules(lambda: "terms", DRAIN_S)
        self.coordinator = Coordinator(
            self.scheduler, DRAFT, CONFIG, self.send, join_timeout_s=10.0, now=0.0, rules=rules
        )
        for rank in (0, 1):
            self.hear(rank, Hello(PROTOCOL_VERSION, 1), Ready())

    def send(self, ranks: Iterable[int], payload: bytes) -> list[int]:
        ranks = tuple(ranks)
        self.sent.append((ranks, decode(payload)))
        return [rank for rank in ranks if rank in self.lost]

    def hear(self, rank: int, *messages: Message) -> list[Message]:
        """Apply messages of a rank; returns what was sent in answer."""
        self.sent.clear()
        for message in messages:
            self.coordinator.receive(rank, encode(message), self.now)
        self.coordinator.advance(self.now)
        return [message for _, message in self.sent]

    def join(
        self, world: str = A, replica: int = 0, tp: int = 0, shares: int = 1, version: int = PROTOCOL_VERSION
    ) -> int:
        rank = self.coordinator.peers.admit(self.now)
        self.hear(rank, Hello(version, 1, RemotePlace(replica, tp, shares, "t", world)))
        return rank

    def pass_time(self, seconds: float, alive: Iterable[int] = (0, 1)) -> None:
        self.now += seconds
        for rank in alive:
            self.coordinator.receive(rank, encode(Heartbeat(0.0, -1, "idle")), self.now)
        self.coordinator.tick(self.now)
        self.sent.clear()
        self.coordinator.advance(self.now)

    def compute(self, rank: int, item: int) -> list[Message]:
        """A replica of one rank computes an item, and sends it where it is told to."""
        self.hear(rank, Computed(item))
        return self.hear(rank, Sent(item))

    def release(self, item: int) -> list[Message]:
        self.hear(0, Released(item))
        return self.hear(1, Released(item))

    def assigned(self) -> list[int]:
        """The items that replicas were told to compute."""
        return [message.item for _, message in self.sent if isinstance(message, Dispatch)]


def test_a_replica_that_joins_is_told_the_terms_and_the_rings_and_given_work():
    office = Office()
    office.hear(0, RingAddress(0, "ring 0"))
    rank = office.join()
    assert (rank, office.sent[0], office.sent[1]) == (2, ((2,), Welcome(2, "terms")), ((2,), RingAddress(0, "ring 0")))
    assert office.hear(1, RingAddress(1, "ring 1")) == [RingAddress(1, "ring 1")]
    assert office.hear(rank, Ready()) == [Dispatch(0, 0, 0), Dispatch(1, 0, 0)]
    assert office.hear(rank, Computed(0)) == [Send(0, 0, 0), Dispatch(2, 0, 0)]
    assert office.hear(rank, Sent(0)) == [Deliver(0, 0, 0)]


def test_an_item_has_arrived_when_all_ranks_of_its_replica_have_written_it():
    office = Office()
    ranks = [office.join(tp=t, shares=2) for t in (0, 1)]
    assert office.hear(ranks[0], Ready()) == []
    assert office.hear(ranks[1], Ready())[0] == Dispatch(0, 0, 0)
    assert office.sent[0][0] == tuple(ranks)
    assert office.hear(ranks[1], Computed(0), Computed(1)) == []
    assert office.hear(ranks[0], Computed(0))[0] == Send(0, 0, 0)
    assert office.sent[0][0] == tuple(ranks)
    assert office.hear(ranks[0], Sent(0)) == []
    assert office.hear(ranks[1], Sent(0)) == [Deliver(0, 0, 0)]


@pytest.mark.parametrize("how", ["lost", "silent", "failed", "left", "slow", "nonsense"])
def test_a_replica_that_is_gone_is_dropped_and_others_compute_what_it_owes(how, capsys):
    office = Office()
    first, second = office.join(A), office.join(B)
    office.hear(first, Ready())
    if how == "silent":
        office.pass_time(4.0, alive=(0, 1, second))
    office.hear(second, Ready())
    office.hear(second, Computed(2))
    match how:
        case "lost":
            office.lost.add(first)
            office.pass_time(1.0)
        case "silent":
            office.pass_time(2.0, alive=(0, 1, second))
        case "failed":
            office.hear(first, Failed(Failure("error", "broken", exception="ValueError")))
        case "left":
            office.hear(first, Goodbye())
        case "slow":
            office.scheduler.timeout = 3.0
            office.pass_time(4.0, alive=(0, 1, first, second))
        case "nonsense":
            office.hear(first, LastItem(0))
    assert not office.coordinator.aborted
    assert "computed again: batches 0, 1" in capsys.readouterr().err.splitlines()[-1]
    assert office.scheduler.replicas == (1,)
    assert office.hear(first, Computed(0)) == []  # too late
    office.hear(second, Computed(3))
    assert office.assigned()[:1] in ([0], [1])


def test_slots_in_doubt_are_not_used_for_other_items_until_nobody_can_write_to_them():
    office = Office()
    first, second = office.join(A), office.join(B)
    office.hear(first, Ready())
    office.hear(first, Computed(0), Computed(1))  # it writes to slots 0 and 1
    office.lost.add(first)
    office.pass_time(1.0)
    office.hear(second, Ready())
    assert office.assigned() == [0, 1]
    assert office.hear(second, Computed(0))[0] == Send(0, 1, 2)
    assert office.hear(second, Computed(1))[0] == Send(1, 1, 3)
    assert office.hear(second, Sent(0), Sent(1), Computed(2)) == [Deliver(0, 1, 2), Deliver(1, 1, 3, number=1)]
    assert office.release(0) == [Send(2, 1, 2), Dispatch(4, 1, 1)]
    office.hear(second, Sent(2), Computed(3))
    office.pass_time(DRAIN_S - 0.5, alive=(0, 1, second))
    assert office.sent == []
    office.pass_time(1.0, alive=(0, 1, second))
    assert office.sent[0] == ((second,), Send(3, 1, 0))


def test_a_replica_that_was_given_up_and_lives_on_keeps_its_slots_in_doubt():
    office = Office()
    first, second = office.join(A), office.join(B)
    office.hear(first, Ready())
    office.hear(first, Computed(0), Computed(1))
    office.pass_time(4.0, alive=(0, 1, second))
    office.pass_time(2.0, alive=(0, 1, second))
    office.hear(second, Ready())
    office.hear(second, Computed(0), Computed(1))
    for _ in range(20):
        office.pass_time(2.0, alive=(0, 1, second))
    assert office.scheduler.statistics(0.0).free == 0
    office.hear(first, Produced(ProducerReport()))  # all that it wrote has arrived
    assert office.scheduler.statistics(0.0).free == 2


def test_where_no_slot_is_free_an_item_is_computed_again_into_its_own():
    slots = Slots(2)
    assert slots.place(0, end=None)
    assert slots.place(1, end=None)
    slots.doubt(0, replica=7)
    assert slots.place(0, end=None)
    assert slots[0] == 0
    slots.release_low()
    assert slots.free == 0
    slots.clear(7)
    assert slots.free == 1


def test_a_replica_that_is_asked_to_stop_leaves_without_a_trace():
    office = Office()
    first = office.join()
    office.hear(first, Ready())
    office.hear(first, Computed(0))  # it writes to slot 0, and computes item 1
    assert office.hear(first, StopRequest(StopReason.TERMINATE)) == [Stop()]
    assert office.scheduler.statistics(0.0).free == SLOTS - 1
    office.hear(first, Sent(0), Computed(1), Produced(REPORT), Goodbye())
    assert office.scheduler.statistics(0.0).free == SLOTS - 1  # the item waits for somebody, with its slot
    assert office.coordinator.replicas is not None
    assert office.coordinator.replicas.reports == [REPORT]
    second = office.join(B)
    assert office.hear(second, Ready()) == [Dispatch(0, 1, 0), Dispatch(1, 1, 0)]
    assert office.hear(second, Computed(0))[0] == Send(0, 1, 0)


@pytest.mark.parametrize(("last", "more"), [(9, False), (3, True)])
def test_at_the_end_all_are_let_go_and_told_whether_the_run_goes_on(last, more):
    office = Office(end_item=10)
    first = office.join()
    office.hear(first, Ready())
    for item in range(last + 1):
        office.compute(first, item)
        office.release(item)
    if more:
        office.hear(0, LastItem(last))
    stops = [(ranks, message) for ranks, message in office.sent if isinstance(message, Stop)]
    assert stops == [((0, 1), Stop()), ((first,), Stop(more))]
    late = office.join(B)
    answers = [message for ranks, message in office.sent if ranks == (late,)]
    assert isinstance(answers[-1], Abort if more else Stop)


def test_a_rank_whose_replica_never_came_whole_is_let_go_at_the_end():
    office = Office(end_item=1)
    whole, half = office.join(), office.join(B, tp=1, shares=2)
    office.hear(whole, Ready())
    office.compute(whole, 0)
    office.release(0)
    assert office.hear(half, Produced(ProducerReport()), Goodbye()) == []
    assert not office.coordinator.aborted
    [reports] = [message for message in office.hear(whole, Produced(REPORT)) if isinstance(message, Reports)]
    assert reports.reports == (REPORT,)


def test_what_the_target_side_can_do_is_told_of_the_replicas_that_are_there_at_the_end():
    """One that was preempted, and came back as another, had counted twice."""
    office = Office(end_item=1)
    first = office.join()
    office.hear(first, Ready())
    office.hear(first, StopRequest(StopReason.TERMINATE))
    office.hear(first, Produced(REPORT), Goodbye())
    second = office.join(B)
    office.hear(second, Ready())
    office.compute(second, 0)
    office.release(0)
    [reports] = [message for message in office.hear(second, Produced(REPORT)) if isinstance(message, Reports)]
    assert reports.reports == (REPORT,)


def test_without_a_replica_the_run_ends_in_time_and_says_so(capsys):
    office = Office()
    for _ in range(7):
        office.pass_time(4.0)
    waits = "specdist: no target replica is there, waiting up to 20 s (control.replica_timeout_s): "
    assert capsys.readouterr().err == f"{waits}{START}\n"
    assert office.coordinator.aborted is not None
    said = "no target replica has been there for 20 s (control.replica_timeout_s): "
    assert str(office.coordinator.aborted.error()) == said + START


def test_who_speaks_another_version_or_comes_twice_is_refused():
    office = Office()
    old = office.join(version=1)
    assert isinstance(office.sent[-1][1], Abort)
    assert office.sent[-1][1].why == "refused"
    assert "version 1" in office.sent[-1][1].failure.message
    assert office.sent[-1][0] == (old,)
    office.join(A)
    office.join(A)
    assert "has no place" in office.sent[-1][1].failure.message  # type: ignore[union-attr]
    assert not office.coordinator.aborted


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_every_item_is_delivered_once_and_no_slot_has_two_items(seed):
    chance, office = random.Random(seed), Office(end_item=60)
    owed: dict[int, list[Message]] = {}  # to compute, and to send
    ghosts: dict[int, tuple[float, list[int]]] = {}  # of replicas that are lost: when, slots they may still write to
    holding: dict[int, int] = {}
    trained = 0
    while trained < 60:
        for ranks, message in office.sent:
            if isinstance(message, Send) and message.slot >= 0:
                assert message.slot not in {slot for item, slot in holding.items() if item != message.item}
                in_doubt = {s for lost_at, slots in ghosts.values() if office.now <= lost_at + DRAIN_S for s in slots}
                assert message.slot not in in_doubt or office.scheduler.statistics(0.0).free <= 1
            if isinstance(message, Dispatch) or (isinstance(message, Send) and message.slot >= 0):
                owed.setdefault(ranks[0], []).append(message)
        office.sent.clear()
        live = [rank for rank in owed if rank not in ghosts]
        step = chance.random()
        if not live or (step < 0.05 and len(live) < 4):
            rank = office.join(f"{chance.getrandbits(64):016x}")
            office.hear(rank, Ready())
            owed.setdefault(rank, [])
            if office.sent:
                continue
        elif step < 0.1:
            rank = chance.choice(live)
            ghosts[rank] = (office.now, [order.slot for order in owed.pop(rank) if isinstance(order, Send)])
            office.lost.add(rank)
            office.hear(rank, Failed(Failure("error", "gone")))
            continue
        elif step < 0.7 and any(owed[rank] for rank in live):
            rank = chance.choice([rank for rank in live if owed[rank]])
            order = owed[rank].pop(0)
            if isinstance(order, Dispatch):
                office.hear(rank, Computed(order.item, 100, chance.random()))
                continue
            assert isinstance(order, Send)
            assert order.item not in holding
            holding[order.item] = order.slot
            office.hear(rank, Sent(order.item))
            assert (0, 1) in [ranks for ranks, message in office.sent if isinstance(message, Deliver)]
            continue
        elif trained in holding:
            del holding[trained]
            office.release(trained)
            trained += 1
            continue
        office.pass_time(1.0, alive=(0, 1, *(rank for rank in owed if rank not in ghosts)))
    assert not office.coordinator.aborted


def test_a_rendezvous_is_for_the_user_alone_and_goes_with_the_draft_world(tmp_path):
    rendezvous = Rendezvous(tmp_path, "")
    assert rendezvous.look() is None
    (tmp_path / "scheduler.json.tmp").touch(0o644)  # of whatever was there before
    for port in (1, 2):
        rendezvous.publish(ControlAddress(f"tcp://h:{port}", b"0" * 16))
    assert rendezvous.look() == ControlAddress("tcp://h:2", b"0" * 16)
    assert stat.S_IMODE((tmp_path / "scheduler.json").stat().st_mode) == 0o600
    rendezvous.withdraw(ControlAddress("tcp://h:1", b"0" * 16))  # a start that has lost the directory to another
    assert rendezvous.look() is not None
    rendezvous.withdraw(ControlAddress("tcp://h:2", b"0" * 16))
    assert rendezvous.look() is None


def test_a_given_address_needs_a_common_secret(tmp_path, monkeypatch):
    rendezvous = Rendezvous(tmp_path, "127.0.0.1:7000")
    monkeypatch.setenv("SPECDIST_TOKEN", "0" * 31)
    with pytest.raises(ConfigError, match="SPECDIST_TOKEN"):
        rendezvous.look()
    monkeypatch.setenv("SPECDIST_TOKEN", "0" * 32)
    assert rendezvous.place() == ("127.0.0.1", 7000)
    assert rendezvous.look() == ControlAddress("tcp://127.0.0.1:7000", bytes(16))


def test_the_terms_survive_the_wire_and_name_what_differs():
    progress = Progress(3, 6, Cursor(0, 9), batching=Batching(2, 64))
    resume = ResumePlan(progress, Path("step-00000003"), Schedule(6, 3, 17, 1))
    terms = Terms((("a", 2), ("b", 1)), 1, resume, {"run.seed": "0", "prompts": "f"})
    assert Terms.from_json(terms.to_json()) == terms
    assert terms.hosts == ("a", "a", "b")
    terms.check({"run.seed": "0", "prompts": "f"})
    with pytest.raises(ConfigError, match=r"differs in run\.seed \(1 here, 0 there\)$"):
        terms.check({"run.seed": "1", "prompts": "f"})
    with pytest.raises(ConfigError, match="do not fit"):
        dataclasses.replace(terms, host_ranks=tuple((f"a-long-name-of-a-host-{n}", 8) for n in range(1200))).to_json()


def test_both_worlds_hold_out_the_same(tmp_path):
    one, two = (write_store(tmp_path / n, [([1, 2], [0, 1])] * 2) for n in "ab")
    target = SimpleNamespace(layers=1, parameters=2, vocab_size=3)
    job: Any = SimpleNamespace(
        prompts=SimpleNamespace(tokens_per_rank=8),
        run=SimpleNamespace(seed=0),
        evaluate=SimpleNamespace(limit=None),
        draft=draft_config(),
        channel=ChannelConfig(),
    )
    facts: Any = SimpleNamespace(target=target, layout="rows")
    side = make_corpus([one]).training
    without, half, other = (
        common_facts(job, facts, Corpus(side, heldout))
        for heldout in (None, make_corpus([two]).training, Side.of(one, np.arange(1)))
    )
    terms = Terms((("a", 1),), 1, ResumePlan(Progress(), None, Schedule(6, 3, 17, 1)), half)
    terms.check(dict(half))
    for own in (without, other):
        with pytest.raises(ConfigError, match=r"differs in prompts\.holdout \(\w+ here, \w+ there\)$"):
            terms.check(own)


def test_worlds_of_one_role_and_how_a_target_world_counts_beside_a_draft_world():
    draft = Topology.build(WorldConfig(role="draft"), ("d", "d"), replicas=1, tp=1, dp=None, cp=1)
    assert (draft.replicas, draft.draft, draft.links) == ((), ((0,), (1,)), ())
    target = Topology.build(WorldConfig(role="target"), ("t",) * 4, replicas=None, tp=2, dp=None, cp=1)
    assert (target.replicas, target.draft) == (((0, 1), (2, 3)), ())
    both = target.beside(("d", "d"), cp=1, pods=1)
    assert both.replicas == ((2, 3), (4, 5))
    assert (both.draft, both.shards, both.hosts) == (draft.draft, 2, ("d", "d", "t", "t", "t", "t"))
    with pytest.raises(ConfigError, match=r"world\.role=target: target\.replicas\(3\)"):
        Topology.build(WorldConfig(role="target"), ("t",) * 4, replicas=3, tp=1, dp=None, cp=1)
    with pytest.raises(ConfigError, match=r"world\.role=draft divides"):
        WorldConfig(role="draft", mode="colocated")
    for wrong in ("host", "host:", ":1", "host:99999"):
        with pytest.raises(ConfigError, match="HOST:PORT"):
            WorldConfig(scheduler=wrong)
