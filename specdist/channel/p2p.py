# SPDX-License-Identifier: Apache-2.0
"""Point-to-point channel over torch.distributed: NCCL between GPUs, gloo between CPUs.

Every (target rank, draft rank) link has a two-rank group of its own, so transfers run on that group's stream beside
the compute. A transfer is issued only for an item whose features exist and which has a slot.

Why nothing can hang. An operation over NCCL ends once both ends, or all members, have come to it, and CUDA promises no
more progress than one queue gives: streams share hardware queues, and a kernel may wait for all that its rank has
issued before it, on whatever stream. So ranks that issue two operations in different orders may wait for each other for
ever. Here all ranks issue theirs in one order of all operations:

- items in the order in which the scheduler delivers them, and of an item the transfers by source rank, then by
  destination: so a draft rank posts those of its pod, and so a target rank sends what its replica has computed;
- the collectives of the draft ranks between two deliveries, the same two on all of them, whichever pods these are to
  (`Trainer._agree`): also those that nothing waits for at once, the gather that begins a step and the reductions within
  its last backward, which come in one order whatever a rank's own graph is (`ShardedWeights`);
- the collectives of a replica's forwards and its sends in the order in which the scheduler has told all its ranks to
  compute and to send (`Producer`): it tells them to send what they have computed. One rank alone sends beside its
  forwards: nothing in those waits for others.

Each operation waits for earlier ones of this order only, so the first that has not ended can end. tests/order.py checks
what the ranks of a world have issued.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

import torch
import torch.distributed as dist
from torch import Tensor

from specdist.channel.base import Announce, Check, FeatureReceiver, Freed, RingSender, Transport, Wire, outgoing, share
from specdist.channel.ring import Ring
from specdist.core.errors import WorldError, first_line
from specdist.core.records import WorkItem
from specdist.core.topology import Link
from specdist.core.trace import span
from specdist.world.links import TransferError, wait_work

_LOOK_S = 0.5
_Works = list[tuple[Link, dist.Work, Tensor]]
"""The operations of one item at one end, each with its memory."""


class P2PSender(RingSender[_Works]):
    """Sends this target rank's share of each shard over its links."""

    def __init__(self, wire: Wire, item_rows: int, announce: Announce):
        super().__init__(Ring(wire.layout, wire.config.send_buffers, item_rows, wire.device))
        self._wire, self._announce = wire, announce
        self._staged = _staged(wire)
        self._on_device = wire.on_gpu and not self._staged
        # Sends must not queue behind the next forward, which is on the current stream by the time this one is sent.
        self._on_stream = torch.cuda.stream(torch.cuda.Stream(wire.device) if wire.on_gpu else None)

    def _issue(self, item: WorkItem, rows: Tensor, slot: int) -> _Works:
        # The receives are posted once the scheduler knows; until then a wait for the device here would be for ever.
        self._announce(item.index)
        with self._on_stream:  # does nothing where there is no stream
            parts = outgoing(self._wire.topology, self._wire.rank, item, rows)
            sent = []
            for link, _, own in parts:
                part = own.cpu() if self._staged else own
                with span("send", item.index, destination=link.destination, bytes=part.nbytes):
                    sent.append((link, _start(dist.isend, part, link.destination, link, self._wire), part))
            return sent

    def _reuse(self, sent: _Works) -> None:
        if not self._on_device:
            self._finish(sent, self._wire.timeout_s)
            return
        for _, work, _ in sent:
            work.wait()  # orders the current stream behind the send, without waiting on the host

    def _finish(self, sent: _Works, timeout_s: float) -> None:
        describe = self._wire.topology.describe
        for link, work, _ in sent:
            try:
                wait_work(work, timeout_s, self._on_device)
            except TransferError as error:
                raise WorldError(
                    f"{describe(link.destination)} did not take what {describe(link.source)} sent "
                    f"(limit {timeout_s:.0f} s): {error}"
                ) from error


class P2PReceiver(FeatureReceiver):
    """Receives this draft rank's shard from the replica that computed it, share by share. `check`: called while a
    transfer is waited for, and when it has failed; raises when the world has."""

    def __init__(self, wire: Wire, slots: int, shard_rows: int, check: Check):
        self._wire, self._check = wire, check
        _, self._shard = wire.topology.shard_of(wire.rank)
        self._ring = Ring(wire.layout, slots, shard_rows, wire.device)
        staged = _staged(wire)
        self._host_ring = Ring(wire.layout, slots, shard_rows, torch.device("cpu"), pinned=True) if staged else None
        self._on_device = wire.on_gpu and not staged
        self._stream = torch.cuda.Stream(wire.device) if self._on_device else None
        self._on_stream = torch.cuda.stream(self._stream)
        self._read = [torch.cuda.Event() for _ in range(slots)] if self._on_device else []
        self._posted: dict[int, tuple[int, _Works]] = {}  # slot and operations, by item
        self._waiter = ThreadPoolExecutor(1, "specdist-transfer")

    def post(self, item: WorkItem, replica: int, slot: int) -> None:
        rows = (self._host_ring or self._ring).slot(slot, item.shards[self._shard].tokens)
        if self._stream is not None:
            # The step that released the slot may still be reading it: the receive is ordered behind that read.
            self._stream.wait_event(self._read[slot])
        sources, works = self._wire.topology.replicas[replica], _Works()
        for t, source in enumerate(sources):
            part, link = rows[share(len(rows), t, len(sources))], Link(source, self._wire.rank)
            if len(part):
                with self._on_stream, span("receive", item.index, source=source, bytes=part.nbytes):
                    works.append((link, _start(dist.irecv, part, source, link, self._wire), part))
        self._posted[item.index] = slot, works

    def take(self, item: WorkItem, timeout_s: float) -> Tensor:
        deadline, describe = time.monotonic() + timeout_s, self._wire.topology.describe
        slot, works = self._posted[item.index]
        for link, work, _ in works:
            try:
                self._wait(work, max(deadline - time.monotonic(), 0.001))
            except TransferError as error:
                self._check()
                raise WorldError(
                    f"{describe(link.destination)} did not receive its hidden states of batch {item.index} from "
                    f"{describe(link.source)} (limit {timeout_s:.0f} s): {error}"
                ) from error
        tokens = item.shards[self._shard].tokens
        rows = self._ring.slot(slot, tokens)
        return rows if self._host_ring is None else rows.copy_(self._host_ring.slot(slot, tokens), non_blocking=True)

    def _wait(self, work: dist.Work, timeout_s: float) -> None:
        """Wait for a transfer, and no longer than until the world has failed: a rank that hangs at the other end would
        keep this one, which has work to save. gloo's wait cannot be left, so it is another thread's."""
        if self._on_device:
            wait_work(work, timeout_s, True, self._check)
            return
        waiting = self._waiter.submit(wait_work, work, timeout_s, False)
        while not wait([waiting], _LOOK_S).done:
            self._check()
        waiting.result()

    def release(self, item: WorkItem, freed: Freed) -> None:
        slot, _ = self._posted.pop(item.index)
        if self._on_device:
            self._read[slot].record()
        elif self._host_ring is not None:
            torch.cuda.current_stream().synchronize()  # the staging copy must have been read before gloo writes again
        freed()  # whatever comes next into this slot is ordered behind the reads of it


def _staged(wire: Wire) -> bool:
    """Whether rows cross host memory: gloo cannot read a GPU's (ranks that share a GPU, in development)."""
    return wire.on_gpu and any(dist.get_backend(group) == "gloo" for group in wire.groups.links.values())


def _start(operation: Callable[..., dist.Work | None], rows: Tensor, partner: int, link: Link, wire: Wire) -> dist.Work:
    """Issue a send or a receive; raises WorldError naming the link when its connection is known to be broken."""
    try:
        work = operation(rows, partner, group=wire.groups.links[link])
    except RuntimeError as error:
        raise WorldError(f"{wire.topology.describe_link(link)} is broken: {first_line(error)}") from error
    assert work is not None
    return work


NCCL = Transport("nccl", P2PSender, P2PReceiver, link_backend="nccl", needs_gpus=True)
GLOO = Transport("gloo", P2PSender, P2PReceiver, link_backend="gloo")
