# SPDX-License-Identifier: Apache-2.0
"""What a channel is compared with: the same messages between the same ranks through the library alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from specdist.channel.base import Wire
from specdist.channel.mooncake.engine import Endpoint, process_engine
from specdist.core.launch_env import local_address

Limit = tuple[Callable[[int, int, int], None], tuple[int, ...]]
"""A function (messages, bytes of each, messages in flight) that moves them over each link of this rank; and the numbers
in flight to try, of which the fastest counts: one where the device's own queue bounds it."""


def limit_of(wire: Wire, slots: int, size: int) -> Limit:
    """This rank's part of the limit of the channel, for messages of at most `size` bytes."""
    return _raw_p2p(wire, slots, size) if wire.groups.links else _raw_writes(wire, slots, size)


def _raw_p2p(wire: Wire, slots: int, size: int) -> Limit:
    """torch.distributed's isend and irecv over the links' own groups, with nothing between one and the next."""
    links = sorted(wire.groups.links.items(), key=lambda pair: (pair[0].source, pair[0].destination))
    on_device = wire.on_gpu and all(dist.get_backend(group) == "nccl" for _, group in links)
    place, pinned = wire.device if on_device else torch.device("cpu"), wire.on_gpu and not on_device
    memory = torch.zeros(slots, size, dtype=torch.uint8, device=place, pin_memory=pinned)

    def move(items: int, size: int, depth: int) -> None:
        works: deque[Any] = deque()
        for item in range(items):
            rows = memory[item % depth, :size]
            for _ in links if not on_device and item >= depth else ():
                works.popleft().wait()
            for link, group in links:
                sending = link.source == wire.rank
                operation, partner = (dist.isend, link.destination) if sending else (dist.irecv, link.source)
                works.append(operation(rows, partner, group=group))
        for work in works:
            work.wait()

    return move, (slots,) if on_device else tuple(sorted({2, slots}))


def _raw_writes(wire: Wire, slots: int, size: int) -> Limit:
    """Writes of Mooncake's Transfer Engine from host memory into the draft ranks' rings."""
    engine, topology = process_engine(local_address(), wire.config.mooncake), wire.topology
    memory = torch.zeros(slots, size, dtype=torch.uint8, pin_memory=wire.on_gpu)
    place, drafts, endpoints = topology.target_place(wire.rank), topology.draft_ranks, list[Endpoint]()
    if place is not None:
        engine.register(memory)
        found = (wire.book.find(rank, topology.describe(rank), wire.timeout_s, lambda: None) for rank in drafts)
        endpoints = [msgspec.json.decode(text, type=Endpoint) for text in found]

    def move(items: int, size: int, depth: int) -> None:
        writes: deque[int] = deque()
        for item in range(items):
            for there in endpoints:
                if len(writes) == depth * len(endpoints):
                    engine.wait([writes.popleft()], wire.timeout_s)
                assert place is not None
                slot = there.ring + item % depth * there.slot_bytes + place.tp * size
                writes.append(engine.write(there.session, memory[item % depth].data_ptr(), slot, size))
        engine.wait(writes, wire.timeout_s)

    return move, tuple(sorted({2, slots}))
