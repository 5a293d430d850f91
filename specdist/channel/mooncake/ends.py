# SPDX-License-Identifier: Apache-2.0
"""Both ends. The draft rank's is a registered ring that target ranks write into; on a target rank a thread writes
finished rows there, and announces what has arrived."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec
import torch
from torch import Tensor

from specdist.channel.base import Announce, Check, FeatureReceiver, Freed, RingSender, Wire, outgoing
from specdist.channel.mooncake.engine import Endpoint, TransferEngine, TransferFailed, device_of
from specdist.channel.ring import Ring
from specdist.core.errors import WorldError
from specdist.core.records import WorkItem
from specdist.core.trace import span
from specdist.core.worker import Worker

_LOOK_S = 0.5


@dataclass
class _Sending:
    """An item on its way to `slot`. `copied`: the event after which the rows are in host memory (None: they are)."""

    item: WorkItem
    rows: Tensor
    slot: int
    copied: torch.cuda.Event | None
    done: threading.Event = field(default_factory=threading.Event)


class MooncakeSender(RingSender[_Sending]):
    """Writes this target rank's share of each shard. An item has a free slot, so a write need not wait."""

    def __init__(self, wire: Wire, item_rows: int, announce: Announce, engine: TransferEngine):
        buffers = wire.config.send_buffers
        super().__init__(Ring(wire.layout, buffers, item_rows, wire.device))
        self._wire, self._announce, self._engine = wire, announce, engine
        lies = device_of(engine, wire.config.mooncake, wire.device)
        staged = lies != wire.device
        self._host = Ring(wire.layout, buffers, item_rows, lies, pinned=True) if staged else None
        self._copying = torch.cuda.Stream(wire.device) if staged else None
        self._greeting = torch.ones(1, dtype=torch.int64)
        self._registered = ((self._host or self._ring).memory, self._greeting)
        for memory in self._registered:
            engine.register(memory)
        self._endpoints: dict[int, Endpoint] = {}
        self._jobs: queue.SimpleQueue[_Sending | None] = queue.SimpleQueue()
        self._thread = Worker("specdist-mooncake", self._work)
        self._thread.start()

    def connect(self, timeout_s: float, check: Check) -> None:
        describe = self._wire.topology.describe
        for draft in (link.destination for link in self._wire.topology.links if link.source == self._wire.rank):
            found = self._wire.book.find(draft, describe(draft), timeout_s, check)
            endpoint = msgspec.json.decode(found, type=Endpoint)
            if endpoint.protocol != self._engine.protocol:
                raise WorldError(
                    f"{describe(draft)} speaks {endpoint.protocol} and {describe(self._wire.rank)} "
                    f"{self._engine.protocol}: set channel.mooncake.protocol to one that both hosts have"
                )
            self._endpoints[draft] = endpoint
            with self._naming(draft, "link did not come up"):
                write = self._engine.write(endpoint.session, self._greeting.data_ptr(), endpoint.greeting, 8)
                self._engine.wait([write], timeout_s)

    def _issue(self, item: WorkItem, rows: Tensor, slot: int) -> _Sending:
        copied = None
        if self._host is not None:
            host = self._host.slot(self._ring.number(rows), item.tokens)
            with torch.cuda.stream(self._copying):
                rows, copied = host.copy_(rows, non_blocking=True), _here()
        sending = _Sending(item, rows, slot, copied)
        self._jobs.put(sending)
        return sending

    def _reuse(self, sent: _Sending) -> None:
        self._finish(sent, self._wire.timeout_s)

    def _finish(self, sent: _Sending, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not sent.done.wait(_LOOK_S):
            self.check()
            if time.monotonic() > deadline:
                who = self._wire.topology.describe(self._wire.rank)
                raise WorldError(f"what {who} sent of batch {sent.item.index} has not left within {timeout_s:.0f} s")

    def check(self) -> None:
        if self._thread.error is not None:
            raise self._thread.error

    def close(self, timeout_s: float) -> None:
        """Keeps the buffers if a write from one has failed: it may still read them."""
        self._jobs.put(None)
        self._thread.join(timeout_s)
        if self._thread.error is None and not self._thread.is_alive():
            for memory in self._registered:
                self._engine.forget(memory)

    def _work(self) -> None:
        """The body of the thread: item by item, in the order in which they were sent, until one fails."""
        while (sending := self._jobs.get()) is not None:
            self._send(sending)
            sending.done.set()

    def _send(self, sending: _Sending) -> None:
        index = sending.item.index
        if sending.copied is not None:
            with span("wait for the copy to the host", index):
                sending.copied.synchronize()
        writes = []
        for link, first, part in outgoing(self._wire.topology, self._wire.rank, sending.item, sending.rows):
            there = self._endpoints[link.destination]
            place = there.ring + sending.slot * there.slot_bytes + first * part.stride(0) * part.element_size()
            with self._naming(link.destination, f"batch {index}"):
                number = self._engine.write(there.session, part.data_ptr(), place, part.nbytes)
            writes.append((link.destination, number, part.nbytes))
        for draft, number, size in writes:
            with self._naming(draft, f"batch {index}"), span("send", index, destination=draft, bytes=size):
                self._engine.wait([number], self._wire.timeout_s)
        self._announce(index)

    @contextlib.contextmanager
    def _naming(self, draft: int, what: str) -> Iterator[None]:
        """Name both ends of a transfer that fails."""
        try:
            yield
        except TransferFailed as error:
            source, destination = (self._wire.topology.describe(rank) for rank in (self._wire.rank, draft))
            why = f"{destination} did not take what {source} sent over Mooncake: {what}: {error}"
            raise WorldError(why, culprit=draft) from error


class MooncakeReceiver(FeatureReceiver):
    """Owns the ring. Target ranks announce an item when it has arrived, so whatever is posted is there.

    Where the ring of a rank on a GPU is in pinned host memory (`engine.device_of`), `take` copies to the device.
    """

    def __init__(self, wire: Wire, slots: int, shard_rows: int, engine: TransferEngine):
        self._wire = wire
        _, self._shard = wire.topology.shard_of(wire.rank)
        lies = device_of(engine, wire.config.mooncake, wire.device)
        staged = lies != wire.device
        self._ring = Ring(wire.layout, slots, shard_rows, lies, pinned=staged)
        self._copies = Ring(wire.layout, slots, shard_rows, wire.device) if staged else None
        self._greeting = torch.zeros(1, dtype=torch.int64)
        for memory in (self._ring.memory, self._greeting):
            engine.register(memory)
        self._engine = engine  # others reach the memory as long as it lives
        self._posted: dict[int, int] = {}  # slot, by item
        self._copied: dict[int, torch.cuda.Event] = {}
        self._freeing: queue.SimpleQueue[tuple[torch.cuda.Event, Freed] | None] = queue.SimpleQueue()
        if wire.on_gpu:
            threading.Thread(target=self._free, name="specdist-freeing", daemon=True).start()
        ring, slot_bytes = self._ring.memory.data_ptr(), shard_rows * wire.layout.bytes_per_token
        here = Endpoint(engine.session, engine.protocol, ring, slot_bytes, self._greeting.data_ptr())
        wire.book.publish(wire.rank, msgspec.json.encode(here).decode())

    def post(self, item: WorkItem, replica: int, slot: int) -> None:
        self._posted[item.index] = slot

    def take(self, item: WorkItem, timeout_s: float) -> Tensor:
        slot, tokens = self._posted[item.index], item.shards[self._shard].tokens
        rows = self._ring.slot(slot, tokens)
        if self._copies is None:
            return rows
        copy = self._copies.slot(slot, tokens).copy_(rows, non_blocking=True)
        self._copied[item.index] = _here()
        return copy

    def release(self, item: WorkItem, freed: Freed) -> None:
        del self._posted[item.index]
        if not self._wire.on_gpu:
            freed()
        elif self._copies is None:  # free once all that was launched to read it has run
            self._freeing.put((_here(), freed))
        else:  # free once it is copied; what comes into the copy's place next comes in stream order
            self._freeing.put((self._copied.pop(item.index), freed))

    def retire(self) -> object:
        self._copies = None
        return self

    def close(self) -> None:
        for memory in (self._ring.memory, self._greeting):
            self._engine.forget(memory)
        self._freeing.put(None)

    def _free(self) -> None:
        """The body of a thread that waits for the device in the place of the trainer."""
        torch.cuda.set_device(self._wire.device)
        while (job := self._freeing.get()) is not None:
            read, freed = job
            read.synchronize()
            freed()


def _here() -> torch.cuda.Event:
    """The end of what the current stream has been given so far."""
    event = torch.cuda.Event()
    event.record()
    return event
