# SPDX-License-Identifier: Apache-2.0
"""What the two ends of a channel between ranks have in common, and how they find each other's memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

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


class AddressBook(Protocol):
    """Where the draft ranks of a one-sided transport publish how to reach their memory, as text."""

    @property
    def host(self) -> str:
        """The IP address under which the other ranks reach this host."""

    def publish(self, rank: int, text: str) -> None:
        """What target ranks must know to write to draft rank `rank`, this one."""

    def find(self, rank: int, name: str, timeout_s: float, check: Check) -> str:
        """What draft rank `rank` has published.

        Raises:
            WorldError: nothing within `timeout_s` seconds; calls the rank `name`.
        """


@dataclass(frozen=True)
class StoreBook:
    """The address book of one world, in a store that all its ranks share."""

    store: dist.Store

    @property
    def host(self) -> str:
        return local_address()

    def publish(self, rank: int, text: str) -> None:
        self.store.set(f"endpoint/{rank}", text)

    def find(self, rank: int, name: str, timeout_s: float, check: Check) -> str:
        key, deadline = f"endpoint/{rank}", time.monotonic() + timeout_s
        while not self.store.check([key]):
            check()
            if time.monotonic() > deadline:
                raise not_published(rank, name, timeout_s)
            time.sleep(_POLL_S)
        return str(self.store.get(key).decode())


def not_published(rank: int, name: str, timeout_s: float) -> WorldError:
    """The error of `AddressBook.find`."""
    return WorldError(f"{name} did not say within {timeout_s:.0f} s where its ring is", culprit=rank)


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
        # The control group's name tells this set of groups from others of the same world.
        return StoreBook(dist.PrefixStore(f"channel/{self.groups.control.group_name}", self.world.store))

    @property
    def rank(self) -> int:
        return self.world.facts.rank

    @property
    def device(self) -> torch.device:
        return self.world.device

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"
