# SPDX-License-Identifier: Apache-2.0
"""Every sequence once an epoch, the same order for every number of shards, and resuming from anywhere."""

import itertools
import time

import numpy as np
import pytest

from specdist.core.errors import ConfigError, DataError
from specdist.core.progress import Batching, Cursor
from specdist.core.records import WorkItem
from specdist.prompts.stream import COUNTED, Shuffle, Sizes, Stream

BUDGET = 256


def lengths(count: int, seed: int = 0) -> np.ndarray:
    return np.clip(np.random.default_rng(seed).lognormal(4, 1, count), 2, BUDGET).astype(np.int32)


def stream_of(lengths: np.ndarray, micro_batches: int, tokens: int = BUDGET, seed: int = 0, shards: int | None = None):
    return Stream(Sizes.of(lengths), Batching(micro_batches, tokens), seed, shards)


def order(stream: Stream, epoch: int) -> np.ndarray:
    return Shuffle(stream.sizes.count, stream.seed, epoch)(0, stream.sizes.count)


def in_order(items: list[WorkItem], stream: Stream) -> list[int]:
    """The sequences of items of one epoch, in the epoch's order."""
    rank = np.argsort(order(stream, items[0].start.epoch))
    return [s for item in items for s in sorted((s for x in item.shards for s in x.sequences), key=rank.__getitem__)]


@pytest.mark.parametrize("count", [1, 3, 100, 1000])
@pytest.mark.parametrize("shards", [1, 2, 3, 8, 64])
def test_every_sequence_once_an_epoch_within_the_budget(count: int, shards: int) -> None:
    sizes = lengths(count)
    stream = stream_of(sizes, shards, seed=1)
    items = list(stream.items(epochs=3))
    assert [item.index for item in items] == list(range(len(items)))
    assert items[0].start == Cursor()
    assert all(a.end == b.start for a, b in itertools.pairwise(items))
    assert items[-1].end == Cursor(3, 0)
    for epoch in range(3):
        own = [item for item in items if item.start.epoch == epoch]
        assert in_order(own, stream) == order(stream, epoch).tolist()
    for item in items:
        assert len(item.shards) == shards
        for shard in item.shards:
            assert shard.tokens <= BUDGET
            assert shard.lengths == tuple(sizes[list(shard.sequences)])
    assert stream.count_steps(3) == len(items)


def test_micro_batches_keep_the_order_and_cost_alike() -> None:
    sizes = lengths(6000)
    supervised = (sizes * np.random.default_rng(1).uniform(0.2, 1, len(sizes))).astype(np.int32)
    weights = (30_000, 2_000)
    stream = Stream(Sizes.of(sizes, supervised), Batching(4, 4096, weights=weights), seed=0)
    rank, apart = np.argsort(order(stream, 0)), []
    *items, _ = stream.items(epochs=1)
    for item in items:
        costs = [
            sum(sizes[i] + supervised[i] * (weights[0] + weights[1] * sizes[i] / 1024) / 1000 for i in shard.sequences)
            for shard in item.shards
        ]
        apart.append(max(costs) / np.mean(costs))
        assert item.tokens > 0.9 * 4 * 4096
        for shard in item.shards:
            assert (np.diff(rank[list(shard.sequences)]) > 0).all()
    assert np.mean(apart) < 1.01


@pytest.mark.parametrize("count", [1, 2, 8])
@pytest.mark.parametrize(("length", "each"), [(BUDGET, 1), (BUDGET // 2, 2), (BUDGET // 3, 3), (BUDGET // 2 + 1, 1)])
def test_sequences_that_fill_a_micro_batch_leave_none_empty(length: int, each: int, count: int) -> None:
    *items, _ = stream_of(np.full(500, length), count).items(epochs=1)
    assert {len(shard.sequences) for item in items for shard in item.shards} == {each}


@pytest.mark.parametrize("shards", [1, 2, 3, 4, 5])
def test_a_step_is_the_same_on_any_number_of_ranks(shards: int) -> None:
    whole, split = (stream_of(lengths(300), 4, seed=5, shards=s) for s in (4, shards))
    items, each = list(split.items(epochs=1)), split.accumulation
    assert each == -(-4 // shards)
    for step, expected in enumerate(whole.items(epochs=1)):
        own = items[step * each : (step + 1) * each]
        assert {(item.start, item.end) for item in own} == {(expected.start, expected.end)}
        assert [item.first for item in own] == list(range(0, each * shards, shards))
        shared = [shard for item in own for shard in item.shards]
        assert tuple(shared[:4]) == expected.shards
        assert not any(shard.tokens for shard in shared[4:])


@pytest.mark.parametrize(("version", "each"), [(1, 1), (2, 2)])
def test_a_step_of_one_micro_batch_is_full_in_runs_that_begin_now(version: int, each: int) -> None:
    stream = Stream(Sizes.of(np.full(8, BUDGET // 2)), Batching(1, BUDGET, order=version), seed=0)
    assert [len(item.shards[0].sequences) for item in stream.items(epochs=1)] == [each] * (8 // each)


@pytest.mark.parametrize("shards", [1, 3, 16])
def test_resuming_from_any_item_gives_the_rest(shards: int) -> None:
    stream = stream_of(lengths(200), shards, seed=3)
    items = list(stream.items(epochs=2))
    for done in range(len(items)):
        last = items[done]
        assert list(stream.items(last.end, last.index + 1, epochs=2)) == items[done + 1 :]


def test_resuming_on_another_number_of_shards_covers_exactly_the_rest() -> None:
    before, after = (stream_of(lengths(300), shards, seed=4) for shards in (3, 7))
    for item in before.items(epochs=1):
        rest = list(after.items(item.end, epochs=1))
        given = order(before, 0)[: item.end.position if item.end.epoch == 0 else 300].tolist()
        assert given + (in_order(rest, after) if rest else []) == order(before, 0).tolist()


def test_epochs_and_seeds_shuffle_differently_and_repeatably() -> None:
    orders = [order(stream_of(lengths(50), 2, seed=seed), epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert order(stream_of(lengths(50), 9, seed=1), 1).tolist() == orders[3]
    assert Shuffle(8, 0, 0)(0, 8).tolist() == [6, 0, 7, 5, 1, 4, 3, 2]  # the same on every machine
    assert Shuffle(10**8, 3, 1)(10**7, 10**7 + 3).tolist() == [3648346, 65216911, 97051906]


@pytest.mark.parametrize("count", [1, 2, 7, 64, 65, 1000])
def test_a_shuffle_gives_every_place_of_its_own(count: int) -> None:
    shuffle = Shuffle(count, 5, 2)
    whole = shuffle(0, count)
    assert sorted(whole.tolist()) == list(range(count))
    assert np.concatenate([shuffle(i, i + 1) for i in range(count)]).tolist() == whole.tolist()


def test_every_shuffle_is_about_as_likely() -> None:
    seen = np.zeros((5, 5))
    for epoch in range(2000):
        seen[np.arange(5), Shuffle(5, 1, epoch)(0, 5)] += 1
    assert (abs(seen - 400) < 90).all()  # five standard deviations
    long = Shuffle(20_000, 0, 0)(0, 20_000)
    assert abs(np.corrcoef(long[1:], long[:-1])[0, 1]) < 0.03
    assert abs(np.corrcoef(long, np.arange(20_000))[0, 1]) < 0.03


def test_streams_without_end_and_positions_at_the_end() -> None:
    stream = stream_of(lengths(10), 2)
    assert next(stream.items(Cursor(0, 10))).start == Cursor(1, 0)
    assert next(itertools.islice(stream.items(), 100, None)).start.epoch > 5
    assert list(stream.items(Cursor(2, 0), epochs=2)) == []
    assert stream.count_steps(2, Cursor(1, 0)) == len(list(stream.items(Cursor(1, 0), epochs=2)))


def test_what_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"300 tokens.*prompts\.max_length to 256.*prompts\.tokens_per_rank from 256"):
        stream_of(np.array([2, 300]), 2)
    with pytest.raises(DataError, match="no sequence"):
        stream_of(np.zeros(0), 2)
    with pytest.raises(ConfigError, match="0 draft"):
        stream_of(lengths(3), 2, shards=0)
    with pytest.raises(DataError, match="prompts have changed"):
        next(stream_of(lengths(3), 1).items(Cursor(0, 4)))


def test_many_steps_are_counted_by_an_estimate_that_is_never_too_low() -> None:
    for seed in range(3):
        stream = stream_of(lengths(3 * COUNTED, seed), 8, 2048, seed)
        started = time.process_time()
        count = stream.count_steps(1)
        assert time.process_time() - started < 5  # a third of a second
        made = sum(1 for _ in stream.steps(epochs=1))
        assert made <= count <= 1.003 * made


def test_steps_that_end_an_epoch_early_are_not_taken_for_the_usual_ones() -> None:
    short = np.random.default_rng(0).integers(20, 80, COUNTED // 2)
    stream = stream_of(short, 64, 16384)
    made = sum(1 for _ in stream.steps(epochs=8))
    assert made <= stream.count_steps(8) <= made + 8  # before, a step or two of an epoch's end made it three times
