# SPDX-License-Identifier: Apache-2.0
"""The order in which sequences are trained, cut into work items: a pure function of (lengths, seed, epoch, cursor).

Nothing is remembered between items but the cursor, so any rank can compute any item, and a run resumes at any item on
any number of shards: the order of the sequences depends on the seed and the epoch alone, and only where it is cut
depends on the shards.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import numpy as np

from specdist.core.errors import ConfigError, DataError
from specdist.core.progress import Cursor
from specdist.core.records import Shard, WorkItem


class Stream:
    """Cuts shuffled epochs of `lengths` [N] into work items of `shards` shards of at most `tokens_per_shard` tokens.

    Every sequence comes exactly once an epoch. An item never spans two epochs; the last of an epoch may be smaller and
    leave shards empty.
    """

    def __init__(self, lengths: np.ndarray, shards: int, tokens_per_shard: int, seed: int) -> None:
        if not len(lengths):
            raise DataError("there is no sequence to stream")
        if seed < 0:
            raise ConfigError(f"the seed of the stream is {seed}: it must not be negative")
        if shards < 1:
            raise ConfigError(f"{shards} draft data-parallel ranks: at least 1 is needed")
        longest = int(np.max(lengths))
        if longest > tokens_per_shard:
            raise ConfigError(
                f"the longest sequence has {longest} tokens, more than the budget of a micro-batch: lower "
                f"prompts.max_length to {tokens_per_shard} or raise prompts.tokens_per_rank from {tokens_per_shard} "
                f"to {longest}",
                "prompts.max_length prompts.tokens_per_rank",
            )
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.shards = shards
        self.tokens_per_shard = tokens_per_shard
        self.seed = seed

    def order(self, epoch: int) -> np.ndarray:
        """int64 [N], the sequences in the order of an epoch.

        Sorted by raw words of the bit generator, whose stream NumPy never changes (NEP 19); its `permutation` may.
        """
        words = np.random.PCG64(np.random.SeedSequence([self.seed, epoch])).random_raw(len(self.lengths))
        return np.argsort(words, kind="stable")

    def items(self, start: Cursor | None = None, index: int = 0, epochs: int | None = None) -> Iterator[WorkItem]:
        """The work items from `start` on, numbered from `index`, up to Cursor(epochs, 0), or for ever.

        Raises:
            DataError: `start` lies beyond the epoch's end: it belongs to other prompts.
        """
        cursor = start or Cursor()
        if not 0 <= cursor.position <= len(self.lengths):
            raise DataError(
                f"{cursor} lies outside an epoch of {len(self.lengths)} sequences: the prompts have changed"
            )
        epoch, position = cursor.epoch, cursor.position
        while epochs is None or epoch < epochs:
            order = self.order(epoch)
            for begin, end, assignment in self._cuts(order, position):
                after = Cursor(epoch, end) if end < len(order) else Cursor(epoch + 1, 0)
                yield WorkItem(index, Cursor(epoch, begin), after, self._shards(order[begin:end], assignment))
                index += 1
            epoch, position = epoch + 1, 0

    def count_items(self, epochs: int, start: Cursor | None = None) -> int:
        """How many items `items(start, epochs=epochs)` gives. Plans them: about a second per million sequences."""
        first = start or Cursor()
        return sum(
            sum(1 for _ in self._cuts(self.order(epoch), first.position if epoch == first.epoch else 0))
            for epoch in range(first.epoch, epochs)
        )

    def _cuts(self, order: np.ndarray, position: int) -> Iterator[tuple[int, int, list[int]]]:
        """(begin, end, shard of every sequence in between) of the items of one epoch from `position` on."""
        lengths = self.lengths[order]
        ends = np.cumsum(lengths)
        while position < len(order):
            before = int(ends[position - 1]) if position else 0
            bound = int(np.searchsorted(ends, before + self.shards * self.tokens_per_shard, side="right"))
            assignment = self._longest_fit(lengths[position:bound])
            yield position, position + len(assignment), assignment
            position += len(assignment)

    def _longest_fit(self, lengths: np.ndarray) -> list[int]:
        """The shard of each sequence of a prefix of `lengths` that fits and that one more sequence would overflow.

        Searched from the whole downwards in growing steps, then by bisection, so a big item costs few placements. Above
        2,048 sequences the search stops within a thousandth of that end.
        """
        values = lengths.tolist()
        if self.shards == 1:
            return [0] * len(values)
        by_length = np.argsort(-lengths, kind="stable")
        found = self._place(values, by_length, len(values))
        too_many = len(values)
        grain = step = max(1, len(values) // 1024)
        while found is None:
            count = max(too_many - step, self.shards)  # one sequence per shard always fits
            found = self._place(values, by_length, count)
            if found is None:
                too_many, step = count, 2 * step
        while too_many - len(found) > grain:
            count = (len(found) + too_many) // 2
            placed = self._place(values, by_length, count)
            if placed is None:
                too_many = count
            else:
                found = placed
        return found

    def _place(self, values: list[int], by_length: np.ndarray, count: int) -> list[int] | None:
        """The shard of each of the first `count` sequences, longest first onto the least loaded; None on overflow.

        LPT of Graham (1969), ties by order and by shard. A heap entry is load * shards + shard, in one integer.
        """
        shards = self.shards
        full = (self.tokens_per_shard + 1) * shards
        heap = list(range(shards))
        replace = heapq.heapreplace
        assignment = [0] * count
        for sequence in by_length[by_length < count].tolist():
            least = heap[0]
            loaded = least + values[sequence] * shards
            if loaded >= full:
                return None
            replace(heap, loaded)
            assignment[sequence] = least % shards
        return assignment

    def _shards(self, sequences: np.ndarray, assignment: list[int]) -> tuple[Shard, ...]:
        members: list[list[int]] = [[] for _ in range(self.shards)]
        for sequence, shard in zip(sequences.tolist(), assignment, strict=True):
            members[shard].append(sequence)
        return tuple(Shard(tuple(own), tuple(self.lengths[own].tolist())) for own in members)
