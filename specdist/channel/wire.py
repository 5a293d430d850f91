# SPDX-License-Identifier: Apache-2.0
"""What the two ends of a channel between ranks have in common, and how they find each other's memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from specdist.channel.config import ChannelConfig
from specdist.core.errors import WorldError
from specdist.core.launch_env import local_address
from specdist.core.records import FeatureLayout
from specdist.core.topology import Topology
from specdist.world.groups import Groups, World

Check = Callable[[], None]
"""Called while waiting; raises when the world is known to have failed."""
_POLL_S = 0.2


@dataclass(frozen=True)
class AddressBook:
    """Where the draft ranks of a one-sided transport publish how to reach their memory, as text.

    Attributes:
        host: gives the IP address under which the other ranks reach this host.
        publish: called by a draft rank with its number and what target ranks must know to write to it.
        look: what a draft rank has published; None: nothing yet.
    """

    host: Callable[[], str]
    publish: Callable[[int, str], None]
    look: Callable[[int], str | None]

    def find(self, rank: int, name: str, timeout_s: float, check: Check) -> str:
        """What draft rank `rank` has published. Raises WorldError: nothing within `timeout_s` seconds; calls the rank
        `name`."""
        deadline = time.monotonic() + timeout_s
        while (text := self.look(rank)) is None:
            check()
            if time.monotonic() > deadline:
                raise WorldError(
                    f"{name} did not say within {timeout_s:.0f} s where its receive buffer is", culprit=rank
                )
            time.sleep(_POLL_S)
        return text


def store_book(store: dist.Store) -> AddressBook:
    """The address book of one world, in a store that all its ranks share."""

    def look(rank: int) -> str | None:
        key = f"endpoint/{rank}"
        return str(store.get(key).decode()) if store.check([key]) else None

    return AddressBook(local_address, lambda rank, text: store.set(f"endpoint/{rank}", text), look)


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
    address_book: AddressBook | None = None
    """Where draft ranks publish their memory; None: in the store of this world."""

    @property
    def book(self) -> AddressBook:
        if self.address_book is not None:
            return self.address_book
        return store_book(dist.PrefixStore(f"channel/{self.groups.name}", self.world.store))

    @property
    def rank(self) -> int:
        return self.world.facts.rank

    @property
    def device(self) -> torch.device:
        return self.world.device

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"
