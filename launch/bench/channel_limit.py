# SPDX-License-Identifier: Apache-2.0
"""What a channel is compared with: the same messages between the same ranks through the library alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque

import torch
import torch.distributed as dist

from specdist.channel.mooncake.endpoint import Endpoint
from specdist.channel.mooncake.engine import TransferEngine
from specdist.channel.wire import StoreBook, Wire
from specdist.core.launch_env import local_address
from specdist.core.topology import Link


class Limit(ABC):
    """One rank of a measurement.

    Attributes:
        depths: how many messages a link may have in flight, to find out which is fastest; one where the device's own
            queue bounds it.
    """

    depths: tuple[int, ...]

    @abstractmethod
    def move(self, items: int, size: int, depth: int) -> None:
        """Move `items` messages of `size` bytes over each of this rank's links, from and to `depth` buffers."""


class P2PLimit(Limit):
    """torch.distributed's isend and irecv over the links' own groups, with nothing between one and the next."""

    def __init__(self, wire: Wire, slots: int, size: int):
        links = sorted(wire.groups.links.items(), key=lambda pair: (pair[0].source, pair[0].destination))
        self._links: list[tuple[Link, dist.ProcessGroup]] = links
        self._rank, self._on_device = wire.rank, False
        place = torch.device("cpu")
        if wire.on_gpu and all(dist.get_backend(group) == "nccl" for _, group in links):
            self._on_device, place = True, wire.device
        pinned = wire.on_gpu and not self._on_device
        self.depths = (slots,) if self._on_device else _depths(slots)
        self._memory = torch.zeros(slots, size, dtype=torch.uint8, device=place, pin_memory=pinned)

    def move(self, items: int, size: int, depth: int) -> None:
        works: deque[dist.Work] = deque()
        for item in range(items):
            rows = self._memory[item % depth, :size]
            if not self._on_device and item >= depth:
                for _ in self._links:
                    works.popleft().wait()
            for link, group in self._links:
                work = (
                    dist.isend(rows, link.destination, group=group)
                    if link.source == self._rank
                    else dist.irecv(rows, link.source, group=group)
                )
                assert work is not None
                works.append(work)
        for work in works:
            work.wait()


class MooncakeLimit(Limit):
    """Writes of the Transfer Engine from host memory to host memory, without flags."""

    def __init__(self, wire: Wire, slots: int, size: int):
        topology = wire.topology
        self._slots = slots
        self._engine = TransferEngine(local_address(), wire.config.mooncake)
        self.depths, self._timeout_s = _depths(slots), wire.timeout_s
        target = topology.target_place(wire.rank) is not None
        writers = 1 if target else len(topology.target_ranks)
        self._memory = torch.zeros(writers, slots, size, dtype=torch.uint8, pin_memory=wire.on_gpu)
        self._engine.register(self._memory)
        directory = StoreBook(dist.PrefixStore("bench/limit", wire.world.store))
        self._endpoints: list[Endpoint] = []
        if not target:
            ring, protocol = self._memory.data_ptr(), self._engine.protocol
            directory.publish(wire.rank, Endpoint(self._engine.session, protocol, ring, size, greeting=0).to_json())
            return
        self._column = topology.target_ranks.index(wire.rank)
        for rank in topology.draft_ranks:
            found = directory.find(rank, topology.describe(rank), wire.timeout_s, check=lambda: None)
            self._endpoints.append(Endpoint.from_json(found))

    def move(self, items: int, size: int, depth: int) -> None:
        writes: deque[int] = deque()
        for item in range(items):
            source = self._memory[0, item % depth].data_ptr()
            for endpoint in self._endpoints:
                if len(writes) == depth * len(self._endpoints):
                    self._engine.wait([writes.popleft()], self._timeout_s)
                slot = self._column * self._slots + item % depth
                place = endpoint.ring + slot * endpoint.slot_bytes
                writes.append(self._engine.write(endpoint.session, source, place, size))
        self._engine.wait(writes, self._timeout_s)


def _depths(slots: int) -> tuple[int, ...]:
    return tuple(sorted({2, slots}))


def make_limit(wire: Wire, slots: int, size: int) -> Limit:
    """This rank's part of the limit of `channel.transport`, for messages of at most `size` bytes."""
    return MooncakeLimit(wire, slots, size) if wire.config.transport == "mooncake" else P2PLimit(wire, slots, size)
