# SPDX-License-Identifier: Apache-2.0
"""The channel: rows of features go from target ranks to draft ranks. Every implementation passes one contract test.

A payload is a contiguous range of rows and nothing else. Its size, its sender and its place follow from the work item
on both ends, so there are no headers and no metadata round trips. On every link transfers keep the order in which items
were dispatched to that replica.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from specdist.channel.config import ChannelConfig
from specdist.channel.wire import Check, Wire
from specdist.core.errors import WorldError
from specdist.core.records import WorkItem
from specdist.core.topology import Topology

Freed = Callable[[], None]
"""Called, from any thread, once the slot of a released item may be written again."""


def share(rows: int, tp_index: int, tp: int) -> slice:
    """The rows of a shard that tensor-parallel rank `tp_index` of `tp` sends: each holds all rows and sends a part."""
    return slice(rows * tp_index // tp, rows * (tp_index + 1) // tp)


def share_of_item(item: WorkItem, shard: int, tp_index: int, tp: int) -> slice:
    """The same of shard `shard`, as rows of the packed forward."""
    rows = item.rows(shard)
    part = share(rows.stop - rows.start, tp_index, tp)
    return slice(rows.start + part.start, rows.start + part.stop)


class FeatureSender(ABC):
    """The target rank's end."""

    def connect(self, timeout_s: float, check: Callable[[], None]) -> None:
        """Reach every draft rank, before this rank counts as ready; `check` raises when the world has failed meanwhile.

        Raises:
            WorldError: a draft rank is not there within `timeout_s` seconds, or a link does not come up.
        """
        return

    @property
    @abstractmethod
    def buffers(self) -> int:
        """How many buffers may be handed out before the first of them is sent."""

    def place(self, item: int, slot: int, replica: int) -> None:
        """Two worlds, before `send`: the slot of the draft ranks' rings that item number `item` goes to, and the number
        of this replica there. Only a channel that writes into the rings has this."""
        return

    @abstractmethod
    def buffer(self, item: WorkItem) -> Tensor:
        """Rows [item.tokens, layout.width] for the engine to write; earlier sends from the same memory are ordered
        before whatever the current stream does next."""

    @abstractmethod
    def send(self, item: WorkItem, rows: Tensor) -> None:
        """Send this rank's share of every shard. `rows` must be complete: the device has finished writing them.
        Buffers are sent in the order in which they were handed out."""

    @abstractmethod
    def flush(self, timeout_s: float) -> None:
        """Wait until everything sent has left; raises WorldError naming the link that has not."""

    def close(self, timeout_s: float) -> None:
        """Send nothing more, and give the buffers back. Waits at most `timeout_s` seconds."""
        return


class FeatureReceiver(ABC):
    """The draft rank's end: a ring of equal slots, one per item in flight."""

    @property
    @abstractmethod
    def slots(self) -> int:
        """How many items the ring holds."""

    def enter_thread(self) -> None:
        """Called once by the thread that will call `post`."""
        return

    def place(self, item: int, slot: int, shares: int) -> None:
        """Two worlds, before `post`: the slot that item number `item` is in, and the number of its shares. Only a
        channel that the target writes through has this."""
        return

    @abstractmethod
    def post(self, item: WorkItem, replica: int) -> None:
        """Start to receive this rank's shard of `item` from a target replica into the item's slot. May be called from
        another thread than `take`; the scheduler's credits guarantee that the slot is free."""

    @abstractmethod
    def take(self, item: WorkItem, timeout_s: float) -> Tensor:
        """The rows [T, layout.width] of this rank's shard, usable on the current stream.

        Raises:
            WorldError: not there within `timeout_s`; names the ranks that owe it.
        """

    @abstractmethod
    def release(self, item: WorkItem, freed: Freed) -> None:
        """The rows are no longer read by anything after the work already on the current stream. Calls `freed`, now or
        later, in the order of the releases."""

    def retire(self) -> object:
        """After the last item: give back the memory that only this rank uses. What is returned must be kept as long as
        a target rank may still write to it."""
        return None


@dataclass(frozen=True)
class Transport:
    """What carries features between ranks: one value per transport, in `specdist.channel.registry`.

    Attributes:
        name: the value of channel.transport.
        sender: makes a target rank's end, with `channel.send_buffers` buffers of so many rows.
        receiver: makes a draft rank's end, a ring of so many slots of so many rows.
        link_backend: torch.distributed's backend of the two-rank group that every link needs; None: it needs none.
        one_sided: the target writes and the draft takes no part, so a target world may join and leave at any time.
        needs_gpus: it moves features between GPUs only.
        check_installed: raises ConfigError, with what to install, where it cannot be used on this host.
        drain_s: seconds after which nothing that a lost target rank has sent is on its way any more (one-sided).
    """

    name: str
    sender: Callable[[Wire, int, Callable[[int], None] | None], FeatureSender]
    receiver: Callable[[Wire, int, int, Check], FeatureReceiver]
    link_backend: str | None = None
    one_sided: bool = False
    needs_gpus: bool = False
    check_installed: Callable[[], None] = lambda: None
    drain_s: Callable[[ChannelConfig], float] = lambda config: 0.0


class Posts:
    """The items that were posted and not yet taken, each with the replica that sends it."""

    def __init__(self, topology: Topology, rank: int, check: Callable[[], None]):
        self._topology, self._rank, self._check = topology, rank, check
        self._replicas: dict[int, int] = {}
        self._changed = threading.Condition()

    def add(self, item: WorkItem, replica: int) -> None:
        with self._changed:
            self._replicas[item.index] = replica
            self._changed.notify_all()

    def take(self, item: WorkItem, timeout_s: float) -> int:
        """The replica of `item`, once it is posted.

        Raises:
            WorldError: not posted within `timeout_s` seconds, or the world has failed.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while item.index not in self._replicas:
                self._check()
                if time.monotonic() > deadline:
                    raise WorldError(
                        f"{self._topology.describe(self._rank)} waited {timeout_s:.0f} s for item {item.index}, which "
                        "no target replica has delivered (world.wait_timeout_s)"
                    )
                self._changed.wait(timeout=0.5)
            return self._replicas.pop(item.index)
