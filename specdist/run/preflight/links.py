# SPDX-License-Identifier: Apache-2.0
"""The bandwidth of every link of a topology."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist

from specdist.channel.config import ChannelConfig
from specdist.core.errors import WorldError
from specdist.core.topology import Link, Topology
from specdist.run.preflight.mooncake_links import WriteProbe
from specdist.run.preflight.speeds import PAYLOAD, REPETITIONS, LinkSpeed
from specdist.world.groups import Groups, World
from specdist.world.links import TransferError, bounded, on_device, rounds, wait_work
from specdist.world.roll_call import first_line

_MARGIN_S = 2.0
"""So much later than the library's own limit the measurement is given up."""


def measure_links(
    config: ChannelConfig, topology: Topology, groups: Groups, world: World, payload: int | None, timeout_s: float
) -> Iterator[LinkSpeed]:
    """Try every link of this rank. All ranks of a topology with links call it, once the links are connected, and get
    what they measured.

    Args:
        payload: bytes of one transfer; None for what suits the device.
        timeout_s: how long all transfers of one link may take, in seconds.

    Raises:
        WorldError: a link does not come up, breaks or stalls; names both ends.
    """
    if config.transport == "mooncake":
        return WriteProbe(topology, world, config.mooncake, payload, timeout_s).measure()
    return Probe(topology, groups, world, payload, timeout_s).measure()


@dataclass(frozen=True)
class Probe:
    """Measures the links of one rank, in rounds in which every rank has one partner and all pairs are busy at once."""

    topology: Topology
    groups: Groups
    world: World
    payload: int | None
    timeout_s: float

    def measure(self) -> Iterator[LinkSpeed]:
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
