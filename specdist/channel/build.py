# SPDX-License-Identifier: Apache-2.0
"""The two ends of the channel between ranks, by `channel.transport`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist

from specdist.channel.base import FeatureReceiver, FeatureSender
from specdist.channel.config import ChannelConfig
from specdist.channel.p2p import P2PReceiver, P2PSender
from specdist.contract import local_address
from specdist.groups import Groups, World
from specdist.records import FeatureLayout
from specdist.topology import Topology


@dataclass(frozen=True)
class Wire:
    """All that both ends are made of."""

    config: ChannelConfig
    topology: Topology
    world: World
    groups: Groups
    layout: FeatureLayout
    timeout_s: float
    """Limit of every single wait, in seconds."""


def make_sender(wire: Wire, item_rows: int) -> FeatureSender:
    """A target rank's end, with `channel.send_buffers` buffers of `item_rows` rows."""
    rank, device, buffers = wire.world.facts.rank, wire.world.device, wire.config.send_buffers
    if wire.config.transport != "mooncake":
        return P2PSender(
            wire.topology, rank, wire.groups.links, wire.layout, buffers, item_rows, device, wire.timeout_s
        )
    # Loading Mooncake starts threads and opens ports, on ranks that use it only.
    from specdist.channel.mooncake.engine import TransferEngine
    from specdist.channel.mooncake.sender import MooncakeSender

    engine = TransferEngine(local_address(), wire.config.mooncake)
    return MooncakeSender(
        wire.topology, rank, engine, _directory(wire), wire.layout, buffers, item_rows, device, wire.timeout_s
    )


def make_receiver(wire: Wire, slots: int, shard_rows: int, check: Callable[[], None]) -> FeatureReceiver:
    """A draft rank's end, a ring of `slots` slots of `shard_rows` rows; `check` raises when the world has failed."""
    rank, device = wire.world.facts.rank, wire.world.device
    if wire.config.transport != "mooncake":
        return P2PReceiver(wire.topology, rank, wire.groups.links, wire.layout, slots, shard_rows, device, check)
    from specdist.channel.mooncake.engine import TransferEngine
    from specdist.channel.mooncake.receiver import MooncakeReceiver

    engine = TransferEngine(local_address(), wire.config.mooncake)
    return MooncakeReceiver(
        wire.topology, rank, engine, _directory(wire), wire.layout, slots, shard_rows, device, check
    )


def _directory(wire: Wire):  # type: ignore[no-untyped-def]
    from specdist.channel.mooncake.directory import Directory

    # The control group's name tells this set of groups from others of the same world.
    return Directory(dist.PrefixStore(f"mooncake/{wire.groups.control.group_name}", wire.world.store))
