# SPDX-License-Identifier: Apache-2.0
"""The bandwidth of every link over which Mooncake carries the features: target ranks write, draft ranks lend memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from specdist.channel.config import MooncakeConfig
from specdist.channel.mooncake.endpoint import Endpoint
from specdist.channel.mooncake.engine import TransferEngine
from specdist.channel.mooncake.memory import device_of
from specdist.channel.wire import StoreBook
from specdist.core.errors import ConfigError, WorldError
from specdist.core.launch_env import local_address
from specdist.core.topology import Link, Topology
from specdist.run.preflight.speeds import PAYLOAD, REPETITIONS, LinkSpeed
from specdist.world.groups import World
from specdist.world.links import bounded, rounds
from specdist.world.roll_call import first_line

_MARGIN_S = 2.0
"""So much later than the engine's own limit a link is given up: opening one blocks inside the library."""
_DONE, _GIVEN_UP = b"done", b"given up"
_kept: list[TransferEngine] = []
"""Until the process ends: a write that has failed may still use its memory, and an engine takes a second to end."""


@dataclass(frozen=True)
class WriteProbe:
    """Measures the writes of one rank, which has links.

    Attributes:
        payload: bytes of one write; None for what suits the device.
        timeout_s: how long all writes of one link may take, and the wait for the rank at its other end.
    """

    topology: Topology
    world: World
    config: MooncakeConfig
    payload: int | None
    timeout_s: float

    def measure(self) -> Iterator[LinkSpeed]:
        """Lend memory, or write to those that do: in the rounds of `rounds`, one writer to a draft rank at a time.

        Raises:
            WorldError: the engine does not come up here, or a link breaks or stalls; names both ends.
        """
        if self.topology.target_place(self._rank) is None:
            self._lend()
            return
        mine = [link for link in self.topology.links if link.source == self._rank]
        try:
            yield from self._write(mine)
        finally:
            for link in mine:  # those that are done already stay so
                self._tell(link, _GIVEN_UP)

    @property
    def _rank(self) -> int:
        return self.world.facts.rank

    @property
    def _store(self) -> dist.Store:
        return dist.PrefixStore("preflight/mooncake", self.world.store)

    def _open(self) -> tuple[TransferEngine, Tensor]:
        """The engine, and registered memory for one payload, where the channel has its own."""
        device = self.world.device
        size = self.payload or PAYLOAD[device.type]
        try:
            engine = TransferEngine(local_address(), self.config)
            _kept.append(engine)
            lies = device_of(engine, self.config, device)
            memory = torch.zeros(size, dtype=torch.uint8, device=lies, pin_memory=lies != device)
            engine.register(memory)
        except (ConfigError, WorldError) as error:
            raise WorldError(f"{self.topology.describe(self._rank)}: {error}", culprit=self._rank) from error
        return engine, memory

    def _lend(self) -> None:
        try:
            engine, memory = self._open()
        except WorldError as error:
            self._store.set(f"absent/{self._rank}", str(error))
            raise
        here = Endpoint(engine.session, engine.protocol, memory.data_ptr(), memory.numel(), slots=1, flags=0, columns=0)
        StoreBook(self._store).publish(self._rank, here.to_json())
        links = [link for link in rounds(self.topology) if link.destination == self._rank]
        if all(self._await(link) for link in links):  # else somebody may still write
            engine.forget(memory)

    def _write(self, mine: list[Link]) -> Iterator[LinkSpeed]:
        engine, memory = self._open()
        writers: dict[int, Link] = {}
        for link in rounds(self.topology):
            earlier = writers.get(link.destination)
            writers[link.destination] = link
            if link not in mine:
                continue
            endpoint = self._find(link, engine)
            if earlier is not None and not self._await(earlier):
                self._tell(link, _GIVEN_UP)  # who comes next need not wait in turn for a link that may break, too
            yield self._time(link, endpoint, engine, memory)
            self._tell(link, _DONE)
        engine.forget(memory)

    def _find(self, link: Link, engine: TransferEngine) -> Endpoint:
        def check() -> None:
            if self._store.check([f"absent/{link.destination}"]):
                raise WorldError(self._store.get(f"absent/{link.destination}").decode())

        named = self.topology.describe(link.destination)
        try:
            found = Endpoint.from_json(StoreBook(self._store).find(link.destination, named, self.timeout_s, check))
        except WorldError as error:
            raise WorldError(f"{self._ends(link)} did not come up: {error}", culprit=link.destination) from error
        if found.protocol != engine.protocol:
            raise WorldError(
                f"{self._ends(link)} did not come up: one end speaks {engine.protocol}, the other {found.protocol}: "
                "set channel.mooncake.protocol to one that both hosts have"
            )
        return found

    def _time(self, link: Link, there: Endpoint, engine: TransferEngine, memory: Tensor) -> LinkSpeed:
        times: list[float] = []

        def repeat() -> None:
            deadline = time.monotonic() + self.timeout_s
            for _ in range(REPETITIONS + 1):
                began = time.perf_counter()
                number = engine.write(there.session, memory.data_ptr(), there.ring, memory.numel())
                engine.wait([number], max(deadline - time.monotonic(), 0.001))
                times.append(time.perf_counter() - began)

        try:
            bounded(repeat, self.timeout_s + _MARGIN_S, torch.device("cpu"))
        except RuntimeError as error:
            raise WorldError(f"{self._ends(link)} broke while it was measured: {first_line(error)}") from error
        return LinkSpeed(link.source, link.destination, memory.numel() / statistics.median(times[1:]) / 1e9)

    def _tell(self, link: Link, how: bytes) -> None:
        """Say how a link ended; what is said first counts."""
        self._store.compare_set(_key(link), "", how.decode())

    def _await(self, link: Link) -> bool:
        """Wait until nobody writes over `link` any more; whether all went well there."""
        try:
            self._store.wait([_key(link)], timedelta(seconds=self.timeout_s + 2 * _MARGIN_S))
        except dist.DistError as error:
            raise WorldError(
                f"{self._ends(link)} stalled while it was measured: {self.topology.describe(self._rank)} waited "
                f"{self.timeout_s:.0f} s for its writes to end (world.join_timeout_s)",
                culprit=link.source,
            ) from error
        return bool(self._store.get(_key(link)) == _DONE)

    def _ends(self, link: Link) -> str:
        return f"link {self.topology.describe(link.source)} -> {self.topology.describe(link.destination)}"


def _key(link: Link) -> str:
    return f"ended/{link.source}/{link.destination}"
