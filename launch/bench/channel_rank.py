# SPDX-License-Identifier: Apache-2.0
"""One rank of a channel's benchmark: it drives the project's own sender or receiver as training does.

The scheduler's part, what was sent and what is free, is told from rank to rank (`channel_notes`). A draft rank posts
from a thread of its own, so that transfers go on while it waits for an item.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from dataclasses import dataclass

import torch
from torch import Tensor

from specdist.channel.base import FeatureReceiver, FeatureSender, share
from specdist.channel.registry import transport_for
from specdist.channel.wire import Wire
from specdist.core.errors import WorldError
from specdist.core.records import Cursor, Shard, WorkItem
from specdist.core.topology import Topology
from specdist_launch.bench.channel_notes import Notes
from specdist_launch.bench.channel_work import Work

_LOOK_S = 0.0002
"""Between two looks at what runs on the device."""


@dataclass(frozen=True)
class Batch:
    """The items of one measurement.

    Attributes:
        items: their numbers; those of one world's measurements follow each other.
        rows: of each shard.
        check: whether rows are filled with a pattern, and compared when they have arrived.
    """

    items: range
    rows: int
    check: bool = False


class Target:
    """A target rank: hands out a buffer, computes, says that the item is there and sends it, as the producer does."""

    def __init__(self, wire: Wire, slots: int, shard_rows: int):
        self._topology, self._slots, self._timeout_s = wire.topology, slots, wire.timeout_s
        place = wire.topology.target_place(wire.rank)
        assert place is not None
        self._place = place
        self._notes = Notes(wire.world, wire.topology.draft_ranks)
        self._sender: FeatureSender = transport_for(wire.config.transport).sender(
            wire, len(wire.topology.draft) * shard_rows, self._notes.tell
        )
        self._sender.connect(wire.timeout_s, check=lambda: None)
        self._releases: Counter[int] = Counter()

    def move(self, batch: Batch, work: Work) -> None:
        """Send this rank's share of the items of its replica."""
        replicas = len(self._topology.replicas)
        left = deque(i for i in batch.items if i % replicas == self._place.replica)
        running: deque[tuple[WorkItem, Tensor, torch.cuda.Event | None]] = deque()
        deadline = time.monotonic() + self._timeout_s
        while left or running:
            if left and len(running) < min(2, self._sender.buffers) and self._free(left[0]):
                item = make_item(self._topology, left.popleft(), batch.rows)
                running.append((item, *self._launch(item, batch, work)))
                deadline = time.monotonic() + self._timeout_s
            while running and (running[0][2] is None or running[0][2].query()):
                done, rows, _ = running.popleft()
                self._sender.send(done, rows, done.index % self._slots)
            if running:
                time.sleep(_LOOK_S)
            if left and not self._free(left[0]):
                self._releases.update(self._notes.heard(0 if running else 1))
            if time.monotonic() > deadline:
                raise WorldError(f"{self._topology.describe(self._rank)} got no slot within {self._timeout_s:.0f} s")
        self._sender.flush(self._timeout_s)

    @property
    def _rank(self) -> int:
        return self._topology.replicas[self._place.replica][self._place.tp]

    def _free(self, index: int) -> bool:
        return index < self._slots or self._releases[index - self._slots] == len(self._topology.draft_ranks)

    def _launch(self, item: WorkItem, batch: Batch, work: Work) -> tuple[Tensor, torch.cuda.Event | None]:
        rows = self._sender.buffer(item)
        if batch.check:
            rows.copy_(pattern(item, slice(0, item.tokens), rows))
            if rows.is_cuda:
                torch.cuda.current_stream().synchronize()  # what is sent must be complete
        return rows, work.run(work.begin())  # a wait of the stream for the buffer is not work


class Draft:
    """A draft rank: takes items in order, computes, releases."""

    def __init__(self, wire: Wire, slots: int, shard_rows: int):
        self._topology, self._timeout_s = wire.topology, wire.timeout_s
        place = wire.topology.draft_place(wire.rank)
        assert place is not None
        self._rank, self._place = wire.rank, place
        self._receiver: FeatureReceiver = transport_for(wire.config.transport).receiver(
            wire, slots, shard_rows, self._check
        )
        self._notes = Notes(wire.world, wire.topology.target_ranks)
        self._rows = 0
        self._error: BaseException | None = None
        threading.Thread(target=self._post, name="specdist-receiver", daemon=True).start()

    def move(self, batch: Batch, work: Work) -> None:
        """Receive this rank's shard of every item."""
        for index in batch.items:
            item = make_item(self._topology, index, batch.rows)
            rows = self._receiver.take(item, self._timeout_s)
            if batch.check:
                self._compare(item, rows)
            work.run(work.begin())
            self._receiver.release(item, lambda index=index: self._notes.tell(index))  # type: ignore[misc]

    def expect(self, batch: Batch) -> None:
        """Say how large the items to come are; before anybody sends one of them."""
        self._rows = batch.rows

    def _post(self) -> None:
        try:
            self._receiver.enter_thread()
            replicas, announced = len(self._topology.replicas), Counter[int]()
            while True:
                for index in self._notes.heard(1000):
                    announced[index] += 1
                    if announced[index] == len(self._topology.replicas[index % replicas]):
                        item = make_item(self._topology, index, self._rows)
                        self._receiver.post(item, index % replicas, index % self._receiver.slots)
        except BaseException as error:  # noqa: BLE001 - raised by _check in the thread that takes
            self._error = error

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _compare(self, item: WorkItem, rows: Tensor) -> None:
        expected = pattern(item, item.rows(self._place.dp), rows)
        if torch.equal(rows.view(torch.int64), expected.view(torch.int64)):
            return
        row = int((rows.view(torch.int64) != expected.view(torch.int64)).any(1).nonzero()[0])
        sources = self._topology.replicas[item.index % len(self._topology.replicas)]
        shares = [share(len(rows), t, len(sources)) for t in range(len(sources))]
        source = next(s for s, part in zip(sources, shares, strict=True) if part.start <= row < part.stop)
        raise WorldError(
            f"{self._topology.describe(self._rank)}: item {item.index} is not what "
            f"{self._topology.describe(source)} sent, from row {row} of {len(rows)} on"
        )


def make_item(topology: Topology, index: int, rows: int) -> WorkItem:
    """Item `index` with `rows` rows for every draft rank."""
    return WorkItem(index, Cursor(), Cursor(), (Shard((0,), (rows,)),) * len(topology.draft))


def pattern(item: WorkItem, part: slice, like: Tensor) -> Tensor:
    """The rows `part` of an item as they are sent when they are checked: bits that differ by place and item. Of the
    width, dtype and device of `like` [rows, width]."""
    words = like.shape[1] * like.element_size() // 8
    places = torch.arange(part.start * words, part.stop * words, device=like.device)
    return (places * 0x9E3779B97F4A7C1 + item.index * 0x1000193).view(-1, words).view(like.dtype)
