# SPDX-License-Identifier: Apache-2.0
"""The scheduler's rules one by one, then whole worlds simulated under random delays."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest

from benchmarks.flow import Case, Times, World
from benchmarks.scheduler import measure, measure_case
from specdist.core.errors import ConfigError
from specdist.scheduler.config import SchedulerConfig
from specdist.scheduler.messages import Deliver, Dispatch
from specdist.scheduler.scheduler import ProtocolError, Scheduler


def make(replicas: int = 2, **changes: object) -> Scheduler:
    settings = {"draft_ranks": 2, "slots": 8, "queue_depth": 2, "timeout": 10.0}
    scheduler = Scheduler(**{**settings, **changes})  # type: ignore[arg-type]
    for replica in range(replicas):
        scheduler.add_replica(replica)
    return scheduler


def release(scheduler: Scheduler, item: int, now: float = 0.0) -> None:
    for draft in range(scheduler.draft_ranks):
        scheduler.on_released(item, draft, now)


def test_items_go_in_order_to_the_least_busy_replica() -> None:
    scheduler = make(first_item=5)
    assert scheduler.next_dispatches(0.0) == [
        Dispatch(5, 0, 0),
        Dispatch(6, 1, 1),
        Dispatch(7, 0, 2),
        Dispatch(8, 1, 3),
    ]
    assert scheduler.on_computed(6, 1, 1.0) == Deliver(6, 1, 1)
    assert scheduler.on_computed(8, 1, 2.0) == Deliver(8, 1, 3)
    assert scheduler.on_computed(5, 0, 2.0, (3, 4)) == Deliver(5, 0, 0, (3, 4))
    assert scheduler.next_dispatches(2.0) == [Dispatch(9, 1, 4), Dispatch(10, 0, 5), Dispatch(11, 1, 6)]


def test_credits_bound_what_is_in_flight() -> None:
    scheduler = make(slots=3)
    assert [d.item for d in scheduler.next_dispatches(0.0)] == [0, 1, 2]
    for item, replica in ((1, 1), (0, 0), (2, 0)):
        scheduler.on_computed(item, replica, 1.0)
    assert scheduler.next_dispatches(1.0) == []
    scheduler.on_released(0, 0, 2.0)
    assert scheduler.next_dispatches(2.0) == []  # draft rank 1 still holds the slot
    scheduler.on_released(0, 1, 3.0)
    assert [d.item for d in scheduler.next_dispatches(3.0)] == [3]
    statistics = scheduler.statistics(3.0)
    assert statistics.slots == 3
    assert (statistics.dispatched, statistics.delivered, statistics.released) == (4, 3, 1)


def test_one_slow_draft_rank_holds_the_low_water_mark() -> None:
    scheduler = make(slots=2, replicas=1)
    scheduler.next_dispatches(0.0)
    for item in (0, 1):
        scheduler.on_computed(item, 0, 1.0)
        scheduler.on_released(item, 0, 1.0)
    assert scheduler.next_dispatches(1.0) == []
    scheduler.on_released(0, 1, 2.0)
    scheduler.on_released(1, 1, 2.0)
    assert [d.item for d in scheduler.next_dispatches(2.0)] == [2, 3]


def test_messages_that_cannot_be_are_refused_with_what_was_due() -> None:
    scheduler = make()
    scheduler.next_dispatches(0.0)
    with pytest.raises(ProtocolError, match=r"replica 0 computed batch 2; outstanding there: \[0, 2\]"):
        scheduler.on_computed(2, 0, 0.0)
    with pytest.raises(ProtocolError, match="released batch 0; its next one is batch 0, which is not delivered"):
        scheduler.on_released(0, 0, 0.0)
    scheduler.on_computed(0, 0, 0.0)
    scheduler.on_computed(1, 1, 0.0)
    with pytest.raises(ProtocolError, match="released batch 1; its next one is batch 0"):
        scheduler.on_released(1, 0, 0.0)
    scheduler.on_released(0, 0, 0.0)
    with pytest.raises(ProtocolError, match="released batch 0; its next one is batch 1"):
        scheduler.on_released(0, 0, 0.0)


def test_a_release_of_the_next_turn_of_the_ring_is_not_taken_for_this_one() -> None:
    scheduler = make(slots=2, replicas=1)
    scheduler.next_dispatches(0.0)
    for item in (0, 1):
        scheduler.on_computed(item, 0, 0.0)
        scheduler.on_released(item, 0, 0.0)
    with pytest.raises(ProtocolError, match="batch 2, which is not delivered"):  # slot 0 still holds item 0
        scheduler.on_released(2, 0, 0.0)


def test_the_end_is_reached_when_everything_dispatched_is_released() -> None:
    scheduler = make(replicas=1, end_item=3)
    for item in range(3):
        scheduler.next_dispatches(0.0)
        scheduler.on_computed(item, 0, 0.0)
        assert not scheduler.finished
        release(scheduler, item)
    assert scheduler.finished
    assert scheduler.next_dispatches(0.0) == []
    assert make(first_item=3, end_item=3).finished


def test_stop_drains_what_was_dispatched_beyond_it() -> None:
    scheduler = make(replicas=1, first_item=10)
    assert [d.item for d in scheduler.next_dispatches(0.0)] == [10, 11]
    scheduler.stop_after(10)
    scheduler.on_computed(10, 0, 0.0)
    assert scheduler.next_dispatches(0.0) == []
    release(scheduler, 10)
    assert not scheduler.finished
    assert scheduler.on_computed(11, 0, 0.0) == Deliver(11, 0, 1)
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
    assert [d.item for d in later.next_dispatches(0.0)] == [0, 1, 2, 3]


def test_a_dropped_replica_gives_its_items_back_in_order() -> None:
    scheduler = make(replicas=3, end_item=9, slots=9)
    assert [d.item for d in scheduler.next_dispatches(0.0)] == [0, 1, 2, 3, 4, 5]
    assert scheduler.drop_replica(1) == (1, 4)
    assert scheduler.on_computed(1, 1, 0.0) is None  # was on its way
    assert scheduler.next_dispatches(0.0) == []
    scheduler.on_computed(2, 2, 0.0)
    scheduler.on_computed(0, 0, 0.0)
    scheduler.on_computed(3, 0, 0.0)
    assert scheduler.next_dispatches(0.0) == [Dispatch(1, 0, 6), Dispatch(4, 0, 7), Dispatch(6, 2, 8)]


def test_watch_names_the_replica_that_holds_an_item() -> None:
    scheduler = make(replicas=2, end_item=4)
    scheduler.next_dispatches(0.0)
    scheduler.on_computed(1, 1, 6.0)
    assert scheduler.watch(10.0) is None
    culprit = scheduler.watch(11.0)
    assert culprit is not None
    assert (culprit.role, culprit.indices, culprit.item, culprit.seconds) == ("target", (0,), 0, 11.0)
    scheduler.on_computed(0, 0, 11.0)
    late = scheduler.watch(17.0)  # item 3 could start only when item 1 was done
    assert late is not None
    assert (late.indices, late.item, late.seconds) == ((1,), 3, 11.0)


def test_watch_names_the_draft_ranks_that_hold_an_item() -> None:
    scheduler = make(replicas=1, draft_ranks=3, end_item=2)
    scheduler.next_dispatches(0.0)
    scheduler.on_computed(0, 0, 1.0)
    scheduler.on_computed(1, 0, 2.0)
    nobody = scheduler.watch(12.0)
    assert nobody is not None
    assert (nobody.role, nobody.indices, nobody.everyone, nobody.seconds) == ("draft", (0, 1, 2), True, 11.0)
    scheduler.on_released(0, 0, 12.0)
    scheduler.on_released(0, 2, 12.0)
    one = scheduler.watch(12.0)
    assert one is not None
    assert (one.indices, one.item, one.everyone) == ((1,), 0, False)
    scheduler.on_released(0, 1, 12.0)
    assert scheduler.watch(22.0) is None  # item 1 was delivered long ago, but its turn came at 12
    assert scheduler.watch(22.5) is not None


def test_statistics_say_which_side_waits() -> None:
    scheduler = make(replicas=2, draft_ranks=1, slots=2, queue_depth=1, end_item=4)
    scheduler.next_dispatches(100.0)
    scheduler.on_computed(0, 0, 101.0)  # the draft waited 1 s; replica 0 has no credit from here
    scheduler.next_dispatches(101.0)
    scheduler.on_computed(1, 1, 102.0)
    scheduler.on_released(0, 0, 104.0)  # replica 0 waited 3 s, replica 1 2 s
    scheduler.next_dispatches(104.0)
    scheduler.on_released(1, 0, 105.0)  # replica 1 waited another second
    scheduler.next_dispatches(105.0)
    statistics = scheduler.statistics(106.0)  # the draft has waited for item 2 since 105
    assert statistics.target_wait_s == pytest.approx(6.0)
    assert statistics.draft_wait_s == pytest.approx(2.0)
    assert statistics.elapsed_s == pytest.approx(6.0)
    assert (statistics.computing, statistics.queued) == (2, 0)


def test_no_waiting_is_counted_after_the_end() -> None:
    scheduler = make(replicas=1, draft_ranks=1, end_item=1)
    scheduler.next_dispatches(0.0)
    scheduler.on_computed(0, 0, 1.0)
    scheduler.on_released(0, 0, 2.0)
    statistics = scheduler.statistics(50.0)
    assert (statistics.target_wait_s, statistics.draft_wait_s) == (0.0, 1.0)


def test_without_draft_ranks_a_computed_item_is_released() -> None:
    scheduler = make(draft_ranks=0, slots=2, end_item=4)
    assert [d.item for d in scheduler.next_dispatches(0.0)] == [0, 1]
    scheduler.on_computed(1, 1, 1.0)
    assert scheduler.next_dispatches(1.0) == []
    scheduler.on_computed(0, 0, 2.0)
    assert [d.item for d in scheduler.next_dispatches(2.0)] == [2, 3]


def test_configuration_is_checked() -> None:
    with pytest.raises(ConfigError, match=r"scheduler\.queue_depth"):
        SchedulerConfig(queue_depth=0)
    with pytest.raises(ValueError, match="0 slots"):
        make(slots=0)


def test_the_benchmark_runs() -> None:
    cost = measure(draft_ranks=8, replicas=2, items=10, connections=4)
    assert cost.messages_per_item == 18
    assert min(cost.protocol_ms, cost.server_ms) > 0


def random_world(seed: int, scheduler: Scheduler, replicas: int, skew: float = 1.0) -> World:
    """Replicas and draft ranks whose forwards, steps, transfers and messages take random times."""
    rng = random.Random(seed)
    times = Times(
        forward=lambda *_: rng.choice((0.01, 1.0, rng.expovariate(1.0))),
        train=lambda *_: skew * rng.expovariate(10.0),
        transfer=lambda *_: rng.expovariate(20.0),
        message=lambda: rng.expovariate(20.0),
    )
    return World(scheduler, replicas, times, rng.randint(1, 3))


def check(world: World, items: int) -> None:
    assert world.scheduler.finished, "deadlock: nothing moves any more"
    assert sorted(world.arrivals) == list(range(items))
    assert world.trained == [items] * world.scheduler.draft_ranks
    statistics = world.scheduler.statistics(world.now)
    assert statistics.dispatched == statistics.released
    assert statistics.computing == statistics.queued == 0


def orders(world: World) -> tuple[list[list[int]], list[list[int]]]:
    """What each replica was given, and what it delivered."""
    targets = world.targets.values()
    return [target.dispatched for target in targets], [target.delivered for target in targets]


def test_a_thousand_draft_ranks_and_128_replicas() -> None:
    items = 220
    scheduler = make(replicas=128, draft_ranks=1024, slots=192, end_item=items)
    world = random_world(1, scheduler, 128)
    world.run()
    check(world, items)
    dispatched, delivered = orders(world)
    assert delivered == dispatched
    assert Counter(itertools.chain(*dispatched)) == Counter(range(items))
    for sequence in dispatched:
        assert sequence == sorted(sequence)


@pytest.mark.parametrize("block", range(10))
def test_random_small_worlds(block: int) -> None:
    for seed in range(block * 40, block * 40 + 40):
        rng = random.Random(seed)
        replicas, items = rng.randint(1, 5), rng.randint(0, 40)
        depth, skew = rng.randint(1, 4), rng.choice((0.1, 1.0, 20.0))
        scheduler = make(
            replicas=replicas, draft_ranks=rng.randint(1, 5), slots=rng.randint(1, 9), queue_depth=depth, end_item=items
        )
        world = random_world(seed, scheduler, replicas, skew)
        world.run()
        check(world, items)
        dispatched, delivered = orders(world)
        assert delivered == dispatched


@pytest.mark.parametrize("block", range(5))
def test_replicas_that_vanish_and_stops_at_any_moment(block: int) -> None:
    for seed in range(block * 40, block * 40 + 40):
        rng = random.Random(seed)
        replicas = rng.randint(2, 5)
        scheduler = make(replicas=replicas, draft_ranks=rng.randint(1, 4), slots=rng.randint(1, 9))
        world = random_world(seed, scheduler, replicas)

        def stop(world: World = world) -> None:
            world.scheduler.stop_after(min(world.trained))

        for replica in range(1, rng.randint(1, replicas)):
            world.at(rng.uniform(0.0, 5.0), world.lose, replica)
        world.at(rng.uniform(0.0, 10.0), stop)
        world.run()
        assert world.scheduler.finished
        check(world, scheduler.statistics(world.now).dispatched)
        for given, delivered in zip(*orders(world), strict=True):
            assert delivered == given[: len(delivered)]


def test_the_share_of_the_full_rate_is_measured() -> None:
    alone = measure_case(Case((1.0,), slots=4), items=200)
    assert alone == pytest.approx(1.0, abs=0.02)
    assert Case.of(["1x3", "0.5"]).ideal == 0.875
