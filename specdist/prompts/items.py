# SPDX-License-Identifier: Apache-2.0
"""Work items by index, on every rank: the stream is a pure function, so no rank is ever told what is in an item."""

import itertools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from specdist.core.progress import Batching, Cursor
from specdist.core.records import Shard, WorkItem
from specdist.prompts.corpus import Corpus
from specdist.prompts.schedule import Schedule
from specdist.prompts.stream import Sizes, Stream


class Items:
    """A window over the stream that moves forward. Safe to use from several threads."""

    def __init__(self, stream: Stream, start: Cursor, schedule: Schedule, evaluation: Sequence[WorkItem] = ()):
        """
        Args:
            start: the stream's place at the first training item.
            evaluation: the items of one evaluation, `schedule.evaluation_items` of them; their numbers do not count.
        """
        self.schedule = schedule
        self._source = _numbered(stream, start, schedule, evaluation)
        self._window: dict[int, WorkItem] = {}
        self._next = self._floor = schedule.first_item
        self._lock = threading.Lock()

    def __getitem__(self, index: int) -> WorkItem:
        """Item `index`; it must not have been forgotten."""
        with self._lock:
            while self._next <= index:
                item = next(self._source)
                if self._next >= self._floor:
                    self._window[self._next] = item
                self._next += 1
            return self._window[index]

    def forget(self, before: int) -> None:
        """Drop the items below `before`; they will not be asked for again."""
        with self._lock:
            self._floor = max(self._floor, before)
            for index in [i for i in self._window if i < before]:
                del self._window[index]


def evaluation_items(
    corpus: Corpus, shards: int, tokens: int, seed: int, limit: int | None, pods: int = 1
) -> list[WorkItem]:
    """The items of one evaluation, of `shards` shards of at most `tokens` tokens: the held-out sequences, or `limit` of
    them, evenly spread; as many items for each of the `pods`. Their numbers are those of a stream of their own."""
    heldout = corpus.heldout_indices
    count = len(heldout) if limit is None else min(limit, len(heldout))
    if not count:
        return []
    held_out = heldout.start + np.arange(count) * len(heldout) // count
    own = Stream(Sizes.of(corpus.lengths_of(held_out)), Batching(shards * pods, tokens), seed, shards, pods)

    def of_corpus(item: WorkItem) -> WorkItem:
        shards = (Shard(tuple(held_out[list(s.sequences)].tolist()), s.lengths) for s in item.shards)
        return replace(item, shards=tuple(shards), evaluated=True)

    return [of_corpus(item) for item in own.items(epochs=1)]


def _numbered(stream: Stream, start: Cursor, schedule: Schedule, evaluation: Sequence[WorkItem]) -> Iterator[WorkItem]:
    end = Cursor(schedule.epochs or 0)
    empty = WorkItem(0, end, end, (Shard((), ()),) * stream.shards)
    nothing = itertools.cycle([replace(empty, pod=pod) for pod in range(stream.pods)])
    training = itertools.chain(stream.items(start, epochs=schedule.epochs), nothing)
    for step in range(schedule.first_step, schedule.total_steps + 1):
        if due := schedule.evaluation(step):
            for index, item in zip(due, evaluation, strict=True):
                yield replace(item, index=index)
        for index in schedule.training(step):
            yield replace(next(training), index=index)
