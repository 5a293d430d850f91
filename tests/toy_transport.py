# SPDX-License-Identifier: Apache-2.0
"""A transport that this project does not know, as a plugin (run.plugins=[tests.toy_transport]): the draft ranks' rings
are files in memory, which the target ranks of the same host write into."""

from __future__ import annotations

import json
import os

import torch
from torch import Tensor

from specdist.channel.base import Announce, Check, FeatureReceiver, FeatureSender, Freed, Transport, Wire, outgoing
from specdist.channel.registry import register
from specdist.channel.ring import Ring
from specdist.core.records import FeatureLayout, WorkItem


def open_ring(path: str, layout: FeatureLayout, slots: int, rows: int) -> Tensor:
    """[slots, rows, width], shared with whoever opens the same file."""
    memory = torch.from_file(path, shared=True, size=slots * rows * layout.width, dtype=layout.dtype)
    return memory.view(slots, rows, layout.width)


class ToySender(FeatureSender):
    def __init__(self, wire: Wire, item_rows: int, announce: Announce):
        self._wire, self._announce = wire, announce
        self._memory = Ring(wire.layout, 1, item_rows, torch.device("cpu"))
        self._rings: dict[int, Tensor] = {}
        self._used = False

    def connect(self, timeout_s: float, check: Check) -> None:
        for draft in self._wire.topology.draft_ranks:
            found = self._wire.book.find(draft, self._wire.topology.describe(draft), timeout_s, check)
            path, slots, rows = json.loads(found)
            self._rings[draft] = open_ring(path, self._wire.layout, slots, rows)

    @property
    def available(self) -> bool:
        return not self._used

    def buffer(self, item: WorkItem) -> Tensor:
        self._used = True
        return self._memory.slot(0, item.tokens)

    def send(self, item: WorkItem, rows: Tensor, slot: int) -> None:
        for link, first, part in outgoing(self._wire.topology, self._wire.rank, item, rows):
            self._rings[link.destination][slot, first : first + len(part)] = part
        self._used = False
        self._announce(item.index)

    def drop(self, rows: Tensor) -> None:
        self._used = False

    def flush(self, timeout_s: float) -> None:
        """What was sent has arrived."""


class ToyReceiver(FeatureReceiver):
    def __init__(self, wire: Wire, slots: int, shard_rows: int, check: Check):
        place = wire.topology.draft_place(wire.rank)
        assert place is not None
        self._shard = place.dp
        path = f"/proc/{os.getpid()}/fd/{os.memfd_create('toy ring')}"  # goes with the process
        self._ring = open_ring(path, wire.layout, slots, shard_rows)
        self._posted: dict[int, int] = {}
        wire.book.publish(wire.rank, json.dumps([path, slots, shard_rows]))

    def post(self, item: WorkItem, replica: int, slot: int) -> None:
        self._posted[item.index] = slot

    def take(self, item: WorkItem, timeout_s: float) -> Tensor:
        return self._ring[self._posted[item.index], : item.shards[self._shard].tokens]

    def release(self, item: WorkItem, freed: Freed) -> None:
        del self._posted[item.index]
        freed()


register(Transport("toy", ToySender, ToyReceiver, one_sided=True))
