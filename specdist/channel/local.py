# SPDX-License-Identifier: Apache-2.0
"""Both ends on the same rank (colocated mode): the draft reads the very memory the target wrote."""

from __future__ import annotations

import torch
from torch import Tensor

from specdist.channel.base import FeatureReceiver, FeatureSender, Freed
from specdist.channel.ring import Ring
from specdist.core.errors import WorldError
from specdist.core.records import FeatureLayout, WorkItem


class LocalChannel(FeatureSender, FeatureReceiver):
    """A ring of whole packed forwards; `shard` is the data-parallel index whose rows this rank reads."""

    def __init__(self, layout: FeatureLayout, shard: int, slots: int, item_rows: int, device: torch.device):
        self._shard = shard
        self._ring = Ring(layout, slots, item_rows, device)
        self._sent: dict[int, Tensor] = {}

    @property
    def slots(self) -> int:
        return self._ring.slots

    @property
    def buffers(self) -> int:
        return self._ring.slots

    def buffer(self, item: WorkItem) -> Tensor:
        return self._ring.slot(item.index, item.tokens)

    def send(self, item: WorkItem, rows: Tensor) -> None:
        if len(self._sent) == self.slots:
            raise WorldError(f"item {item.index} was sent before item {min(self._sent)} was released: the ring is full")
        self._sent[item.index] = rows

    def flush(self, timeout_s: float) -> None:
        """Nothing leaves the rank."""

    def post(self, item: WorkItem, replica: int) -> None:
        """Nothing to start: `send` already put the rows in place."""

    def take(self, item: WorkItem, timeout_s: float) -> Tensor:
        if item.index not in self._sent:
            raise WorldError(f"item {item.index} was not computed on this rank before it was taken")
        return self._sent[item.index][item.rows(self._shard)]

    def release(self, item: WorkItem, freed: Freed) -> None:
        del self._sent[item.index]
        freed()
