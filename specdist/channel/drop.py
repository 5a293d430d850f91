# SPDX-License-Identifier: Apache-2.0
"""The end of the line in target_only mode: features are computed, measured and dropped."""

from __future__ import annotations

from torch import Tensor

from specdist.channel.base import Announce, FeatureSender
from specdist.channel.ring import Ring
from specdist.core.records import WorkItem


class DropSender(FeatureSender):
    """One buffer that every item overwrites."""

    buffers = 2  # they are not read, so a forward may overwrite the one before

    def __init__(self, ring: Ring, announce: Announce):
        self._ring, self._announce = ring, announce

    def buffer(self, item: WorkItem) -> Tensor:
        return self._ring.slot(0, item.tokens)

    def send(self, item: WorkItem, rows: Tensor, slot: int) -> None:
        self._announce(item.index)

    def flush(self, timeout_s: float) -> None:
        """Nothing was sent."""
