# SPDX-License-Identifier: Apache-2.0
"""The scheduler's rules one by one, then whole worlds simulated under random delays."""

from __future__ import annotations

import random

import pytest

from benchmarks.flow import Case, Times, World
from benchmarks.scheduler import measure, measure_case
from specdist.core.errors import ConfigError
from specdist.core.topology import reach
from specdist.scheduler.config import SchedulerConfig
from specdist.scheduler.messages import Deliver, Dispatch, Send
from specdist.scheduler.scheduler import ProtocolError, Scheduler


def make(replicas: int = 2, **changes: object) -> Scheduler:
    settings = {"draft_ranks": 2, "slots": 8, "queue_depth": 2, "timeout": 10.0}
    scheduler = Scheduler(**{**settings, **changes})  # type: ignore[arg-type]
    for replica, pods in enumerate(reach(replicas, int(str(changes.get("pods", 1))))):
        scheduler.add_replica(replica, None if changes.get("elastic") else pods)
    return scheduler


def given(scheduler: Scheduler, now: float = 0.0) -> list[tuple[int, int]]:
    """Items and replicas of the orders to compute."""
    return [(order.item, order.replica) for order in scheduler.next_orders(now) if isinstance(order, Dispatch)]


def sends(scheduler: Scheduler, now: float = 0.0) -> list[Send]:
    return [order for order in scheduler.next_orders(now) if isinstance(order, Send)]


def deliver(scheduler: Scheduler, item: int, replica: int, now: float = 0.0) -> None:
    """`replica` computes the item, and sends it as it is told to."""
    scheduler.on_computed(item, replica, now)
    assert item in [send.item for send in sends(scheduler, now)]
    assert scheduler.on_sent(item, replica, now) is not None


def release(scheduler: Scheduler, item: int, now: float = 0.0) -> None:
    for draft in range(scheduler.draft_ranks):
        scheduler.on_released(item, draft, now)


def test_items_go_in_order_to_the_least_busy_replica() -> None:
    scheduler = make(first_item=5)
    assert scheduler.next_orders(0.0) == [Dispatch(5, 0, 5), Dispatch(6, 1, 5), Dispatch(7, 0, 5), Dispatch(8, 1, 5)]
    scheduler.on_computed(6, 1, 1.0)
    assert scheduler.next_orders(1.0) == [Send(6, 1, 0), Dispatch(9, 1, 5)]
    scheduler.on_computed(5, 0, 1.0, (3, 4))
    assert scheduler.next_orders(1.0) == [Send(5, 0, 1), Dispatch(10, 0, 5)]
    assert scheduler.on_sent(5, 0, 1.0) == Deliver(5, 0, 1, (3, 4))
    assert scheduler.on_sent(6, 1, 2.0) == Deliver(6, 1, 0, number=1)


def test_a_slot_is_taken_when_rows_are_there_and_one_is_kept_for_what_the_draft_needs_next() -> None:
    scheduler = make(replicas=3, slots=2)
    assert given(scheduler) == [(0, 0), (1, 1), (2, 2), (3, 0), (4, 1), (5, 2)]
    scheduler.on_computed(1, 1, 0.0)
    scheduler.on_computed(2, 2, 0.0)
    assert scheduler.next_orders(0.0) == [Send(1, 1, 0), Dispatch(6, 1, 0)]  # and none for item 2, nor work beside it
    scheduler.on_computed(0, 0, 0.0)
    assert sends(scheduler) == [Send(0, 0, 1)]
    for item, replica in ((0, 0), (1, 1)):
        assert scheduler.on_sent(item, replica, 0.0) is not None
    statistics = scheduler.statistics(0.0)
    assert (statistics.slots, statistics.free, statistics.held, statistics.delivered) == (2, 0, 1, 2)
    scheduler.on_released(0, 0, 2.0)
    assert sends(scheduler) == []  # draft rank 1 still holds the slot
    scheduler.on_released(0, 1, 3.0)
    assert sends(scheduler) == [Send(2, 2, 1)]


def test_the_items_of_a_step_can_have_slots_together() -> None:
    scheduler = make(replicas=4, slots=3, together=2, queue_depth=1)
    assert given(scheduler) == [(0, 0), (1, 1), (2, 2), (3, 3)]
    scheduler.on_computed(3, 3, 0.0)
    scheduler.on_computed(2, 2, 0.0)
    assert sends(scheduler) == [Send(2, 2, 0)]  # two slots are left for items 0 and 1
    scheduler.on_computed(1, 1, 0.0)
    scheduler.on_computed(0, 0, 0.0)
    assert sends(scheduler) == [Send(0, 0, 1), Send(1, 1, 2)]


def test_a_slow_replica_gets_an_item_whose_turn_comes_when_it_is_done() -> None:
    scheduler = make(replicas=2, slots=4, queue_depth=1)
    assert given(scheduler) == [(0, 0), (1, 1)]
    scheduler.on_computed(0, 0, 1.0, tokens=100, seconds=1.0)
    assert given(scheduler, 1.0) == [(2, 0)]
    scheduler.on_computed(2, 0, 2.0, tokens=100, seconds=1.0)
    assert given(scheduler, 2.0) == [(3, 0)]
    scheduler.on_computed(1, 1, 2.5, tokens=100, seconds=2.5)
    assert given(scheduler, 2.5) == [(5, 1)]  # until 5.0, when replica 0 would be done with it, and before with 4
    scheduler.on_computed(3, 0, 3.0, tokens=100, seconds=1.0)
    assert given(scheduler, 3.0) == [(4, 0)]


def test_what_a_straggler_holds_is_computed_elsewhere_and_the_loser_drops_it() -> None:
    scheduler = make(replicas=2, slots=4, queue_depth=1, draft_ranks=1)
    assert given(scheduler) == [(0, 0), (1, 1)]
    for replica in (0, 1):
        scheduler.on_computed(replica, replica, 1.0, tokens=100, seconds=1.0)
    assert given(scheduler, 1.0) == [(2, 0), (3, 1)]
    for item in (0, 1):
        assert scheduler.on_sent(item, item, 1.0) is not None
        release(scheduler, item, 1.0)
    scheduler.on_computed(3, 1, 2.0, tokens=100, seconds=1.0)
    assert given(scheduler, 2.0) == [(4, 1)]
    assert given(scheduler, 3.4) == []  # late, but not yet by twice the time
    scheduler.on_computed(4, 1, 3.6, tokens=100, seconds=1.6)
    assert given(scheduler, 3.6) == [(5, 1)]
    scheduler.on_computed(5, 1, 4.6, tokens=100, seconds=1.0)
    assert given(scheduler, 4.6) == [(2, 1)]
    scheduler.on_computed(2, 1, 5.6, tokens=100, seconds=1.0)
    assert [(send.item, send.replica) for send in sends(scheduler, 5.6)][:1] == [(2, 1)]
    scheduler.on_computed(2, 0, 6.0, tokens=100, seconds=5.0)
    assert Send(2, 0) in scheduler.next_orders(6.0)  # no slot: dropped
    assert scheduler.on_sent(2, 1, 6.0) is not None


def test_messages_that_cannot_be_are_refused() -> None:
    scheduler = make()
    scheduler.next_orders(0.0)
    with pytest.raises(ProtocolError, match=r"replica 0 computed batch 2; outstanding there: \[0, 2\]"):
        scheduler.on_computed(2, 0, 0.0)
    with pytest.raises(ProtocolError, match="replica 0 sent batch 0, which it was not to send"):
        scheduler.on_sent(0, 0, 0.0)
    with pytest.raises(ProtocolError, match="number 0 released batch 0, which it does not hold"):
        scheduler.on_released(0, 0, 0.0)
    deliver(scheduler, 0, 0)
    with pytest.raises(ProtocolError, match="replica 1 sent batch 0, which it was not to send"):
        scheduler.on_sent(0, 1, 0.0)
    scheduler.on_released(0, 0, 0.0)
    with pytest.raises(ProtocolError, match="released batch 0, which it does not hold"):
        scheduler.on_released(0, 0, 0.0)


def test_the_end_is_reached_when_everything_is_released() -> None:
    scheduler = make(replicas=1, end_item=3)
    scheduler.next_orders(0.0)
    for item in range(3):
        deliver(scheduler, item, 0)
        assert not scheduler.finished
        release(scheduler, item)
    assert scheduler.finished
    assert scheduler.next_orders(0.0) == []
    assert make(first_item=3, end_item=3).finished


def test_a_stop_ends_when_what_has_a_slot_is_released_and_the_rest_is_dropped() -> None:
    scheduler = make(replicas=1, first_item=10, queue_depth=3)
    scheduler.next_orders(0.0)
    deliver(scheduler, 10, 0)
    scheduler.on_computed(11, 0, 0.0)
    assert [send.slot for send in sends(scheduler)] == [1]
    scheduler.stop_after(10)
    scheduler.on_computed(12, 0, 0.0)
    assert scheduler.next_orders(0.0) == [Send(12, 0)]
    release(scheduler, 10)
    assert not scheduler.finished
    assert scheduler.on_sent(11, 0, 0.0) == Deliver(11, 0, 1, number=1)
    release(scheduler, 11)
    assert scheduler.finished


def test_stop_before_the_first_item_and_stops_that_cannot_be() -> None:
    scheduler = make(first_item=10)
    scheduler.stop_after(9)
    assert scheduler.finished
    with pytest.raises(ProtocolError, match="first batch is 10"):
        scheduler.stop_after(8)
    later = make(replicas=3, end_item=4)
    later.stop_after(7)  # does not move the end of the data
    assert [item for item, _ in given(later)] == [0, 1, 2, 3]


def test_a_dropped_replica_gives_its_items_back_in_order() -> None:
    scheduler = make(replicas=3, end_item=9, slots=9)
    assert len(given(scheduler)) == 6
    assert scheduler.drop_replica(1) == (1, 4)
    scheduler.on_computed(1, 1, 0.0)  # was on its way
    assert scheduler.next_orders(0.0) == []
    scheduler.on_computed(2, 2, 0.0)
    scheduler.on_computed(0, 0, 0.0)
    scheduler.on_computed(3, 0, 0.0)
    assert given(scheduler) == [(1, 0), (4, 0), (6, 2)]


def test_watch_names_the_replica_that_holds_an_item() -> None:
    scheduler = make(replicas=2, end_item=4)
    scheduler.next_orders(0.0)
    scheduler.on_computed(1, 1, 6.0)
    assert scheduler.watch(10.0) is None
    culprit = scheduler.watch(11.0)
    assert culprit is not None
    assert (culprit.role, culprit.indices, culprit.item, culprit.seconds) == ("target", (0,), 0, 11.0)
    assert scheduler.next_orders(12.0)  # item 3 could start when item 1 had a slot
    assert scheduler.on_sent(1, 1, 12.0) is not None
    scheduler.on_computed(0, 0, 12.0)
    scheduler.on_computed(2, 0, 12.0)
    late = scheduler.watch(22.5)
    assert late is not None
    assert (late.indices, late.item, late.seconds, late.doing) == ((1,), 3, 10.5, "computing")
    assert [(send.item, send.slot) for send in sends(scheduler, 23.0)] == [(0, 1), (2, 2)]
    scheduler.on_computed(3, 1, 23.0)
    assert scheduler.on_sent(2, 0, 33.5) is not None
    sending = scheduler.watch(33.5)
    assert sending is not None
    assert (sending.indices, sending.item, sending.doing) == ((0,), 0, "sending")


def test_watch_names_the_draft_ranks_that_hold_an_item() -> None:
    scheduler = make(replicas=1, draft_ranks=3, end_item=2)
    scheduler.next_orders(0.0)
    deliver(scheduler, 0, 0, 1.0)
    deliver(scheduler, 1, 0, 2.0)
    nobody = scheduler.watch(12.0)
    assert nobody is not None
    assert (nobody.role, nobody.indices, nobody.others, nobody.seconds) == ("draft", (0, 1, 2), 0, 11.0)
    scheduler.on_released(0, 0, 12.0)
    scheduler.on_released(0, 2, 12.0)
    one = scheduler.watch(12.0)
    assert one is not None
    assert (one.indices, one.item, one.others) == ((1,), 0, 2)
    scheduler.on_released(0, 1, 12.0)
    assert scheduler.watch(22.0) is None  # item 1 was delivered long ago, but its turn came at 12
    assert scheduler.watch(22.5) is not None


def test_statistics_say_how_long_replicas_wait() -> None:
    scheduler = make(replicas=1, draft_ranks=1, slots=2, queue_depth=1, end_item=4)
    scheduler.next_orders(100.0)
    deliver(scheduler, 0, 0, 101.0)
    deliver(scheduler, 1, 0, 102.0)
    scheduler.on_computed(2, 0, 103.0)
    assert scheduler.next_orders(103.0) == []  # the replica has no slot from here
    release(scheduler, 0, 106.0)  # it waited 3 s
    scheduler.next_orders(106.0)
    statistics = scheduler.statistics(107.0)
    assert statistics.target_wait_s == pytest.approx(3.0)
    assert statistics.elapsed_s == pytest.approx(7.0)
    assert (statistics.computing, statistics.queued) == (1, 0)


def test_no_waiting_is_counted_after_the_end() -> None:
    scheduler = make(replicas=1, draft_ranks=1, end_item=1)
    scheduler.next_orders(0.0)
    deliver(scheduler, 0, 0, 1.0)
    release(scheduler, 0, 2.0)
    assert scheduler.statistics(50.0).target_wait_s == 0.0


def test_without_draft_ranks_a_computed_item_is_dropped() -> None:
    scheduler = make(draft_ranks=0, slots=2, end_item=3, queue_depth=1)
    assert given(scheduler) == [(0, 0), (1, 1)]
    scheduler.on_computed(1, 1, 1.0)
    assert scheduler.next_orders(1.0) == [Send(1, 1), Dispatch(2, 1, 0)]
    scheduler.on_computed(2, 1, 1.0)
    assert not scheduler.finished
    scheduler.on_computed(0, 0, 2.0)
    assert scheduler.finished


def test_configuration_is_checked() -> None:
    with pytest.raises(ConfigError, match=r"scheduler\.queue_depth"):
        SchedulerConfig(queue_depth=0)
    with pytest.raises(ValueError, match="0 slots"):
        make(slots=0)


def test_the_benchmark_runs() -> None:
    cost = measure(draft_ranks=8, replicas=2, items=10, connections=4)
    assert cost.messages_per_item == 20
    assert min(cost.protocol_ms, cost.server_ms) > 0


def play(seed: int, vanish: bool = False, stop: bool = False) -> None:
    """A small world in which everything takes random times, from replicas that all but hang to such that are quick."""
    rng = random.Random(seed)
    replicas, together, pods = rng.randint(1, 5), rng.choice((1, 1, 2, 3)), rng.choice((1, 1, 2, 3, 4, 5))
    slots, end = rng.randint(together, 9), None if stop else rng.randint(0, 12) * together * pods
    speeds, skew = [rng.choice((1.0, 1.0, 4.0, 200.0)) for _ in range(replicas)], rng.choice((0.1, 1.0, 20.0))
    depth, in_turn = rng.randint(1, 4), rng.random() < 0.5
    scheduler = make(
        replicas=replicas, draft_ranks=rng.randint(1, 5 // pods) * pods, pods=pods, slots=slots,
        queue_depth=depth, together=together, end_item=end, elastic=vanish,
    )  # fmt: skip
    times = Times(
        forward=lambda replica, _: speeds[replica] * rng.choice((0.01, 1.0, rng.expovariate(1.0))),
        train=lambda *_: skew * rng.expovariate(10.0),
        transfer=lambda *_: rng.expovariate(20.0),
        message=lambda: rng.expovariate(20.0),
    )
    world = World(scheduler, replicas, times, rng.randint(depth if in_turn else 1, 5), together, end, in_turn)
    lost = range(1, rng.randint(1, replicas)) if vanish else ()
    for replica in lost:
        world.at(rng.uniform(0.0, 5.0), world.lose, replica, rng.uniform(0.0, 10.0))
    if stop:
        world.at(rng.uniform(0.0, 10.0), world.stop)
    world.run()
    assert scheduler.finished, "deadlock: nothing moves any more"
    wanted = end if end is not None else (world.last or 0) + 1
    if stop:
        assert world.last is not None
        wanted = world.last + 1
        assert set(range(wanted)) <= set(world.arrivals)
    else:
        assert sorted(world.arrivals) == list(range(wanted or 0))
    assert world.trained == [wanted] * scheduler.draft_ranks


@pytest.mark.parametrize("block", range(10))
def test_random_small_worlds(block: int) -> None:
    for seed in range(block * 40, block * 40 + 40):
        play(seed)


@pytest.mark.parametrize("block", range(5))
@pytest.mark.parametrize("vanish", [False, True])
def test_replicas_that_vanish_and_stops_at_any_moment(block: int, vanish: bool) -> None:
    for seed in range(block * 40, block * 40 + 40):
        play(seed, vanish=vanish, stop=bool(seed % 3) or not vanish)


def test_a_world_of_64_draft_ranks_and_128_replicas() -> None:
    case = Case((1.0,) * 120 + (0.25,) * 8, slots=192, jitter=0.1)
    scheduler = make(replicas=128, draft_ranks=64, slots=192, end_item=400)
    world = World(scheduler, 128, Times.of(case, random.Random(1)), end=400)
    world.run()
    assert scheduler.finished
    assert sorted(world.arrivals) == list(range(400))


@pytest.mark.parametrize(("words", "slots", "jitter", "pods", "least"), [
    (["1x7", "0.5"], 16, 0.0, 1, 0.93),
    (["1x7", "0.25"], 16, 0.0, 1, 0.89),
    (["1x12"], 16, 0.1, 1, 0.98),
    (["1x12"], 8, 0.1, 1, 0.98),
    (["1x7", "0.25"], 10, 0.1, 1, 0.89),
    (["1x5", "0.5", "1x20", "0.5x2", "1x4"], 8, 0.1, 8, 0.93),
])  # fmt: skip
def test_a_slow_replica_costs_its_own_share_only(
    words: list[str], slots: int, jitter: float, pods: int, least: float
) -> None:
    case = Case.of(words, slots=slots, jitter=jitter, pods=pods)
    assert least <= measure_case(case, items=1000) <= case.ideal + 0.02 * pods
