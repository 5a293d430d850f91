# SPDX-License-Identifier: Apache-2.0
"""The two ends of the channel between ranks, by `channel.transport`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch.distributed as dist

from specdist.channel.base import FeatureReceiver, FeatureSender
from specdist.channel.p2p import P2PReceiver, P2PSender
from specdist.channel.wire import Wire
from specdist.core.launch_env import local_address, reachable_address

if TYPE_CHECKING:
    from specdist.channel.mooncake.directory import Directory, Publisher
    from specdist.channel.mooncake.engine import TransferEngine


def make_sender(wire: Wire, item_rows: int) -> FeatureSender:
    """A target rank's end, with `channel.send_buffers` buffers of `item_rows` rows."""
    if wire.config.transport != "mooncake":
        return P2PSender(wire, item_rows)
    from specdist.channel.mooncake.sender import MooncakeSender

    return MooncakeSender(wire, item_rows, *_mooncake(wire))


def make_receiver(
    wire: Wire, slots: int, shard_rows: int, check: Callable[[], None], publisher: Publisher | None = None
) -> FeatureReceiver:
    """A draft rank's end, a ring of `slots` slots of `shard_rows` rows; `check` raises when the world has failed.
    `publisher`: where a rank of a draft world says where its ring is."""
    if wire.config.transport != "mooncake":
        return P2PReceiver(wire, slots, shard_rows, check)
    from specdist.channel.mooncake.receiver import MooncakeReceiver

    if publisher is not None:
        from specdist.channel.mooncake.engine import TransferEngine

        engine = TransferEngine(reachable_address(), wire.config.mooncake)
        return MooncakeReceiver(wire, slots, shard_rows, check, engine, publisher)
    return MooncakeReceiver(wire, slots, shard_rows, check, *_mooncake(wire))


def _mooncake(wire: Wire) -> tuple[TransferEngine, Directory]:
    """Loading Mooncake starts threads and opens ports, on ranks that use it only."""
    from specdist.channel.mooncake.directory import Directory
    from specdist.channel.mooncake.engine import TransferEngine

    # The control group's name tells this set of groups from others of the same world.
    store = dist.PrefixStore(f"mooncake/{wire.groups.control.group_name}", wire.world.store)
    return TransferEngine(local_address(), wire.config.mooncake), Directory(store)
