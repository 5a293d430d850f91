# SPDX-License-Identifier: Apache-2.0
"""The channel: rows of features go from target ranks to draft ranks. Every implementation passes one contract test.

A payload is a contiguous range of rows and nothing else. Its size and its sender follow from the work item on both
ends, and the scheduler names the slot it goes to, so there are no headers and no metadata round trips. On every link
transfers keep the order in which the scheduler has the items sent.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from specdist.channel.config import ChannelConfig
from specdist.channel.ring import Ring
from specdist.core.errors import WorldError
from specdist.core.launch_env import local_address
from specdist.core.records import FeatureLayout, WorkItem
from specdist.core.topology import Link, Topology
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
        """What draft rank `rank` has published. Raises WorldError about `name`: nothing in `timeout_s` seconds."""
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


Freed = Callable[[], None]
"""Called, from any thread, once the slot of a released item may be written again."""
Announce = Callable[[int], None]
"""Tells the scheduler that the share of this target rank of item number i is on its way, or there (`one_sided`)."""
T = TypeVar("T")


def share(rows: int, tp_index: int, tp: int) -> slice:
    """The rows of a shard that tensor-parallel rank `tp_index` of `tp` sends: each holds all rows and sends a part."""
    return slice(rows * tp_index // tp, rows * (tp_index + 1) // tp)


def outgoing(topology: Topology, rank: int, item: WorkItem, rows: Tensor) -> Iterator[tuple[Link, int, Tensor]]:
    """What target rank `rank` sends of the packed forward `rows` of `item`: the link, the first row within the shard,
    and the rows. Links over which nothing goes are left out."""
    place = topology.target_place(rank)
    assert place is not None
    for s, draft_ranks in enumerate(topology.pod(item.pod)):
        part = share(item.shards[s].tokens, place.tp, len(topology.replicas[place.replica]))
        first = item.rows(s).start
        for destination in draft_ranks if part.start < part.stop else ():
            yield Link(rank, destination), part.start, rows[first + part.start : first + part.stop]


class FeatureSender(ABC):
    def connect(self, timeout_s: float, check: Check) -> None:
        """Reach every draft rank, before this rank counts as ready; `check` raises when the world has failed meanwhile.
        Raises WorldError: a draft rank is not there within `timeout_s` seconds, or a link does not come up."""
        return

    @property
    @abstractmethod
    def available(self) -> bool:
        """Whether `buffer` may be called: some buffer is free, or on its way out."""

    @abstractmethod
    def buffer(self, item: WorkItem) -> Tensor:
        """Rows [item.tokens, layout.width] for the engine to write; earlier sends from the same memory are ordered
        before whatever the current stream does next."""

    @abstractmethod
    def send(self, item: WorkItem, rows: Tensor, slot: int) -> None:
        """Send this rank's share of every shard into `slot` of the draft ranks' rings, and announce it. `rows` must be
        complete: the device has finished writing them. May be called from another thread than `buffer`, like `drop`;
        buffers are sent in any order."""

    @abstractmethod
    def drop(self, rows: Tensor) -> None:
        """Give a buffer back whose rows nobody needs."""

    @abstractmethod
    def flush(self, timeout_s: float) -> None:
        """Wait until everything sent has left; raises WorldError naming the link that has not."""

    def check(self) -> None:
        """Raise what has ended the sending, where that is a thread's; called often."""
        return

    def close(self, timeout_s: float) -> None:
        """Send nothing more, and give the buffers back. Waits at most `timeout_s` seconds."""
        return


class RingSender(FeatureSender, Generic[T]):
    """Hands out the buffers of a ring. A buffer comes again once what was sent from it, a T, has left it."""

    def __init__(self, ring: Ring):
        self._ring = ring
        self._free = deque(range(ring.slots))
        self._in_flight: deque[tuple[int, T]] = deque()

    @property
    def available(self) -> bool:
        return bool(self._free or self._in_flight)

    def buffer(self, item: WorkItem) -> Tensor:
        if not self._free:
            number, sent = self._in_flight.popleft()
            self._reuse(sent)
            self._free.append(number)
        return self._ring.slot(self._free.popleft(), item.tokens)

    def send(self, item: WorkItem, rows: Tensor, slot: int) -> None:
        self._in_flight.append((self._ring.number(rows), self._issue(item, rows, slot)))

    def drop(self, rows: Tensor) -> None:
        self._free.append(self._ring.number(rows))

    def flush(self, timeout_s: float) -> None:
        while self._in_flight:
            number, sent = self._in_flight.popleft()
            self._finish(sent, timeout_s)
            self._free.append(number)

    @abstractmethod
    def _issue(self, item: WorkItem, rows: Tensor, slot: int) -> T:
        """Announce the item and start to send it."""

    @abstractmethod
    def _reuse(self, sent: T) -> None:
        """Order whatever the current stream does next behind `sent`."""

    @abstractmethod
    def _finish(self, sent: T, timeout_s: float) -> None:
        """Wait on the host until `sent` has left; raises WorldError naming the link."""


class DropSender(FeatureSender):
    """For target_only: features are computed, measured and dropped. Every item overwrites the same buffer."""

    available = True  # what is there is not read, so a forward may overwrite the one before

    def __init__(self, ring: Ring):
        self._ring = ring

    def buffer(self, item: WorkItem) -> Tensor:
        return self._ring.slot(0, item.tokens)

    def send(self, item: WorkItem, rows: Tensor, slot: int) -> None:
        raise AssertionError("target_only has no slots")

    def drop(self, rows: Tensor) -> None:
        """There is nothing to give back."""

    def flush(self, timeout_s: float) -> None:
        """Nothing was sent."""


class FeatureReceiver(ABC):
    """The draft rank's end: a ring of equal slots, one per item in flight."""

    @abstractmethod
    def post(self, item: WorkItem, replica: int, slot: int) -> None:
        """All ranks of `replica` have announced `item`: receive this rank's shard of it into `slot`, which is free."""

    @abstractmethod
    def take(self, item: WorkItem, timeout_s: float) -> Tensor:
        """The rows [T, layout.width] of this rank's shard of an item that was posted, usable on the current stream.
        Raises WorldError: not there within `timeout_s`; names the ranks that owe it."""

    @abstractmethod
    def release(self, item: WorkItem, freed: Freed) -> None:
        """The rows are no longer read by anything after the work already on the current stream. Calls `freed`, now or
        later, in the order of the releases."""

    def retire(self) -> object:
        """After the last item: give back the memory that only this rank uses. What is returned must be kept as long as
        a target rank may still write to it."""
        return None

    def close(self) -> None:
        """No target rank sends any more: give back all memory."""
        return


@dataclass(frozen=True)
class Transport:
    """What carries features between ranks: one value per transport, in `specdist.channel.registry`.

    Attributes:
        name: the value of channel.transport.
        sender: makes a target rank's end, given the rows of each of its `channel.send_buffers` buffers.
        receiver: makes a draft rank's end, given the slots of its ring and the rows of a slot.
        link_backend: torch.distributed's backend of the two-rank group that every link needs; None: it needs none.
        one_sided: the target writes and announces what has arrived, and the draft takes no part, so a target world may
            join and leave at any time.
        needs_gpus: it moves features between GPUs only.
        check_installed: raises ConfigError, with what to install, where it cannot be used on this host.
        drain_s: seconds after which nothing that a lost target rank has sent is on its way any more (one-sided).
    """

    name: str
    sender: Callable[[Wire, int, Announce], FeatureSender]
    receiver: Callable[[Wire, int, int, Check], FeatureReceiver]
    link_backend: str | None = None
    one_sided: bool = False
    needs_gpus: bool = False
    check_installed: Callable[[], None] = lambda: None
    drain_s: Callable[[ChannelConfig], float] = lambda config: 0.0
