# SPDX-License-Identifier: Apache-2.0
"""The draft rank's end: a registered ring that target ranks write into."""

import contextlib
import queue
import threading

import msgspec
import torch
from torch import Tensor

from specdist.channel.base import FeatureReceiver, Freed, Wire
from specdist.channel.mooncake.engine import Endpoint, TransferEngine, device_of
from specdist.channel.ring import Ring
from specdist.core.errors import WorldError
from specdist.core.records import WorkItem


class MooncakeReceiver(FeatureReceiver):
    """Owns the ring. Target ranks announce an item when it has arrived, so whatever is posted is there.

    Where the ring of a rank on a GPU is in pinned host memory (`memory.device_of`), `take` copies to the device.
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

    @property
    def slots(self) -> int:
        return self._ring.slots

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
            with contextlib.suppress(WorldError):  # the world has failed: the trainer learns it by itself
                freed()


def _here() -> torch.cuda.Event:
    """The end of what the current stream has been given so far."""
    event = torch.cuda.Event()
    event.record()
    return event
