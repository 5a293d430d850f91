# SPDX-License-Identifier: Apache-2.0
"""Point-to-point channel over torch.distributed: NCCL between GPUs, gloo between CPUs.

Every (target rank, draft rank) link has a two-rank group of its own, so transfers run on that group's stream beside
the compute and beside each other. No deadlock is possible: a receive is posted only for an item whose features exist
and for which the scheduler holds a free slot; on a link both ends issue transfers in the order in which the replica
computed the items; and no transfer waits for another link.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from specdist.channel.base import FeatureReceiver, FeatureSender, Freed, Posts, Transport, share, share_of_item
from specdist.channel.ring import Ring
from specdist.channel.wire import Wire
from specdist.core.errors import WorldError
from specdist.core.records import WorkItem
from specdist.core.topology import Link, Topology
from specdist.core.trace import span
from specdist.world.links import TransferError, wait_work


@dataclass
class _Transfer:
    """Operations of one item at one end. `staging` is host memory that gloo needs beside a GPU."""

    works: list[tuple[Link, dist.Work]] = field(default_factory=list)
    staging: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class P2PSender(FeatureSender):
    """Sends this target rank's share of each shard over its links."""

    def __init__(self, wire: Wire, item_rows: int):
        topology, rank, device, links = wire.topology, wire.rank, wire.device, wire.groups.links
        place = topology.target_place(rank)
        assert place is not None, f"rank {rank} is not a target rank"
        self._topology, self._rank, self._place, self._links = topology, rank, place, links
        self._tp = len(topology.replicas[place.replica])
        self._ring = Ring(wire.layout, wire.config.send_buffers, item_rows, device)
        self._in_flight: dict[int, _Transfer] = {}
        self._handed_out = self._sent = 0
        # Sends must not queue behind the next forward, which is on the current stream by the time this one is sent.
        self._on_stream = torch.cuda.stream(torch.cuda.Stream(device) if wire.on_gpu else None)
        self._timeout_s = wire.timeout_s
        self._staged = wire.on_gpu and any(dist.get_backend(g) == "gloo" for g in links.values())
        self._on_device = wire.on_gpu and not self._staged

    @property
    def buffers(self) -> int:
        return self._ring.slots

    def buffer(self, item: WorkItem) -> Tensor:
        assert self._handed_out - self._sent < self.buffers, "a buffer is asked for before an earlier one was sent"
        number = self._handed_out
        self._handed_out += 1
        earlier = self._in_flight.pop(number % self._ring.slots, None)
        if earlier is not None:
            if self._on_device:
                for _, work in earlier.works:
                    work.wait()  # orders the current stream behind the send, without waiting on the host
            else:
                self._finish(earlier, self._timeout_s)
        return self._ring.slot(number, item.tokens)

    def send(self, item: WorkItem, rows: Tensor) -> None:
        with self._on_stream:  # does nothing where there is no stream
            transfer = self._issue(item, rows)
        self._in_flight[self._sent % self._ring.slots] = transfer
        self._sent += 1

    def _issue(self, item: WorkItem, rows: Tensor) -> _Transfer:
        transfer = _Transfer()
        for d, draft_ranks in enumerate(self._topology.draft):
            part = rows[share_of_item(item, d, self._place.tp, self._tp)]
            if len(part) == 0:
                continue
            payload = _to_host(part) if self._staged else part
            for destination in draft_ranks:
                link = Link(self._rank, destination)
                with span("send", item.index, destination=destination, bytes=payload.nbytes):
                    work = _start(dist.isend, payload, destination, link, self._topology, self._links)
                transfer.works.append((link, work))
            if self._staged:
                transfer.staging.append((payload, part))  # gloo reads it until the work is done
        return transfer

    def flush(self, timeout_s: float) -> None:
        for transfer in self._in_flight.values():
            self._finish(transfer, timeout_s)
        self._in_flight.clear()

    def _finish(self, transfer: _Transfer, timeout_s: float) -> None:
        for link, work in transfer.works:
            try:
                wait_work(work, timeout_s, self._on_device)
            except TransferError as error:
                raise WorldError(
                    f"{self._topology.describe(link.destination)} did not take what "
                    f"{self._topology.describe(link.source)} sent (limit {timeout_s:.0f} s): {error}"
                ) from error


class P2PReceiver(FeatureReceiver):
    """Receives this draft rank's shard from the replica that computed it, share by share.

    Args:
        check: called while waiting; raises when the world is known to have failed.
    """

    def __init__(self, wire: Wire, slots: int, shard_rows: int, check: Callable[[], None]):
        topology, rank, device, links = wire.topology, wire.rank, wire.device, wire.groups.links
        place = topology.draft_place(rank)
        assert place is not None, f"rank {rank} is not a draft rank"
        self._topology, self._rank, self._shard, self._links = topology, rank, place.dp, links
        self._ring = Ring(wire.layout, slots, shard_rows, device)
        staged = wire.on_gpu and any(dist.get_backend(g) == "gloo" for g in links.values())
        self._host_ring = Ring(wire.layout, slots, shard_rows, torch.device("cpu"), pinned=True) if staged else None
        self._on_device = wire.on_gpu and not staged
        self._stream = torch.cuda.Stream(device) if self._on_device else None
        self._read = [torch.cuda.Event() for _ in range(slots)] if self._on_device else []
        self._transfers: dict[int, tuple[Tensor, _Transfer]] = {}
        self._posts = Posts(topology, rank, check)
        self._check = check

    @property
    def slots(self) -> int:
        return self._ring.slots

    def enter_thread(self) -> None:
        """All that the thread issues is on the receiver's stream. Without this its device would be GPU 0, whatever this
        rank's is, where it would leave a context."""
        if self._stream is not None:
            torch.cuda.set_device(self._stream.device)
            torch.cuda.set_stream(self._stream)

    def post(self, item: WorkItem, replica: int) -> None:
        rows = (self._host_ring or self._ring).slot(item.index, item.shards[self._shard].tokens)
        transfer = _Transfer()
        if self._stream is not None:
            # The step that released the slot may still be reading it: the receive is ordered behind that read.
            self._stream.wait_event(self._read[item.index % self.slots])
        self._issue(item.index, rows, replica, transfer)
        self._transfers[item.index] = rows, transfer
        self._posts.add(item, replica)

    def _issue(self, index: int, rows: Tensor, replica: int, transfer: _Transfer) -> None:
        sources = self._topology.replicas[replica]
        for t, source in enumerate(sources):
            part = rows if len(sources) == 1 else rows[share(len(rows), t, len(sources))]
            if len(part) == 0:
                continue
            link = Link(source, self._rank)
            with span("receive", index, source=source, bytes=part.nbytes):
                work = _start(dist.irecv, part, source, link, self._topology, self._links)
            transfer.works.append((link, work))

    def take(self, item: WorkItem, timeout_s: float) -> Tensor:
        deadline = time.monotonic() + timeout_s
        self._posts.take(item, timeout_s)
        rows, transfer = self._transfers.pop(item.index)
        for link, work in transfer.works:
            try:
                wait_work(work, max(deadline - time.monotonic(), 0.001), self._on_device)
            except TransferError as error:
                self._check()
                raise WorldError(
                    f"{self._topology.describe(self._rank)} did not receive its rows of item {item.index} from "
                    f"{self._topology.describe(link.source)} (limit {timeout_s:.0f} s): {error}"
                ) from error
        if self._host_ring is None:
            return rows
        on_device = self._ring.slot(item.index, len(rows))
        return on_device.copy_(rows, non_blocking=True)

    def release(self, item: WorkItem, freed: Freed) -> None:
        if self._on_device:
            self._read[item.index % self.slots].record()
        elif self._host_ring is not None:
            torch.cuda.current_stream().synchronize()  # the staging copy must have been read before gloo writes again
        freed()  # whatever comes next into this slot is ordered behind the reads of it


def _start(
    operation: Callable[..., dist.Work | None],
    rows: Tensor,
    partner: int,
    link: Link,
    topology: Topology,
    links: Mapping[Link, dist.ProcessGroup],
) -> dist.Work:
    """Issue a send or a receive; raises WorldError naming the link when its connection is known to be broken."""
    try:
        work = operation(rows, partner, group=links[link])
    except RuntimeError as error:
        broken = f"link {topology.describe(link.source)} -> {topology.describe(link.destination)} is broken"
        raise WorldError(f"{broken}: {str(error).splitlines()[0]}") from error
    assert work is not None
    return work


def _to_host(part: Tensor) -> Tensor:
    """A host copy of device rows; gloo cannot read device memory (shared-GPU development only)."""
    return part.cpu()


NCCL = Transport("nccl", lambda wire, rows, _: P2PSender(wire, rows), P2PReceiver, link_backend="nccl", needs_gpus=True)
GLOO = Transport("gloo", lambda wire, rows, _: P2PSender(wire, rows), P2PReceiver, link_backend="gloo")
