# SPDX-License-Identifier: Apache-2.0
"""The measurements of the channel, in turns with those of its limit; every rank of the world takes part."""

from __future__ import annotations

import functools
import statistics
import typing
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch

from specdist.channel.config import ChannelConfig, parse_bytes
from specdist.channel.registry import transport_for
from specdist.channel.wire import Wire
from specdist.core import config as configuration
from specdist.core.errors import ConfigError
from specdist.core.launch_env import RankFacts
from specdist.core.records import FeatureLayout
from specdist.core.topology import Topology, WorldConfig
from specdist.world.groups import join_world, make_groups
from specdist.world.links import connect_links
from specdist_launch.bench.channel_limit import make_limit
from specdist_launch.bench.channel_rank import Batch, Draft, Target
from specdist_launch.bench.channel_work import Work, largest, timed, total

MIB = 2**20
PRODUCTS = 140
"""Products of [tokens, 4096] x [4096, 12288] that have the 14 GFLOP a token of 7e9 weights in layers."""
MOST_ITEMS = 4096
"""Of a replica, in one repeat."""
_WAIT_S = 120.0


@dataclass(frozen=True)
class BenchConfig:
    """The part of a job's configuration that is measured."""

    channel: ChannelConfig = field(default_factory=ChannelConfig)


@dataclass(frozen=True)
class Run:
    """What a worker is told."""

    replicas: int
    tp: int
    draft_ranks: int
    payloads: tuple[float, ...]
    """MiB over a link, of each measurement."""
    moved: float | None
    """MiB over a link in one repeat."""
    hidden: int
    products: int | None
    repeats: int
    device: str
    words: tuple[str, ...]
    """Of `BenchConfig`."""


@dataclass(frozen=True)
class ChannelSpeed:
    """The channel with items of one size."""

    transport: str
    target_ranks: int
    tp: int
    draft_ranks: int
    payload_mib: float
    """Over one link, of one item."""
    in_flight: int
    """Slots of a draft rank's ring."""
    gb_per_s: float
    """1e9 bytes per second, of all links together."""
    limit_gb_per_s: float
    """The same, through the transport alone."""
    ratio: float
    spread: float
    """Fastest repeat less slowest, as a share of the median."""
    compute_ms: float | None = None
    """The products of one item, alone, on the slower rank; None: nothing was computed."""
    exposed: float | None = None
    """Share of the time from first to last product in which the busier side ran none, less that without transfers."""
    target_idle: float | None = None
    """That share of the idlest target rank, with transfers."""
    draft_idle: float | None = None
    slower: float | None = None
    """Share that transfers add to the time of the products of all ranks together."""


class Bench:
    """One rank of the world of one transport."""

    def __init__(self, run: Run, wire: Wire):
        self._run, self._wire, self._device = run, wire, wire.device
        self._control, layout = wire.groups.control, wire.layout
        self._rows = [max(1, round(p * MIB / layout.bytes_per_token)) * run.tp for p in run.payloads]
        largest_shard = max(self._rows) * layout.bytes_per_token
        self._slots = parse_bytes(wire.config.memory, "channel.memory") // largest_shard
        if self._slots < 2:
            raise ConfigError.at(
                "channel.memory",
                f"={wire.config.memory} holds {self._slots} items of {largest_shard:,} B a draft rank, "
                "and a transfer that overlaps another needs 2: raise it, or lower --payload",
            )
        self._limit = make_limit(wire, self._slots, largest_shard // run.tp)
        self._end: Target | Draft
        if wire.topology.target_place(wire.rank) is None:
            self._end = Draft(wire, self._slots, max(self._rows))
        else:
            self._end = Target(wire, self._slots, max(self._rows))
        self._next = 0

    def measure(self) -> list[ChannelSpeed]:
        """Every payload. All ranks call it."""
        return [self._measure(rows) for rows in self._rows]

    def _measure(self, rows: int) -> ChannelSpeed:
        run, topology = self._run, self._wire.topology
        size = rows // run.tp * self._wire.layout.bytes_per_token
        moved = run.moved or (65536 if self._wire.config.transport == "nccl" else 256)
        each = max(4, min(MOST_ITEMS, round(moved * MIB / size)))
        idle = Work(0, rows, run.hidden, self._device)
        self._pass(self._slots + 2, rows, idle, check=True)
        depths = {depth: functools.partial(self._limit.move, each, size, depth) for depth in self._limit.depths}
        limits: dict[int, list[float]] = {depth: [] for depth in depths}
        channel = list[float]()
        for _ in range(run.repeats + 1):
            for depth, move in depths.items():
                limits[depth].append(timed(move, self._device, self._control))
            channel.append(self._pass(each, rows, idle))
        moved_gb = each * size * len(topology.links) / 1e9
        rates = [moved_gb / seconds for seconds in channel[1:]]  # the first one warms up
        speed = statistics.median(rates)
        limit = max(moved_gb / statistics.median(times[1:]) for times in limits.values())
        found = ChannelSpeed(
            transport=self._wire.config.transport,
            target_ranks=len(topology.target_ranks),
            tp=run.tp,
            draft_ranks=len(topology.draft_ranks),
            payload_mib=size / MIB,
            in_flight=self._slots,
            gb_per_s=speed,
            limit_gb_per_s=limit,
            ratio=speed / limit,
            spread=(max(rates) - min(rates)) / speed,
        )
        return self._exposed(found, rows) if run.products else found

    def _pass(self, each: int, rows: int, work: Work, check: bool = False) -> float:
        """Move `each` items of every replica through the channel; returns the seconds of the slowest rank."""
        items = range(self._next, self._next + each * self._run.replicas)
        self._next = items.stop
        batch = Batch(items, rows, check)
        if isinstance(self._end, Draft):
            self._end.expect(batch)
        return timed(functools.partial(self._end.move, batch, work), self._device, self._control)

    def _exposed(self, found: ChannelSpeed, rows: int, each: int = 12) -> ChannelSpeed:
        """The same compute with and without transfers, in turns."""
        target, replicas = isinstance(self._end, Target), self._run.replicas
        products, count = self._run.products or 0, each
        if not target:  # it computes for the items of all replicas, and has no more to do than one of them
            products, count = max(1, products // replicas), each * replicas
        work = Work(products, rows, self._run.hidden, self._device)

        def alone() -> None:
            for _ in range(count):
                work.run(work.begin())

        quiet, moving = list[_Computed](), list[_Computed]()
        for _ in range(self._run.repeats + 1):
            timed(alone, self._device, self._control)
            quiet.append(self._computed(work, target))
            self._pass(each, rows, work)
            moving.append(self._computed(work, target))
        before, after = (_Computed(*map(statistics.median, zip(*found[1:], strict=True))) for found in (quiet, moving))
        return replace(
            found,
            compute_ms=before.slowest / each * 1e3,
            exposed=after.busier_idle - before.busier_idle,
            target_idle=after.target_idle,
            draft_idle=after.draft_idle,
            slower=after.busy / before.busy - 1,
        )

    def _computed(self, work: Work, target: bool) -> _Computed:
        """Of everything computed since the last call. All ranks call it."""
        spent = work.spent()
        idle = spent.idle
        slowest, target_idle, draft_idle = largest(
            [spent.busy, idle if target else 0.0, 0.0 if target else idle], self._control
        )
        return _Computed(
            total(spent.busy, self._control), slowest, min(target_idle, draft_idle), target_idle, draft_idle
        )


class _Computed(NamedTuple):
    """Seconds of products, and shares of the time without one, of one pass over all ranks."""

    busy: float
    """Of all ranks together."""
    slowest: float
    busier_idle: float
    target_idle: float
    draft_idle: float


def worker(run: dict[str, Any]) -> list[ChannelSpeed]:
    """One rank of the world."""
    return _worker(Run(**run))


def _worker(run: Run) -> list[ChannelSpeed]:
    config = configuration.load(BenchConfig, [], run.words).channel
    facts = RankFacts.from_environment()
    shared = config.transport in ("gloo", "mooncake")
    device = typing.cast(Literal["auto", "cpu", "cuda"], run.device)
    world_config = WorldConfig(mode="split", device=device, share_devices=shared, wait_timeout_s=_WAIT_S)
    world = join_world(world_config, facts)
    transport = transport_for(config.transport, world.device)
    if run.products is None:
        run = replace(run, products=PRODUCTS if world.device.type == "cuda" else 0)
    topology = Topology.build(world_config, world.hosts, replicas=run.replicas, tp=run.tp, dp=run.draft_ranks, cp=1)
    groups = make_groups(topology, world, transport.link_backend, _WAIT_S)
    connect_links(topology, groups, world, _WAIT_S)
    layout = FeatureLayout((0, 1, 2), run.hidden, True, torch.bfloat16)
    wire = Wire(replace(config, transport=transport.name), topology, world, groups, layout, _WAIT_S)
    return Bench(run, wire).measure()
