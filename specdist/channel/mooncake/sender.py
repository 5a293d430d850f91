# SPDX-License-Identifier: Apache-2.0
"""The target rank's end: a thread writes finished rows into the draft ranks' rings, and says so in their flags."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specdist.channel.base import FeatureSender, share, share_of_item
from specdist.channel.mooncake.endpoint import Endpoint, stamp
from specdist.channel.mooncake.engine import TransferEngine, TransferFailed
from specdist.channel.mooncake.memory import device_of
from specdist.channel.ring import Ring
from specdist.channel.wire import Wire
from specdist.core.errors import WorldError
from specdist.core.records import WorkItem
from specdist.core.trace import span


@dataclass
class _Sending:
    """An item on its way. `copied`: the event after which the rows are in host memory (None: they are there). `place`:
    the slot it goes to and the number of this replica, where the scheduler has said so."""

    item: WorkItem
    rows: Tensor
    copied: torch.cuda.Event | None
    place: tuple[int, int] | None
    done: threading.Event = field(default_factory=threading.Event)


class MooncakeSender(FeatureSender):
    """Writes this target rank's share of each shard.

    The slot of an item is free when the item is dispatched (the scheduler's credits), so a write waits for nobody. The
    flag follows when the rows have arrived: writes to one peer may overtake each other.

    Args:
        written: called in the sender's thread with the number of each item whose share of this rank has arrived. Given
            where this replica belongs to a world of its own: then the slots are those that `place` names.
    """

    def __init__(
        self,
        wire: Wire,
        item_rows: int,
        engine: TransferEngine,
        written: Callable[[int], None] | None = None,
    ):
        topology, rank, buffers = wire.topology, wire.rank, wire.config.send_buffers
        place = topology.target_place(rank)
        assert place is not None, f"rank {rank} is not a target rank"
        self._topology, self._rank, self._place = topology, rank, place
        self._tp = len(topology.replicas[place.replica])
        self._column = place.tp if written else topology.target_ranks.index(rank)
        self._written = written
        self._places: dict[int, tuple[int, int]] = {}
        self._engine, self._book, self._timeout_s = engine, wire.book, wire.timeout_s
        lies = device_of(engine, wire.config.mooncake, wire.device)
        staged = lies != wire.device
        self._ring = Ring(wire.layout, buffers, item_rows, lies, pinned=staged)
        self._computed = Ring(wire.layout, buffers, item_rows, wire.device) if staged else self._ring
        self._copying = torch.cuda.Stream(wire.device) if staged else None
        self._flag = torch.zeros(1, dtype=torch.int64)
        for memory in (self._ring.memory, self._flag):
            engine.register(memory)
        self._endpoints: dict[int, Endpoint] = {}
        self._sending: dict[int, _Sending] = {}
        self._handed_out = self._sent = 0
        self._error: WorldError | None = None
        self._jobs: queue.SimpleQueue[_Sending | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="specdist-mooncake", daemon=True)
        self._thread.start()

    @property
    def buffers(self) -> int:
        return self._ring.slots

    def connect(self, timeout_s: float, check: Callable[[], None]) -> None:
        for draft in self._topology.draft_ranks:
            named = self._topology.describe(draft)
            endpoint = Endpoint.from_json(self._book.find(draft, named, timeout_s, check))
            if endpoint.protocol != self._engine.protocol:
                raise WorldError(
                    f"{named} speaks {endpoint.protocol} and {self._topology.describe(self._rank)} "
                    f"{self._engine.protocol}: set channel.mooncake.protocol to one that both hosts have"
                )
            self._endpoints[draft] = endpoint
            try:
                self._write_flag(draft, endpoint.slots, 1, timeout_s)
            except TransferFailed as error:
                raise self._failed(draft, f"link did not come up: {error}") from error

    def place(self, item: int, slot: int, replica: int) -> None:
        if self._written:
            self._places[item] = (slot, replica)

    def buffer(self, item: WorkItem) -> Tensor:
        assert self._handed_out - self._sent < self.buffers, "a buffer is asked for before an earlier one was sent"
        number = self._handed_out
        self._handed_out += 1
        earlier = self._sending.pop(number % self.buffers, None)
        if earlier is not None:
            self._finish(earlier, self._timeout_s)
        return self._computed.slot(number, item.tokens)

    def send(self, item: WorkItem, rows: Tensor) -> None:
        copied = None
        if self._copying is not None:
            host = self._ring.slot(self._sent, item.tokens)
            with torch.cuda.stream(self._copying):
                host.copy_(rows, non_blocking=True)
                copied = torch.cuda.Event()
                copied.record()
            rows = host
        sending = _Sending(item, rows, copied, self._places.pop(item.index, None))
        self._sending[self._sent % self.buffers] = sending
        self._sent += 1
        self._jobs.put(sending)

    def flush(self, timeout_s: float) -> None:
        for sending in self._sending.values():
            self._finish(sending, timeout_s)
        self._sending.clear()

    def close(self, timeout_s: float) -> None:
        """Send nothing more, and give the buffers back unless a write from one has failed: it may still read them."""
        self._jobs.put(None)
        self._thread.join(timeout_s)
        if self._error is None and not self._thread.is_alive():
            for memory in (self._ring.memory, self._flag):
                self._engine.forget(memory)

    def _finish(self, sending: _Sending, timeout_s: float) -> None:
        ended = sending.done.wait(timeout_s)
        if self._error is not None:
            raise self._error
        if not ended:
            raise WorldError(
                f"what {self._topology.describe(self._rank)} sent of item {sending.item.index} has not left within "
                f"{timeout_s:.0f} s"
            )

    def _work(self) -> None:
        """The body of the thread: item by item, in the order in which they were sent."""
        while (sending := self._jobs.get()) is not None:
            if self._error is None:
                self._send(sending)
            sending.done.set()

    def _send(self, sending: _Sending) -> None:
        item = sending.item
        if sending.copied is not None:
            with span("wait for the copy to the host", item.index):
                sending.copied.synchronize()
        parts, index = self._parts(sending), item.index
        writes: dict[int, int] = {}
        draft = -1
        try:
            for draft, part in parts.items():
                writes[draft] = self._write(draft, sending, part)
            for draft, number in writes.items():
                with span("send", index, destination=draft, bytes=parts[draft].nbytes):
                    self._engine.wait([number], self._timeout_s)
                    mark = stamp(index, None if sending.place is None else sending.place[1])
                    self._write_flag(draft, self._slot(draft, sending), mark, self._timeout_s)
            if self._written is not None:
                self._written(index)
        except TransferFailed as error:
            self._error = self._failed(draft, f"item {index}: {error}")
        except WorldError as error:  # of `written`: the world has failed
            self._error = error

    def _parts(self, sending: _Sending) -> dict[int, Tensor]:
        """What every draft rank gets of this rank's rows; nothing where there are no rows."""
        item = sending.item
        parts: dict[int, Tensor] = {}
        for d, ranks in enumerate(self._topology.draft):
            part = sending.rows[share_of_item(item, d, self._place.tp, self._tp)]
            if len(part):
                parts |= dict.fromkeys(ranks, part)
        return parts

    def _slot(self, draft: int, sending: _Sending) -> int:
        return sending.item.index % self._endpoints[draft].slots if sending.place is None else sending.place[0]

    def _write(self, draft: int, sending: _Sending, part: Tensor) -> int:
        item, endpoint, place = sending.item, self._endpoints[draft], self._topology.draft_place(draft)
        assert place is not None
        row_bytes = part.shape[1] * part.element_size()
        first = share(item.shards[place.dp].tokens, self._place.tp, self._tp).start
        slot = endpoint.ring + self._slot(draft, sending) * endpoint.slot_bytes
        return self._engine.write(endpoint.session, part.data_ptr(), slot + first * row_bytes, len(part) * row_bytes)

    def _write_flag(self, draft: int, row: int, value: int, timeout_s: float) -> None:
        endpoint = self._endpoints[draft]
        self._flag[0] = value
        place = endpoint.flags + 8 * (row * endpoint.columns + self._column)
        self._engine.wait([self._engine.write(endpoint.session, self._flag.data_ptr(), place, 8)], timeout_s)

    def _failed(self, draft: int, why: str) -> WorldError:
        source, destination = self._topology.describe(self._rank), self._topology.describe(draft)
        return WorldError(f"{destination} did not take what {source} sent over Mooncake: {why}", culprit=draft)
