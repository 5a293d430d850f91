# SPDX-License-Identifier: Apache-2.0
"""What the two ends of a channel between ranks have in common."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from specdist.channel.config import ChannelConfig
from specdist.core.records import FeatureLayout
from specdist.core.topology import Topology
from specdist.core.trace import NO_TRACE, Trace
from specdist.world.groups import Groups, World


@dataclass(frozen=True)
class Wire:
    """All that both ends are made of, on this rank."""

    config: ChannelConfig
    topology: Topology
    world: World
    groups: Groups
    layout: FeatureLayout
    timeout_s: float
    """Limit of every single wait, in seconds."""
    trace: Trace = NO_TRACE

    @property
    def rank(self) -> int:
        return self.world.facts.rank

    @property
    def device(self) -> torch.device:
        return self.world.device

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"
