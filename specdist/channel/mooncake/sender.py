# SPDX-License-Identifier: Apache-2.0
"""The target rank's end: a thread writes finished rows into the draft ranks' receive buffers, and announces what has
arrived."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec
import torch
from torch import Tensor

from specdist.channel.base import Announce, Check, RingSender, Wire, outgoing
from specdist.channel.mooncake.engine import Endpoint, TransferEngine, TransferFailed, device_of
from specdist.channel.ring import Ring
from specdist.core.errors import WorldError
from specdist.core.records import WorkItem
from specdist.core.trace import span


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
        self._error: WorldError | None = None
        self._jobs: queue.SimpleQueue[_Sending | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="specdist-mooncake", daemon=True)
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
                rows = host.copy_(rows, non_blocking=True)
                copied = torch.cuda.Event()
                copied.record()
        sending = _Sending(item, rows, slot, copied)
        self._jobs.put(sending)
        return sending

    def _reuse(self, sent: _Sending) -> None:
        self._finish(sent, self._wire.timeout_s)

    def _finish(self, sent: _Sending, timeout_s: float) -> None:
        ended = sent.done.wait(timeout_s)
        if self._error is not None:
            raise self._error
        if not ended:
            who = self._wire.topology.describe(self._wire.rank)
            raise WorldError(f"what {who} sent of batch {sent.item.index} has not left within {timeout_s:.0f} s")

    def close(self, timeout_s: float) -> None:
        """Keeps the buffers if a write from one has failed: it may still read them."""
        self._jobs.put(None)
        self._thread.join(timeout_s)
        if self._error is None and not self._thread.is_alive():
            for memory in self._registered:
                self._engine.forget(memory)

    def _work(self) -> None:
        """The body of the thread: item by item, in the order in which they were sent, until one fails."""
        while (sending := self._jobs.get()) is not None:
            if self._error is None:
                try:
                    self._send(sending)
                except WorldError as error:  # raised again by `_finish`
                    self._error = error
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
