# SPDX-License-Identifier: Apache-2.0
"""Every sequence once an epoch, the same order for every number of shards, and resuming from anywhere."""

import itertools
import time

import numpy as np
import pytest

from specdist.core.errors import ConfigError, DataError
from specdist.core.progress import Cursor
from specdist.core.records import WorkItem
from specdist.prompts.stream import Stream

BUDGET = 256


def lengths(count: int, seed: int = 0) -> np.ndarray:
    return np.clip(np.random.default_rng(seed).lognormal(4, 1, count), 2, BUDGET).astype(np.int32)


def in_order(items: list[WorkItem], stream: Stream) -> list[int]:
    """The sequences of items of one epoch, in the epoch's order."""
    rank = np.argsort(stream.order(items[0].start.epoch))
    return [s for item in items for s in sorted((s for x in item.shards for s in x.sequences), key=rank.__getitem__)]


@pytest.mark.parametrize("count", [1, 3, 100, 1000])
@pytest.mark.parametrize("shards", [1, 2, 3, 8, 64])
def test_every_sequence_once_an_epoch_within_the_budget(count: int, shards: int) -> None:
    stream = Stream(lengths(count), shards, BUDGET, seed=1)
    items = list(stream.items(epochs=3))
    assert [item.index for item in items] == list(range(len(items)))
    assert items[0].start == Cursor()
    assert all(a.end == b.start for a, b in itertools.pairwise(items))
    assert items[-1].end == Cursor(3, 0)
    for epoch in range(3):
        own = [item for item in items if item.start.epoch == epoch]
        assert in_order(own, stream) == stream.order(epoch).tolist()
    for item in items:
        assert len(item.shards) == shards
        for shard in item.shards:
            assert shard.tokens <= BUDGET
            assert shard.lengths == tuple(stream.lengths[list(shard.sequences)])
    assert stream.count_items(3) == len(items)


def test_shards_keep_the_order_and_are_balanced() -> None:
    stream = Stream(lengths(4000), 4, 4096, seed=0)
    rank = np.argsort(stream.order(0))
    *items, _ = stream.items(epochs=1)
    for item in items:
        loads = [shard.tokens for shard in item.shards]
        assert max(loads) - min(loads) <= BUDGET
        assert min(loads) > 0.95 * 4096
        for shard in item.shards:
            assert (np.diff(rank[list(shard.sequences)]) > 0).all()


def test_one_more_sequence_would_not_fit() -> None:
    stream = Stream(lengths(300), 3, BUDGET, seed=2)
    order = stream.order(0)
    for item in list(stream.items(epochs=1))[:-1]:
        longer = stream.lengths[order[item.start.position : item.end.position + 1]]
        loads = [0, 0, 0]
        for length in sorted(longer.tolist(), reverse=True):
            loads[loads.index(min(loads))] += length
        assert max(loads) > BUDGET


@pytest.mark.parametrize("shards", [1, 3, 16])
def test_resuming_from_any_item_gives_the_rest(shards: int) -> None:
    stream = Stream(lengths(200), shards, BUDGET, seed=3)
    items = list(stream.items(epochs=2))
    for done in range(len(items)):
        last = items[done]
        assert list(stream.items(last.end, last.index + 1, epochs=2)) == items[done + 1 :]


def test_resuming_on_another_number_of_shards_covers_exactly_the_rest() -> None:
    before, after = (Stream(lengths(300), shards, BUDGET, seed=4) for shards in (3, 7))
    for item in before.items(epochs=1):
        rest = list(after.items(item.end, epochs=1))
        given = before.order(0)[: item.end.position if item.end.epoch == 0 else 300].tolist()
        assert given + (in_order(rest, after) if rest else []) == before.order(0).tolist()


def test_epochs_and_seeds_shuffle_differently_and_repeatably() -> None:
    orders = [Stream(lengths(50), 2, BUDGET, seed).order(epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert Stream(lengths(50), 9, BUDGET, 1).order(1).tolist() == orders[3]
    assert Stream(np.ones(8), 1, 8, 0).order(0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]  # the same on every machine


def test_streams_without_end_and_positions_at_the_end() -> None:
    stream = Stream(lengths(10), 2, BUDGET, 0)
    assert next(stream.items(Cursor(0, 10))).start == Cursor(1, 0)
    assert next(itertools.islice(stream.items(), 100, None)).start.epoch > 5
    assert list(stream.items(Cursor(2, 0), epochs=2)) == []
    assert stream.count_items(2, Cursor(1, 0)) == len(list(stream.items(Cursor(1, 0), epochs=2)))


def test_what_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"300 tokens.*prompts\.max_length to 256.*prompts\.tokens_per_rank from 256"):
        Stream(np.array([2, 300]), 2, BUDGET, 0)
    with pytest.raises(DataError, match="no sequence"):
        Stream(np.zeros(0), 2, BUDGET, 0)
    with pytest.raises(ConfigError, match="0 draft"):
        Stream(lengths(3), 0, BUDGET, 0)
    with pytest.raises(DataError, match="prompts have changed"):
        next(Stream(lengths(3), 1, BUDGET, 0).items(Cursor(0, 4)))


def test_planning_is_cheap() -> None:
    stream = Stream(lengths(50_000), 8, 2048, 0)
    started = time.perf_counter()
    count = stream.count_items(1)
    assert (time.perf_counter() - started) / count < 2e-3  # about 100 us alone on a core
