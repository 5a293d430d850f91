# SPDX-License-Identifier: Apache-2.0
"""The end of the line in target_only mode: features are computed, measured and dropped."""

from __future__ import annotations

import torch
from torch import Tensor

from specdist.channel.base import FeatureSender
from specdist.channel.ring import Ring
from specdist.core.records import FeatureLayout, WorkItem


class DropSender(FeatureSender):
    """One buffer that every item overwrites."""

    def __init__(self, layout: FeatureLayout, item_rows: int, device: torch.device):
        self._ring = Ring(layout, 1, item_rows, device)

    @property
    def buffers(self) -> int:
        return 2  # nobody reads them, so a forward may overwrite the one before

    def buffer(self, item: WorkItem) -> Tensor:
        return self._ring.slot(0, item.tokens)

    def send(self, item: WorkItem, rows: Tensor) -> None:
        """Nobody asked for them."""

    def flush(self, timeout_s: float) -> None:
        """Nothing was sent."""
