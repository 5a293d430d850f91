# SPDX-License-Identifier: Apache-2.0
"""The bandwidth of every link, measured with the senders and receivers that training uses."""

import contextlib
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property
from itertools import pairwise

import msgspec
import torch
import torch.distributed as dist

from specdist.channel.base import FeatureReceiver, FeatureSender, Wire, store_book
from specdist.channel.config import ChannelConfig
from specdist.channel.registry import transport_for
from specdist.core.errors import UserError, WorldError
from specdist.core.progress import Cursor
from specdist.core.records import FeatureLayout, Shard, WorkItem
from specdist.core.topology import Link, Topology
from specdist.world.groups import Groups, World
from specdist.world.links import rounds

REPETITIONS = 5
"""The median of this many transfers counts; one more goes before them, unmeasured."""
PAYLOAD = {"cuda": 64 * 2**20, "cpu": 4 * 2**20}
"""Bytes, by the device of the ranks."""
_ROW = FeatureLayout((), 4096, final=True, dtype=torch.uint8)
_SLOTS = 2
"""One transfer is under way while the next one is posted."""
_MARGIN_S = 4.0
_DONE, _GIVEN_UP = "done", "given up"


class LinkSpeed(msgspec.Struct, frozen=True):
    """Bandwidth from a target rank to a draft rank, in 10^9 bytes a second, as the end sees it that knows when all has
    arrived: the draft rank, or the target rank of a one-sided transport."""

    source: int
    destination: int
    gb_per_s: float


@dataclass(frozen=True)
class _Pairs(Topology):
    """Every target rank is a replica and every draft rank a shard of its own, so that an item can go over one link.
    Errors name the ranks as in `real`."""

    real: Topology

    @cached_property
    def links(self) -> tuple[Link, ...]:
        return tuple(link for link in self.real.links if link.destination in self.draft_ranks)

    def describe(self, rank: int) -> str:
        return self.real.describe(rank)


def measure_links(
    config: ChannelConfig, topology: Topology, groups: Groups, world: World, payload: int | None, timeout_s: float
) -> Iterator[LinkSpeed]:
    """Try every link of this rank in the rounds of `rounds`, one writer to a draft rank at a time. All ranks of a
    topology with links call it, once the links are connected, and get what they measured. Raises WorldError: a link
    does not come up, breaks or stalls; names both ends. `payload`: bytes of one transfer; None for what suits the
    device. `timeout_s`: how long all transfers of one link may take, in seconds, and every wait for another rank."""
    targets, drafts = (tuple((rank,) for rank in ranks) for ranks in (topology.target_ranks, topology.draft_ranks))
    pairs = _Pairs(topology.mode, topology.hosts, targets, drafts, len(drafts), real=topology)
    store = dist.PrefixStore("channel/probe", world.store)
    config = replace(config, send_buffers=_SLOTS)
    wire = Wire(config, pairs, world, groups, _ROW, timeout_s, address_book=store_book(store))
    rows = max((payload or PAYLOAD[world.device.type]) // _ROW.bytes_per_token, 1)
    return _Probe(wire, store, rows).measure()


class _Probe:
    """One rank's part of `measure_links`."""

    def __init__(self, wire: Wire, store: dist.Store, rows: int):
        self._wire, self._store, self._rows, self._rank = wire, store, rows, wire.rank
        self._transport = transport_for(wire.config.transport, wire.device)
        self._arrived: list[float] = []
        """When the transfers of the link that is measured ended."""

    def measure(self) -> Iterator[LinkSpeed]:
        links = list(rounds(self._wire.topology))
        if self._wire.topology.target_place(self._rank) is None:
            return self._receive_all([link for link in links if link.destination == self._rank])
        return self._send_all(links)

    def _send_all(self, links: list[Link]) -> Iterator[LinkSpeed]:
        mine = [link for link in links if link.source == self._rank]
        try:
            absent = self._absent([link.destination for link in mine])
            sender = self._connected([link.destination for link in mine if link.destination not in absent])
            for link in (link for link in mine if link.destination not in absent):
                earlier = [other for other in links[: links.index(link)] if other.destination == link.destination]
                if earlier and not self._await(earlier[-1]):
                    self._tell(link, _GIVEN_UP)  # who comes next need not wait for a link that may break, too
                with self._naming(link):
                    self._arrived.clear()
                    for k in range(REPETITIONS + 1):
                        item = self._item(link, k)
                        sender.send(item, sender.buffer(item), k % _SLOTS)
                    sender.flush(self._wire.timeout_s)
                self._tell(link, _DONE)
                if self._transport.one_sided:
                    yield self._speed(link)
            sender.close(self._wire.timeout_s)
            for link in (link for link in mine if link.destination in absent):
                why = f"{self._wire.topology.describe_link(link)} did not come up: {absent[link.destination]}"
                raise WorldError(why, culprit=link.destination)
        finally:
            for link in mine:  # those that are done already stay so
                self._tell(link, _GIVEN_UP)

    def _absent(self, drafts: list[int]) -> dict[int, str]:
        """Those of these draft ranks that have no receiver, and why."""
        deadline, found = time.monotonic() + self._wire.timeout_s, {}
        for draft in drafts:
            key, left = f"receiver/{draft}", max(deadline - time.monotonic(), 0.01)
            try:
                self._store.wait([key], timedelta(seconds=left))
                why = self._store.get(key).decode()
            except dist.DistError:
                name = self._wire.topology.describe(draft)
                why = f"{name} was not ready to receive within {self._wire.timeout_s:.0f} s (world.join_timeout_s)"
            if why != _DONE:
                found[draft] = why
        return found

    def _connected(self, drafts: list[int]) -> FeatureSender:
        ranks = tuple((rank,) for rank in self._wire.topology.draft_ranks if rank in drafts)
        self._wire = replace(self._wire, topology=replace(self._wire.topology, draft=ranks, shards=len(ranks)))
        name = self._wire.topology.describe(self._rank)
        try:
            sender = self._transport.sender(self._wire, self._rows, lambda _: self._arrived.append(time.perf_counter()))
        except UserError as error:
            raise WorldError(f"{name}: {error}", culprit=self._rank) from error
        try:
            sender.connect(self._wire.timeout_s, lambda: None)
        except WorldError as error:
            raise WorldError(f"the links of {name} did not come up: {error}", culprit=error.culprit) from error
        return sender

    def _receive_all(self, links: list[Link]) -> Iterator[LinkSpeed]:
        try:
            receiver = self._transport.receiver(self._wire, _SLOTS, self._rows, lambda: None)
        except UserError as error:
            why = f"{self._wire.topology.describe(self._rank)}: {error}"
            self._store.set(f"receiver/{self._rank}", why)
            raise WorldError(why, culprit=self._rank) from error
        self._store.set(f"receiver/{self._rank}", _DONE)
        for link in links if not self._transport.one_sided else ():
            with self._naming(link):
                self._receive(receiver, link)
            yield self._speed(link)
        if sum(map(self._await, links)) == len(links):  # else somebody may still write
            receiver.close()

    def _receive(self, receiver: FeatureReceiver, link: Link) -> None:
        self._arrived.clear()
        replica = self._wire.topology.target_ranks.index(link.source)
        for k in range(REPETITIONS + _SLOTS):
            if k <= REPETITIONS:
                receiver.post(self._item(link, k), replica, k % _SLOTS)
            if k >= _SLOTS - 1:
                item = self._item(link, k - _SLOTS + 1)
                receiver.take(item, self._wire.timeout_s)
                self._arrived.append(time.perf_counter())
                receiver.release(item, lambda: None)

    def _speed(self, link: Link) -> LinkSpeed:
        seconds = statistics.median(later - earlier for earlier, later in pairwise(self._arrived))
        return LinkSpeed(link.source, link.destination, self._rows * _ROW.bytes_per_token / seconds / 1e9)

    def _item(self, link: Link, number: int) -> WorkItem:
        """Rows for the draft rank of `link` alone."""
        drafts = self._wire.topology.draft_ranks
        shards = tuple(Shard((0,), (self._rows,)) if d == link.destination else Shard((), ()) for d in drafts)
        return WorkItem(number, Cursor(), Cursor(), shards)

    def _tell(self, link: Link, how: str) -> None:
        """Say how a link ended; what is said first counts."""
        self._store.compare_set(_key(link), "", how)

    def _await(self, link: Link) -> bool:
        """Wait until the transfers over `link` have ended; returns whether all went well there."""
        limit = self._wire.timeout_s + _MARGIN_S
        try:
            self._store.wait([_key(link)], timedelta(seconds=limit))
        except dist.DistError as error:
            who, path = self._wire.topology.describe(self._rank), self._wire.topology.describe_link(link)
            raise WorldError(
                f"{path} stalled while it was measured: {who} waited {limit:.0f} s for its transfers to end "
                "(world.join_timeout_s)",
                culprit=link.source,
            ) from error
        return bool(self._store.get(_key(link)).decode() == _DONE)

    @contextlib.contextmanager
    def _naming(self, link: Link) -> Iterator[None]:
        try:
            yield
        except WorldError as error:
            why = f"{self._wire.topology.describe_link(link)} broke while it was measured: {error}"
            raise WorldError(why, culprit=error.culprit) from error


def _key(link: Link) -> str:
    return f"ended/{link.source}/{link.destination}"
