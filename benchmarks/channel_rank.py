# SPDX-License-Identifier: Apache-2.0
"""One rank of a channel's benchmark: training's own loops on both sides, scheduler and control plane included, with a
model and a draft that are products of matrices; in turns with the raw transport."""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.channel_limit import limit_of
from specdist.channel.base import Wire
from specdist.channel.config import ChannelConfig, parse_bytes
from specdist.channel.encoding import Plain
from specdist.channel.registry import transport_for
from specdist.core import config as configuration
from specdist.core.errors import ConfigError, WorldError
from specdist.core.launch_env import RankFacts, local_address, run_token
from specdist.core.progress import Batching, Cursor
from specdist.core.records import FeatureLayout
from specdist.core.stop import StopFlag
from specdist.core.topology import Topology, WorldConfig
from specdist.prompts.items import Items
from specdist.prompts.schedule import Schedule
from specdist.prompts.stream import Sizes, Stream
from specdist.run.feature_source import RemoteSource
from specdist.run.target_loop import Producer
from specdist.scheduler.client import ControlClient
from specdist.scheduler.config import ControlConfig
from specdist.scheduler.messages import Produced, Sent, StartWork
from specdist.scheduler.scheduler import Scheduler
from specdist.scheduler.server import ControlServer
from specdist.target.base import TargetModel
from specdist.world.groups import join_world, make_groups
from specdist.world.links import connect_links

MIB = 2**20
PRODUCTS = 140
"""Products of [tokens, 4096] x [4096, 12288] that have the 14 GFLOP a token of 7e9 weights in layers."""
MOST_ITEMS = 4096
"""Of a replica, in one repeat."""
_COMPUTED_ITEMS = 12
_WAIT_S = 120.0


@dataclass(frozen=True)
class ChannelSection:
    """The part of a job's configuration that is measured."""

    channel: ChannelConfig = field(default_factory=ChannelConfig)


@dataclass(frozen=True)
class ChannelRun:
    """What a rank is to do. `payloads` and `moved` are MiB over a link; `words` is its configuration."""

    replicas: int
    tp: int
    draft_ranks: int
    payloads: Sequence[float]
    moved: float | None
    hidden: int
    products: int | None
    repeats: int
    device: Any
    words: Sequence[str]

    @property
    def layout(self) -> FeatureLayout:
        return FeatureLayout((0, 1, 2), self.hidden, True, torch.bfloat16)

    def sizes(self, config: ChannelConfig) -> tuple[list[int], int]:
        """Rows of a draft rank in an item of each payload, and the slots of its ring. Raises ConfigError."""
        size = self.layout.bytes_per_token
        rows = [max(1, round(payload * MIB / size)) * self.tp for payload in self.payloads]
        slots = parse_bytes(config.memory, "channel.memory") // (max(rows) * size)
        if slots < 2:
            raise ConfigError(
                f"channel.memory={config.memory} holds {slots} items of {max(rows) * size:,} B a draft rank, and a "
                "transfer that overlaps another needs 2: raise it, or lower --payload"
            )
        return rows, slots


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

    @property
    def ranks(self) -> str:
        return f"{self.target_ranks}+{self.draft_ranks}"


class Work(TargetModel):
    """What a rank computes for an item: `products` products of bf16 matrices (fp32 on a CPU), or none. On a target rank
    it is the model; `check`: it fills each sequence with its `pattern`."""

    def __init__(self, products: int, tokens: int, hidden: int, device: torch.device, check: bool = False):
        self.device, self._products, self._check = device, products, check
        self._marks: list[tuple[Any, Any]] = []
        if products:
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
            make = functools.partial(torch.randn, device=device, dtype=dtype)
            self._a, self._b, self._out = make(tokens, hidden), make(hidden, 3 * hidden), make(tokens, 3 * hidden)

    def forward(self, batch: Any, out: Tensor, final: Tensor | None = None) -> None:
        if self._check:
            for sequence, rows in zip(batch, out.chunk(len(batch)), strict=True):
                rows.copy_(pattern(sequence, rows))
        self.run()

    def run(self, items: int = 1) -> None:
        for _ in range(items if self._products else 0):
            began = self._mark()
            for _ in range(self._products):
                torch.mm(self._a, self._b, out=self._out)
            self._marks.append((began, self._mark()))

    def spent(self) -> tuple[float, float]:
        """Seconds of products since the last call, and the share of the time from first to last that had none."""
        _synchronise(self.device)
        marks, self._marks = self._marks, []
        if not marks:
            return 0.0, 0.0
        busy = sum(self._seconds(*pair) for pair in marks)
        return busy, 1 - busy / self._seconds(marks[0][0], marks[-1][1])

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, began: Any, ended: Any) -> float:
        return began.elapsed_time(ended) / 1000 if self.device.type == "cuda" else ended - began


class Sequences:
    """Stands for the prompt store: a batch is the numbers of its sequences."""

    def pack(self, sequences: Sequence[int]) -> Any:
        return sequences


def pattern(sequence: int, like: Tensor) -> Tensor:
    """The rows of a sequence as they are sent when they are checked: bits that differ by place and sequence. Of the
    shape, dtype and device of `like`."""
    places = torch.arange(like.numel() * like.element_size() // 8, device=like.device)
    return (places * 0x9E3779B97F4A7C1 + (sequence + 1) * 0x100000001B3).view(like.dtype).view(like.shape)


class Bench:
    """One rank of the world of one transport."""

    def __init__(self, run: ChannelRun, wire: Wire):
        self._run, self._wire, self._device, self._topology = run, wire, wire.device, wire.topology
        self._rows, self._slots = run.sizes(wire.config)
        largest = max(self._rows) * wire.layout.bytes_per_token
        transport = transport_for(wire.config.transport)
        self._passes = 0
        self._client: ControlClient | None = None
        self._shard = wire.topology.draft_place(wire.rank)
        if self._shard is not None:
            self._receiver = transport.receiver(wire, self._slots, max(self._rows), self._check)
        else:
            self._sender = transport.sender(wire, run.draft_ranks * max(self._rows), self._announce)
            self._sender.connect(wire.timeout_s, self._check)
        self._limit, self._depths = limit_of(wire, self._slots, largest // run.tp)

    def measure(self, rows: int) -> ChannelSpeed:
        """The channel and its limit with items of `rows` rows a draft rank. All ranks call it."""
        run, topology, config = self._run, self._topology, self._wire.config
        size = rows // run.tp * self._wire.layout.bytes_per_token
        moved = run.moved or (65536 if config.transport == "nccl" else 256)
        each = max(4, min(MOST_ITEMS, round(moved * MIB / size)))
        idle = Work(0, rows, run.hidden, self._device)
        self._pass(self._slots + 2, rows, Work(0, rows, run.hidden, self._device, check=True), check=True)
        limits: dict[int, list[float]] = {depth: [] for depth in self._depths}
        channel = list[float]()
        for _ in range(run.repeats + 1):
            for depth, times in limits.items():
                times.append(self._timed(functools.partial(self._limit, each, size, depth)))
            channel.append(self._pass(each, rows, idle))
        gb = each * size * len(topology.links) / 1e9
        rates = [gb / seconds for seconds in channel[1:]]  # the first one warms up
        speed, limit = statistics.median(rates), max(gb / statistics.median(times[1:]) for times in limits.values())
        ranks, spread = (len(topology.target_ranks), run.tp, len(topology.draft_ranks)), max(rates) - min(rates)
        rated = speed, limit, speed / limit, spread / speed
        found = ChannelSpeed(config.transport, *ranks, size / MIB, self._slots, *rated)
        return self._exposed(found, rows) if run.products else found

    def _exposed(self, found: ChannelSpeed, rows: int) -> ChannelSpeed:
        """The same compute with and without transfers, in turns."""
        products, count, each = self._run.products or 0, _COMPUTED_ITEMS, _COMPUTED_ITEMS
        if self._shard is not None:  # it computes for the items of all replicas, and no more than one of them
            products, count = max(1, products // self._run.replicas), each * self._run.replicas
        work = Work(products, rows, self._run.hidden, self._device)
        quiet, moving = list[list[float]](), list[list[float]]()
        for _ in range(self._run.repeats + 1):
            self._timed(functools.partial(work.run, count))
            quiet.append(self._spent(work))
            self._pass(each, rows, work)
            moving.append(self._spent(work))
        before, after = ([statistics.median(x) for x in zip(*found[1:], strict=True)] for found in (quiet, moving))
        return replace(
            found,
            compute_ms=before[1] / each * 1e3,
            exposed=after[4] - before[4],
            target_idle=after[2],
            draft_idle=after[3],
            slower=after[0] / before[0] - 1,
        )

    def _spent(self, work: Work) -> list[float]:
        """Seconds of products of all ranks together and of the slowest; idle shares of the idlest target and draft
        rank, and of the busier of the two. All ranks call it."""
        busy, idle = work.spent()
        slowest, target, draft = self._over_ranks(
            [busy, idle if self._shard is None else 0.0, 0.0 if self._shard is None else idle], dist.ReduceOp.MAX
        )
        return [*self._over_ranks([busy], dist.ReduceOp.SUM), slowest, target, draft, min(target, draft)]

    def _pass(self, each: int, rows: int, work: Work, check: bool = False) -> float:
        """Move `each` items of every replica as training does; returns the seconds of the slowest draft rank, from when
        all ranks are ready to when the last item is released."""
        shards, end, seconds = len(self._topology.draft), each * self._run.replicas, 0.0
        stream = Stream(Sizes.of(np.full(shards * end, rows)), Batching(shards, rows), seed=0)
        items = Items(stream, Cursor(), Schedule(0, 0, end, 1))
        encoding = Plain(self._wire.layout)
        with self._control(end) as client:
            if self._shard is None:
                prompts: Any = Sequences()
                in_turn = self._run.tp > 1 and not transport_for(self._wire.config.transport).one_sided
                producer = Producer(
                    work,
                    self._sender,
                    encoding,
                    client,
                    items,
                    prompts,
                    0,
                    _WAIT_S,
                    alone=self._run.tp == 1,
                    in_turn=in_turn,
                )
                client.ready()
                client.send(Produced(producer.run()))
            else:
                shard = self._shard.dp
                stop = StopFlag()
                source = RemoteSource(
                    client, self._receiver, encoding, items, stop, _WAIT_S, self._device, (0, shard), self._slots
                )
                client.ready()
                client.expect(StartWork)
                began = time.perf_counter()
                for index in range(end):
                    while not source.posted(range(index, index + 1)):
                        source.await_more(index, stop)
                        source.post(source.news())
                    features = source.take(items[index])
                    if check:
                        self._compare(index, items[index].shards[shard].sequences[0], features)
                    work.run()
                    source.release(items[index])
                    items.forget(before=index + 1)
                _synchronise(self._device)
                seconds = time.perf_counter() - began
                source.drain()
        return self._over_ranks([seconds], dist.ReduceOp.MAX)[0]

    @contextlib.contextmanager
    def _control(self, end: int) -> Iterator[ControlClient]:
        """A control plane with a scheduler of `end` items."""
        self._passes += 1
        key, config, store = f"bench/control/{self._passes}", ControlConfig(), self._wire.world.store
        with contextlib.ExitStack() as stack:
            if self._wire.rank == 0:
                token, drafts, slots = run_token(), self._run.draft_ranks, self._slots
                scheduler = Scheduler(draft_ranks=drafts, slots=slots, queue_depth=2, timeout=_WAIT_S, end_item=end)
                topology, host = self._topology, local_address()
                server = ControlServer(host, token, topology, scheduler, config, join_timeout_s=_WAIT_S)
                stack.enter_context(server)
                store.set(key, server.address)
            address = store.get(key).decode()
            client = ControlClient(address, run_token(), self._wire.rank, config)
            self._client = stack.enter_context(client)
            yield client

    def _announce(self, item: int) -> None:
        assert self._client is not None
        self._client.send(Sent(item))

    def _check(self) -> None:
        if self._client is not None:
            self._client.check()

    def _compare(self, index: int, sequence: int, rows: Tensor) -> None:
        different = (rows.view(torch.int64) != pattern(sequence, rows).view(torch.int64)).any(1)
        if different.any():
            who, row = self._topology.describe(self._wire.rank), int(different.nonzero()[0])
            raise WorldError(f"{who}: item {index} is not what was sent, from row {row} of {len(rows)} on")

    def _timed(self, move: Callable[[], object]) -> float:
        """Seconds from when all ranks are there to when the last one is done."""
        _synchronise(self._device)
        dist.all_reduce(torch.zeros(1))
        began = time.perf_counter()
        move()
        _synchronise(self._device)
        return self._over_ranks([time.perf_counter() - began], dist.ReduceOp.MAX)[0]

    def _over_ranks(self, values: list[float], operation: dist.ReduceOp.RedOpType) -> list[float]:
        found = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(found, operation)
        return [float(value) for value in found]


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def worker(**arguments: Any) -> list[ChannelSpeed]:
    """One rank of the world, given the fields of `ChannelRun`."""
    run = ChannelRun(**arguments)
    config = configuration.load(ChannelSection, [], run.words).channel
    shared = config.transport != "nccl" and config.transport != "auto"
    world_config = WorldConfig(device=run.device, share_devices=shared, wait_timeout_s=_WAIT_S)
    world = join_world(world_config, RankFacts.from_environment())
    transport = transport_for(config.transport, world.device)
    if run.products is None:
        run = replace(run, products=PRODUCTS if world.device.type == "cuda" else 0)
    replicas, tp, dp = run.replicas, run.tp, run.draft_ranks
    topology = Topology.build(world_config, world.hosts, replicas=replicas, tp=tp, dp=dp, cp=1, pod=dp)
    groups = make_groups(topology, world, transport.link_backend, _WAIT_S)
    connect_links(topology, groups, world, _WAIT_S)
    config = replace(config, transport=transport.name)
    bench = Bench(run, Wire(config, topology, world, groups, run.layout, _WAIT_S))
    return [bench.measure(rows) for rows in run.sizes(config)[0]]
