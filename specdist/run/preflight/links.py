# SPDX-License-Identifier: Apache-2.0
"""The bandwidth of every link of a topology, and of the groups that reduce together."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist

from specdist.core.errors import WorldError
from specdist.core.topology import Link, Topology
from specdist.run.preflight.mooncake_links import WriteProbe
from specdist.run.preflight.speeds import PAYLOAD, REPETITIONS, GroupSpeed, LinkSpeed, Speeds
from specdist.world.groups import Groups, World, ranges
from specdist.world.links import TransferError, bounded, on_device, rounds, wait_work
from specdist.world.roll_call import first_line

_MARGIN_S = 2.0
"""So much later than the library's own limit the measurement is given up."""


@dataclass(frozen=True)
class Probe:
    """Measures what one rank is part of.

    Attributes:
        payload: bytes of one transfer; None for what suits the device.
        timeout_s: how long all transfers of one link may take.
        share_devices: ranks may share a GPU, between which NCCL cannot reduce.
        writes: what measures the links instead, where Mooncake carries the features.
    """

    topology: Topology
    groups: Groups
    world: World
    payload: int | None
    timeout_s: float
    share_devices: bool
    writes: WriteProbe | None = None

    def measure(self) -> Speeds:
        """Try every link and group of this rank. All ranks call it once the links are connected.

        The links are tried in rounds, in which every rank has one partner and all pairs are busy at once, as in
        training. A link that breaks ends this rank's part, but for the groups where Mooncake has the links, and is told
        rather than raised: rank 0 hears of all.
        """
        links: list[LinkSpeed] = []
        groups: list[GroupSpeed] = []
        errors: list[str] = []
        try:
            for link in self._transfers() if self.writes is None else self.writes.measure():
                links.append(link)
        except WorldError as error:
            errors.append(str(error))
        try:
            for group in self._reductions() if self.writes is not None or not errors else ():
                groups.append(group)
        except WorldError as error:
            errors.append(str(error))
        return Speeds(tuple(links), tuple(groups), "; ".join(errors))

    def _transfers(self) -> Iterator[LinkSpeed]:
        payload = self._payload(on_device(self.groups, self.world))
        for link in rounds(self.topology) if self.groups.links else ():
            if link in self.groups.links:
                yield from self._link(link, payload)

    def _payload(self, on_device: bool) -> torch.Tensor:
        device = self.world.device if on_device else torch.device("cpu")
        return torch.zeros(self.payload or PAYLOAD[device.type], dtype=torch.uint8, device=device)

    def _link(self, link: Link, payload: torch.Tensor) -> list[LinkSpeed]:
        """Nothing at the sending end: a send may be over before the data is there."""
        group, sending = self.groups.links[link], self.world.facts.rank == link.source

        def move() -> dist.Work | None:
            if sending:
                return dist.isend(payload, link.destination, group=group)
            return dist.irecv(payload, link.source, group=group)

        ends = f"link {self.topology.describe(link.source)} -> {self.topology.describe(link.destination)}"
        seconds = self._time(move, payload.device, ends)
        return [] if sending else [LinkSpeed(link.source, link.destination, payload.numel() / seconds / 1e9)]

    def _reductions(self) -> Iterator[GroupSpeed]:
        """The all-reduce of this rank's replica and of the draft; told by the first rank of each."""
        rank, topology = self.world.facts.rank, self.topology
        replicas = [(f"target replica {r}", ranks, self.groups.replica) for r, ranks in enumerate(topology.replicas)]
        for name, ranks, group in (*replicas, ("draft", topology.draft_ranks, self.groups.draft)):
            if rank in ranks and len(ranks) > 1 and group is not None:
                speed = self._reduction(f"{name} all-reduce", ranks, group)
                if rank == ranks[0]:
                    yield speed

    def _reduction(self, name: str, ranks: tuple[int, ...], group: dist.ProcessGroup) -> GroupSpeed:
        payload = self._payload(self.world.device.type == "cuda" and not self.share_devices)

        def reduce() -> dist.Work | None:
            return dist.all_reduce(payload, group=group, async_op=True)

        seconds = self._time(reduce, payload.device, f"{name} of ranks {ranges(ranks)}")
        carried = 2 * (len(ranks) - 1) / len(ranks) * payload.numel()  # by each connection of a ring
        return GroupSpeed(name, ranks, carried / seconds / 1e9)

    def _time(self, operation: Callable[[], dist.Work | None], device: torch.device, what: str) -> float:
        """Seconds of one operation. Raises WorldError where one breaks, or all do not end in time."""
        times: list[float] = []

        def repeat() -> None:
            measure = _device_times if device.type == "cuda" else _host_times
            times.extend(measure(operation, self.timeout_s))

        try:
            bounded(repeat, self.timeout_s + _MARGIN_S, device)
        except RuntimeError as error:
            raise WorldError(f"{what} broke while it was measured: {first_line(error)}") from error
        return statistics.median(times)


def _host_times(operation: Callable[[], dist.Work | None], timeout_s: float) -> list[float]:
    deadline = time.monotonic() + timeout_s
    stamps = []
    for _ in range(REPETITIONS + 1):
        work = operation()
        assert work is not None
        wait_work(work, max(deadline - time.monotonic(), 0.001), on_device=False)
        stamps.append(time.perf_counter())
    return [later - earlier for earlier, later in pairwise(stamps)]


def _device_times(operation: Callable[[], dist.Work | None], timeout_s: float) -> list[float]:
    """Queue all repetitions and let the device keep the time: the host's share of each is not the link's."""
    deadline = time.monotonic() + timeout_s
    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPETITIONS + 1)]
    for event in events:
        work = operation()
        assert work is not None
        work.wait()  # makes the stream wait, not the host
        event.record()
    while not events[-1].query():  # `synchronize` would have no limit
        if time.monotonic() > deadline:
            raise TransferError("it did not end in time")
        time.sleep(0.0002)
    return [earlier.elapsed_time(later) / 1e3 for earlier, later in pairwise(events)]
