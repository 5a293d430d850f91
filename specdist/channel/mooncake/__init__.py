# SPDX-License-Identifier: Apache-2.0
"""The Mooncake channel: one-sided writes over RDMA or TCP into rings that the draft ranks own."""

from specdist.channel.base import Transport, Wire
from specdist.channel.mooncake.ends import MooncakeReceiver, MooncakeSender
from specdist.channel.mooncake.engine import TransferEngine, check_installed, process_engine


def _engine(wire: Wire) -> TransferEngine:
    return process_engine(wire.book.host(), wire.config.mooncake)


MOONCAKE = Transport(
    name="mooncake",
    sender=lambda wire, rows, announce: MooncakeSender(wire, rows, announce, _engine(wire)),
    receiver=lambda wire, slots, rows, check: MooncakeReceiver(wire, slots, rows, _engine(wire)),
    one_sided=True,
    check_installed=check_installed,
    drain_s=lambda config: config.mooncake.stall_s,
)
