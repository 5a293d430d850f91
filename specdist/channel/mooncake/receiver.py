# SPDX-License-Identifier: Apache-2.0
"""The draft rank's end: a registered ring that target ranks write into, and flags that say what has arrived."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from specdist.channel.base import FeatureReceiver, Freed, Posts, share
from specdist.channel.mooncake.directory import Directory, Endpoint
from specdist.channel.mooncake.engine import TransferEngine
from specdist.channel.ring import Ring
from specdist.channel.wire import Wire
from specdist.errors import WorldError
from specdist.records import WorkItem
from specdist.topology import Link
from specdist.trace.base import Transfer

_POLL_S = 0.0002


class MooncakeReceiver(FeatureReceiver):
    """Owns the ring. On a GPU the ring is in pinned host memory, and `take` copies an item to the device."""

    def __init__(
        self,
        wire: Wire,
        slots: int,
        shard_rows: int,
        check: Callable[[], None],
        engine: TransferEngine,
        directory: Directory,
    ):
        topology, rank, layout = wire.topology, wire.rank, wire.layout
        place = topology.draft_place(rank)
        assert place is not None, f"rank {rank} is not a draft rank"
        self._topology, self._rank, self._shard, self._check = topology, rank, place.dp, check
        self._host = Ring(layout, slots, shard_rows, torch.device("cpu"), pinned=wire.on_gpu)
        self._device = Ring(layout, slots, shard_rows, wire.device) if wire.on_gpu else None
        self._flags = torch.zeros(slots + 1, len(topology.target_ranks), dtype=torch.int64)
        self._seen = self._flags.numpy()  # the same memory; reading it costs no dispatch
        self._column = {source: i for i, source in enumerate(topology.target_ranks)}
        for memory in (self._host.memory, self._flags):
            engine.register(memory)
        self._engine = engine  # others reach the memory as long as it lives
        self._posts = Posts(topology, rank, check)
        self._trace, self._row_bytes = wire.trace, layout.bytes_per_token
        self._traced: dict[tuple[int, int], Transfer] = {}
        self._copied: dict[int, torch.cuda.Event] = {}
        self._freeing: queue.SimpleQueue[tuple[torch.cuda.Event, Freed]] = queue.SimpleQueue()
        if wire.on_gpu:
            threading.Thread(target=self._free, args=(wire.device,), name="specdist-freeing", daemon=True).start()
        directory.publish(
            rank,
            Endpoint(
                session=engine.session,
                protocol=engine.protocol,
                ring=self._host.memory.data_ptr(),
                slot_bytes=shard_rows * layout.bytes_per_token,
                slots=slots,
                flags=self._flags.data_ptr(),
            ),
        )

    @property
    def slots(self) -> int:
        return self._host.slots

    def post(self, item: WorkItem, replica: int) -> None:
        for source, rows in self._owed(item, replica):
            size = rows * self._row_bytes
            self._traced[item.index, source] = self._trace.transfer(
                "receive", item.index, Link(source, self._rank), size
            )
        self._posts.add(item, replica)

    def _owed(self, item: WorkItem, replica: int) -> Iterator[tuple[int, int]]:
        """The ranks that send rows of `item`, and how many."""
        tokens, sources = item.shards[self._shard].tokens, self._topology.replicas[replica]
        for t, source in enumerate(sources):
            part = share(tokens, t, len(sources))
            if part.start < part.stop:
                yield source, part.stop - part.start

    def take(self, item: WorkItem, timeout_s: float) -> Tensor:
        deadline = time.monotonic() + timeout_s
        for source, _ in self._owed(item, self._posts.take(item, timeout_s)):
            self._await(item, source, deadline, timeout_s)
            self._traced.pop((item.index, source)).ended()
        tokens = item.shards[self._shard].tokens
        rows = self._host.slot(item.index, tokens)
        if self._device is None:
            return rows
        on_device = self._device.slot(item.index, tokens)
        on_device.copy_(rows, non_blocking=True)
        self._copied[item.index] = torch.cuda.Event()
        self._copied[item.index].record()
        return on_device

    def _await(self, item: WorkItem, source: int, deadline: float, timeout_s: float) -> None:
        row, column, look = item.index % self.slots, self._column[source], time.monotonic() + 0.5
        while self._seen[row, column] != item.index + 1:
            now = time.monotonic()
            if now > look:
                self._check()
                look = now + 0.5
            if now > deadline:
                raise WorldError(
                    f"{self._topology.describe(self._rank)} did not receive its rows of item {item.index} from "
                    f"{self._topology.describe(source)} (limit {timeout_s:.0f} s): nothing has come over Mooncake",
                    culprit=source,
                )
            time.sleep(_POLL_S)

    def release(self, item: WorkItem, freed: Freed) -> None:
        if self._device is None:
            freed()
        else:  # the slot in host memory is free once it is copied; that of the device is written in stream order
            self._freeing.put((self._copied.pop(item.index), freed))

    def _free(self, device: torch.device) -> None:
        torch.cuda.set_device(device)
        while True:
            copied, freed = self._freeing.get()
            copied.synchronize()
            with contextlib.suppress(WorldError):  # the world has failed: the trainer hears of it by itself
                freed()
