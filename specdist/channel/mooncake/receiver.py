# SPDX-License-Identifier: Apache-2.0
"""The draft rank's end: a registered ring that target ranks write into, and flags that say what has arrived."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from specdist.channel.base import FeatureReceiver, Freed, Posts, share
from specdist.channel.mooncake.endpoint import MAX_SHARES, Endpoint, stamp
from specdist.channel.mooncake.engine import TransferEngine
from specdist.channel.mooncake.memory import device_of
from specdist.channel.ring import Ring
from specdist.channel.wire import Wire
from specdist.core.errors import WorldError
from specdist.core.records import WorkItem

_POLL_S = 0.0002


@dataclass(frozen=True)
class _Share:
    """A part of an item: who writes it, by rank (-1: one of another world) and name, and its column of the flags."""

    source: int
    name: str
    column: int


@dataclass(frozen=True)
class _Whereabouts:
    """Where an item is, and what its flags say when it is complete."""

    slot: int
    stamp: int
    shares: tuple[_Share, ...]


class MooncakeReceiver(FeatureReceiver):
    """Owns the ring. Where that of a rank on a GPU is in pinned host memory (`memory.device_of`), `take` copies an item
    to the device.

    In a draft world, which has no target ranks, the scheduler says where each item is (`place`).
    """

    def __init__(
        self,
        wire: Wire,
        slots: int,
        shard_rows: int,
        check: Callable[[], None],
        engine: TransferEngine,
    ):
        topology, rank, layout = wire.topology, wire.rank, wire.layout
        place = topology.draft_place(rank)
        assert place is not None, f"rank {rank} is not a draft rank"
        self._topology, self._rank, self._shard, self._check = topology, rank, place.dp, check
        lies = device_of(engine, wire.config.mooncake, wire.device)
        staged = lies != wire.device
        self._ring = Ring(layout, slots, shard_rows, lies, pinned=staged)
        self._copies = Ring(layout, slots, shard_rows, wire.device) if staged else None
        self._on_gpu = wire.on_gpu
        self._flags = torch.zeros(slots + 1, len(topology.target_ranks) or MAX_SHARES, dtype=torch.int64)
        self._seen = self._flags.numpy()  # the same memory; reading it costs no dispatch
        self._column = {source: i for i, source in enumerate(topology.target_ranks)}
        for memory in (self._ring.memory, self._flags):
            engine.register(memory)
        self._engine = engine  # others reach the memory as long as it lives
        self._posts = Posts(topology, rank, check)
        self._placed: dict[int, tuple[int, int]] = {}
        self._expected: dict[int, _Whereabouts] = {}
        self._copied: dict[int, torch.cuda.Event] = {}
        self._freeing: queue.SimpleQueue[tuple[torch.cuda.Event, Freed]] = queue.SimpleQueue()
        if wire.on_gpu:
            threading.Thread(target=self._free, args=(wire.device,), name="specdist-freeing", daemon=True).start()
        endpoint = Endpoint(
            session=engine.session,
            protocol=engine.protocol,
            ring=self._ring.memory.data_ptr(),
            slot_bytes=shard_rows * layout.bytes_per_token,
            slots=slots,
            flags=self._flags.data_ptr(),
            columns=self._flags.shape[1],
        )
        wire.book.publish(rank, endpoint.to_json())

    @property
    def slots(self) -> int:
        return self._ring.slots

    def place(self, item: int, slot: int, shares: int) -> None:
        if not self._topology.target_ranks:
            self._placed[item] = (slot, shares)

    def post(self, item: WorkItem, replica: int) -> None:
        self._expected[item.index] = self._whereabouts(item, replica)
        self._posts.add(item, replica)

    def _owed(self, item: WorkItem, where: _Whereabouts) -> Iterator[_Share]:
        """Who sends rows of `item`."""
        tokens = item.shards[self._shard].tokens
        for t, source in enumerate(where.shares):
            part = share(tokens, t, len(where.shares))
            if part.start < part.stop:
                yield source

    def take(self, item: WorkItem, timeout_s: float) -> Tensor:
        deadline = time.monotonic() + timeout_s
        self._posts.take(item, timeout_s)
        where = self._expected.pop(item.index)
        for source in self._owed(item, where):
            self._await(item, where, source, deadline, timeout_s)
        tokens = item.shards[self._shard].tokens
        rows = self._ring.slot(where.slot, tokens)
        if self._copies is None:
            return rows
        copy = self._copies.slot(item.index, tokens).copy_(rows, non_blocking=True)
        self._copied[item.index] = _here()
        return copy

    def _whereabouts(self, item: WorkItem, replica: int) -> _Whereabouts:
        if item.index in self._placed:
            slot, count = self._placed.pop(item.index)
            shares = tuple(_Share(-1, f"target replica {replica} tp {t} of another world", t) for t in range(count))
            return _Whereabouts(slot, stamp(item.index, replica), shares)
        sources = self._topology.replicas[replica]
        shares = tuple(_Share(s, self._topology.describe(s), self._column[s]) for s in sources)
        return _Whereabouts(item.index % self.slots, stamp(item.index), shares)

    def _await(self, item: WorkItem, where: _Whereabouts, share: _Share, deadline: float, timeout_s: float) -> None:
        look = time.monotonic() + 0.5
        while self._seen[where.slot, share.column] != where.stamp:
            now = time.monotonic()
            if now > look:
                self._check()
                look = now + 0.5
            if now > deadline:
                raise WorldError(
                    f"{self._topology.describe(self._rank)} did not receive its rows of item {item.index} from "
                    f"{share.name} (limit {timeout_s:.0f} s): nothing has come over Mooncake",
                    culprit=share.source,
                )
            time.sleep(_POLL_S)

    def release(self, item: WorkItem, freed: Freed) -> None:
        if not self._on_gpu:
            freed()
        elif self._copies is None:  # free once all that was launched to read it has run
            self._freeing.put((_here(), freed))
        else:  # free once it is copied; what comes into the copy's place next comes in stream order
            self._freeing.put((self._copied.pop(item.index), freed))

    def retire(self) -> object:
        self._copies = None
        return self

    def _free(self, device: torch.device) -> None:
        torch.cuda.set_device(device)
        while True:
            read, freed = self._freeing.get()
            read.synchronize()
            with contextlib.suppress(WorldError):  # the world has failed: the trainer hears of it by itself
                freed()


def _here() -> torch.cuda.Event:
    """The end of what the current stream has been given so far."""
    event = torch.cuda.Event()
    event.record()
    return event
