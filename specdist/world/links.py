# SPDX-License-Identifier: Apache-2.0
"""Bringing up the links between target and draft ranks, and waiting for a transfer within a limit."""

import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from specdist.core.errors import WorldError, first_line
from specdist.core.topology import Link, Topology
from specdist.core.worker import Worker
from specdist.world.groups import Groups, World
from specdist.world.roll_call import RollCall

_LIBRARY_S = 2.0
"""Grace for the library to report by itself that a transfer has exceeded its limit, in seconds."""

_SHORTEST_LOOK_S, _LONGEST_LOOK_S = 0.00002, 0.0002
"""Seconds between two polls of a device's transfer; they grow, for a small one takes less than a sleep."""


class TransferError(RuntimeError):
    """A transfer did not end, or its connection broke: says which, in words."""


def connect_links(topology: Topology, groups: Groups, world: World, timeout_s: float) -> None:
    """Move one byte over every link and back, in rounds in which no rank has two partners, under a host-side timeout.

    The first operation on a communicator sets it up; here, and not inside a training step, is where a broken network
    shows, with the pair named.
    """
    if not groups.links:
        return
    _await_all(topology, groups, world, timeout_s)
    backend = dist.get_backend(next(iter(groups.links.values())))
    byte = torch.zeros(1, dtype=torch.uint8, device=world.device if backend == "nccl" else "cpu")
    for link in rounds(topology):
        if link in groups.links:
            _touch(link, groups.links[link], byte, topology, world.facts.rank, timeout_s)


def _await_all(topology: Topology, groups: Groups, world: World, timeout_s: float) -> None:
    """Wait until every rank has come this far.

    Before the rounds, in which a rank that does not come also holds up ranks that have no link to it.
    """
    rank, key = world.facts.rank, "world.join_timeout_s"
    call = RollCall(rank, topology.world_size, topology.describe(rank), topology.describe(0), timeout_s, key)

    def missing(present: Mapping[int, Any]) -> str:
        absent = [rank for rank in range(topology.world_size) if rank not in present]
        broken = [link for link in topology.links if link.source in absent or link.destination in absent]
        named = ", ".join(topology.describe(rank) for rank in absent[:4])
        return (
            f"{_pairs(broken, topology)} did not come up: {len(absent)} ranks were not there after {timeout_s:.0f} s "
            f"({key}), {named}"
        )

    call.answer(dist.PrefixStore(f"links/{groups.name}", world.store), None, missing)


def _pairs(links: list[Link], topology: Topology) -> str:
    more = f" and {len(links) - 4} more links" if len(links) > 4 else ""
    return ", ".join(map(topology.describe_link, links[:4])) + more


def rounds(topology: Topology) -> Iterator[Link]:
    """All links, in an order in which no ranks wait for each other in a circle."""
    sources, destinations, links = topology.target_ranks, topology.draft_ranks, frozenset(topology.links)
    rounds = max(len(sources), len(destinations))
    for shift in range(rounds):
        for i in range(rounds):
            j = (i + shift) % rounds
            if i < len(sources) and j < len(destinations) and (link := Link(sources[i], destinations[j])) in links:
                yield link


def _touch(
    link: Link, group: dist.ProcessGroup, byte: torch.Tensor, topology: Topology, rank: int, timeout_s: float
) -> None:
    def there_and_back() -> None:
        if byte.is_cuda:
            torch.cuda.set_device(byte.device)
        partner = link.destination if rank == link.source else link.source
        for sending in (rank == link.source, rank != link.source):
            operation = dist.isend if sending else dist.irecv
            work = operation(byte, partner, group=group)
            assert work is not None
            wait_work(work, timeout_s, on_device=byte.is_cuda)

    try:
        # In a thread: setting up a communicator may block inside the library, where no timeout reaches.
        if not Worker("specdist-connect", there_and_back).ends_within(timeout_s + _LIBRARY_S):
            raise TransferError("it is not up in time")
    except RuntimeError as error:
        limit = f"{timeout_s:.0f} s, world.join_timeout_s"
        raise WorldError(f"{_pairs([link], topology)} did not come up (limit {limit}): {first_line(error)}") from error


def wait_work(work: dist.Work, timeout_s: float, on_device: bool, check: Callable[[], None] = lambda: None) -> None:
    """Wait on the host, bounded, until a transfer has finished. `check`, of a device transfer, may raise to end it.

    NCCL's own `wait` only orders streams, so a device transfer is polled; gloo's blocks with a timeout. Raises
    TransferError: not finished after `timeout_s` seconds, or the connection is lost.
    """
    deadline = time.monotonic() + timeout_s
    try:
        if not on_device:
            work.wait(timedelta(seconds=timeout_s))
            return
        pause = _SHORTEST_LOOK_S
        while not (completed := work.is_completed()) and time.monotonic() < deadline:
            check()
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_LOOK_S)
        if completed:
            work.wait()  # raises what it failed with
            return
    except RuntimeError as error:  # gloo knows no narrower type, for a timeout neither
        if time.monotonic() < deadline:
            raise TransferError(f"the connection is lost: {first_line(error)}") from error
    raise TransferError("it did not end in time")
