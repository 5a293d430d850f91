# SPDX-License-Identifier: Apache-2.0
"""The order in which sequences are trained, cut into steps, micro-batches and work items: a pure function of (sizes of
the sequences, seed, batching, cursor).

Nothing is remembered between steps but the cursor, so any rank can compute any item. The sequences of a step and its
micro-batches are the recipe's, and stay what they are on any number of ranks; these only decide how many of the
micro-batches make one item.
"""

import math
from bisect import bisect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import numpy as np

from specdist.core.errors import ConfigError, DataError
from specdist.core.progress import Batching, Cursor
from specdist.core.records import Shard, WorkItem

FILL, EVEN = 0.95, 1.05
"""Of the room of a step's micro-batches, what its sequences take at most, so that there is choice in where they go; and
the slowest beside the mean, for which more of the room is tried: where few sequences fill a micro-batch, it helps."""
COUNTED = 100_000
"""Sequences that `Stream.count_steps` packs, in half a second; how many steps the others make is estimated."""
_ORDERED = 512
"""Places of the shuffle that are computed at once, at least."""
_ROUNDS = 6
_ODD = np.uint64(0xD6E8FEB86659FD93)


class Shuffle:
    """A permutation of 0 to `count` - 1, another one for every seed and epoch.

    A Feistel network permutes the numbers of as many bits as `count` has; a place that comes out beyond `count` is put
    in again until it does not (Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002).
    The keys are of NumPy's SeedSequence, whose numbers never change (NEP 19).
    """

    def __init__(self, count: int, seed: int, epoch: int) -> None:
        self.count = count
        self._bits = max((count - 1).bit_length(), 6)
        self._keys = np.random.SeedSequence([seed, epoch]).generate_state(_ROUNDS, np.uint64)

    def __call__(self, first: int, last: int) -> np.ndarray:
        """int64 [last - first], what stands at the places `first` to `last` - 1."""
        found = self._permuted(np.arange(first, last, dtype=np.uint64))
        while len(outside := np.flatnonzero(found >= self.count)):
            found[outside] = self._permuted(found[outside])
        return found.astype(np.int64)

    def _permuted(self, values: np.ndarray) -> np.ndarray:
        upper, lower = self._bits - self._bits // 2, self._bits // 2  # bits of the two halves, which change places
        left, right = values >> np.uint64(lower), values & np.uint64((1 << lower) - 1)
        for key in self._keys:
            mixed = (right + key) * _ODD
            mixed = (mixed ^ (mixed >> np.uint64(32))) * _ODD
            left, right = right, left ^ (mixed >> np.uint64(64 - upper))
            upper, lower = lower, upper
        return (left << np.uint64(lower)) | right


@dataclass(frozen=True)
class Sizes:
    """Of `count` sequences with `tokens` tokens, `longest` of them in the longest, what computes the sizes of some."""

    count: int
    longest: int
    tokens: int
    lengths: Callable[[np.ndarray], np.ndarray]
    """The tokens of the sequences with these indices."""
    supervised: Callable[[np.ndarray], np.ndarray]
    """How many of them are supervised."""

    @classmethod
    def of(cls, lengths: np.ndarray, supervised: np.ndarray | None = None) -> Self:
        marks = np.zeros_like(lengths) if supervised is None else supervised
        longest, total = int(np.max(lengths, initial=0)), int(np.sum(lengths, dtype=np.int64))
        return cls(len(lengths), longest, total, lengths.__getitem__, marks.__getitem__)


class Stream:
    """Cuts shuffled epochs into steps of `batching.micro_batches` micro-batches of at most `batching.tokens` tokens.

    Every sequence comes exactly once an epoch. A step never spans two epochs; the last of an epoch may be smaller and
    leave micro-batches empty. Within a step the micro-batches cost alike: a sequence of t tokens, s of them supervised,
    costs t + s (w0 + w1 t / 1024) / 1000 for the batching's `weights` (w0, w1).
    """

    def __init__(self, sizes: Sizes, batching: Batching, seed: int, shards: int | None = None, pods: int = 1) -> None:
        """
        Args:
            shards: draft data-parallel ranks of a pod, a micro-batch each; by default as many as a step has
                micro-batches.
            pods: items that all draft ranks train on at once.
        """
        self.sizes, self.batching, self.seed = sizes, batching, seed
        self.shards, self.pods = batching.micro_batches if shards is None else shards, pods
        if not sizes.count:
            raise DataError("there is no sequence to stream")
        if self.ranks < 1:
            raise ConfigError(f"{self.ranks} draft data-parallel ranks: at least 1 is needed")
        if sizes.longest > batching.tokens:
            raise ConfigError(
                f"the longest sequence has {sizes.longest} tokens, more than the budget of a micro-batch: lower "
                f"prompts.max_length to {batching.tokens} or raise prompts.tokens_per_rank from {batching.tokens} "
                f"to {sizes.longest}",
                "prompts.max_length prompts.tokens_per_rank",
            )

    @property
    def ranks(self) -> int:
        """Draft data-parallel ranks."""
        return self.shards * self.pods

    @property
    def accumulation(self) -> int:
        """Micro-batches of each of them in a step."""
        return -(-self.batching.micro_batches // self.ranks)

    def items(self, start: Cursor | None = None, index: int = 0, epochs: int | None = None) -> Iterator[WorkItem]:
        """The work items of the steps from `start` on, numbered from `index`, up to Cursor(epochs, 0), or for ever; the
        pods have them in turn. Raises DataError: `start` lies beyond the epoch's end: it belongs to other prompts."""
        for begin, end, batches in self.steps(start, epochs):
            batches = batches + [Shard((), ())] * (self.accumulation * self.ranks - len(batches))
            for first in range(0, len(batches), self.shards):
                shards, pod = tuple(batches[first : first + self.shards]), first // self.shards % self.pods
                yield WorkItem(index, begin, end, shards, first=first, pod=pod)
                index += 1

    def steps(
        self, start: Cursor | None = None, epochs: int | None = None
    ) -> Iterator[tuple[Cursor, Cursor, list[Shard]]]:
        """The cursors before and after every step, and its micro-batches; see `items`."""
        cursor, count = start or Cursor(), self.sizes.count
        if not 0 <= cursor.position <= count:
            raise DataError(f"{cursor} lies outside an epoch of {count} sequences: the prompts have changed")
        epoch, position = cursor.epoch, cursor.position
        while epochs is None or epoch < epochs:
            for sequences, lengths, places in self._cuts(epoch, position):
                begin, position = Cursor(epoch, position), position + len(sequences)
                end = Cursor(epoch, position) if position < count else Cursor(epoch + 1, 0)
                yield begin, end, self._micro_batches(sequences, lengths, places)
            epoch, position = epoch + 1, 0

    def count_steps(self, epochs: int, start: Cursor | None = None) -> int:
        """How many steps `steps(start, epochs)` gives. Where that is more than `COUNTED` sequences it is estimated from
        the tokens of so many, to be at least as many: a thousandth more, about."""
        first = start or Cursor()
        left = (epochs - first.epoch) * self.sizes.count - first.position
        counted, steps, tokens = 0, 0, list[int]()  # sequences, steps, and the tokens of those that no epoch ends
        for epoch in range(first.epoch, epochs):
            for sequences, lengths, _ in self._cuts(epoch, first.position if epoch == first.epoch else 0):
                counted, steps = counted + len(sequences), steps + 1
                if (first.position + counted) % self.sizes.count:
                    tokens.append(int(lengths.sum()))
                if COUNTED <= counted < left and tokens:
                    rest = (left - counted) * self.sizes.tokens / self.sizes.count
                    mean, error = np.mean(tokens), np.std(tokens) / len(tokens) ** 0.5
                    return steps + epochs - epoch + math.ceil(rest / (mean - 4 * error))
        return steps

    def _cuts(self, epoch: int, position: int) -> Iterator[tuple[np.ndarray, np.ndarray, list[int]]]:
        """Of every step of one epoch from `position` on: its sequences, their lengths, and their micro-batches."""
        count, batching = self.sizes.count, self.batching
        shuffle = Shuffle(count, self.seed, epoch)
        room = batching.step_tokens
        choice = batching.micro_batches > 1 or batching.order == 1
        fills = (FILL, 1.0) if choice else (1.0,)
        sequences = lengths = np.zeros(0, np.int64)  # from `position` on
        while position < count:
            while (known := position + len(sequences)) < count and lengths.sum() <= room:
                more = shuffle(known, min(known + max(_ORDERED, 16 * batching.micro_batches), count))
                sequences = np.concatenate([sequences, more])
                lengths = np.concatenate([lengths, self.sizes.lengths(more)])
            ends, costs, places, best = np.cumsum(lengths), self._costs(sequences, lengths), list[int](), np.inf
            for fill in fills:
                bound = max(int(np.searchsorted(ends, int(fill * room), side="right")), 1)
                found = self._longest_fit(lengths[:bound], costs[:bound])
                spent = np.bincount(found, costs[: len(found)], batching.micro_batches)
                if (uneven := spent.max() / spent.mean()) < best:
                    places, best = found, uneven
                if best < EVEN:
                    break
            taken = len(places)
            yield sequences[:taken], lengths[:taken], places
            sequences, lengths, position = sequences[taken:], lengths[taken:], position + taken

    def _costs(self, sequences: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """int64, in whole numbers, so that they are the same on every machine."""
        supervised = self.sizes.supervised(sequences).astype(np.int64)
        once, per_token = self.batching.weights
        return 1000 * lengths + supervised * (once + per_token * lengths // 1024)

    def _longest_fit(self, lengths: np.ndarray, costs: np.ndarray) -> list[int]:
        """The micro-batch of each sequence of the longest prefix found to fit; it is shortened by a 128th at a time."""
        bins = self.batching.micro_batches
        if bins == 1:
            return [0] * len(lengths)
        values, dear, dearest = lengths.tolist(), costs.tolist(), np.argsort(-costs, kind="stable")
        count, fewer = len(values), max(1, len(values) // 128)
        while (found := self._place(values, dear, dearest, count)) is None:
            count = max(count - fewer, bins)  # one sequence each always fits
        return found

    def _place(self, lengths: list[int], costs: list[int], dearest: np.ndarray, count: int) -> list[int] | None:
        """The micro-batch of each of the first `count` sequences: the dearest first, each where least has been spent
        so far and it has room; None where one has room nowhere.

        LPT of Graham (1969), ties by order and by micro-batch. What has been spent is kept in order, as cost * bins +
        micro-batch in one integer, and the room beside it: passing over a full one is cheaper there than in a heap.
        """
        bins = self.batching.micro_batches
        spent, room, places = list(range(bins)), [self.batching.tokens] * bins, [0] * count
        for sequence in dearest[dearest < count].tolist():
            length = lengths[sequence]
            for at, left in enumerate(room):  # noqa: B007
                if left >= length:
                    break
            else:
                return None
            del room[at]
            entry = spent.pop(at)
            places[sequence] = entry % bins
            to = bisect(spent, entry := entry + costs[sequence] * bins, at)
            spent.insert(to, entry)
            room.insert(to, left - length)
        return places

    def _micro_batches(self, sequences: np.ndarray, lengths: np.ndarray, places: list[int]) -> list[Shard]:
        ends = np.bincount(places, minlength=self.batching.micro_batches).cumsum().tolist()
        order = np.argsort(places, kind="stable")
        own, sizes = sequences[order].tolist(), lengths[order].tolist()
        return [Shard(tuple(own[a:b]), tuple(sizes[a:b])) for a, b in pairwise([0, *ends])]
