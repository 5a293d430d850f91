# SPDX-License-Identifier: Apache-2.0
"""One rank of the world in which a channel keeps its contract; test_channel_contract.py starts it under torchrun.

It knows only the interface: it plays the scheduler with keys of a store (an item is posted once all ranks of its
replica have announced it, and sent once its slot is free), fills rows with random bits, and compares what arrives.
"""

from __future__ import annotations

import functools
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from specdist.channel.base import FeatureReceiver, FeatureSender, Transport, Wire
from specdist.channel.config import ChannelConfig, MooncakeConfig
from specdist.channel.registry import transport_for
from specdist.core.errors import WorldError
from specdist.core.launch_env import RankFacts
from specdist.core.progress import Cursor
from specdist.core.records import FeatureLayout, Shard, WorkItem
from specdist.core.topology import Topology, WorldConfig
from specdist.world.groups import Groups, World, join_world, make_groups
from specdist.world.links import connect_links
from tests import toy_transport  # noqa: F401 - registers itself

PATIENCE_S = 30.0
GIVE_UP_S = 1.0
"""The time limit given to waits that must fail."""


NARROW = FeatureLayout((0, 1), 5, final=True, dtype=torch.bfloat16)
WIDE = FeatureLayout((0, 1, 2), 256, final=True, dtype=torch.float32)


@dataclass(frozen=True)
class Case:
    """A division of the world and what crosses it."""

    name: str
    replicas: int
    tp: int
    dp: int
    cp: int = 1
    items: int = 120
    slots: int = 3
    buffers: int = 2
    rows: int = 24
    layout: FeatureLayout = NARROW


CASES = (
    Case("three replicas, two shards", replicas=3, tp=1, dp=2),
    Case("tensor parallel 3", replicas=1, tp=3, dp=2, slots=4, buffers=1),
    Case("two replicas of tensor parallel 2", replicas=2, tp=2, dp=1, slots=2),
    Case("context parallel", replicas=1, tp=2, dp=1, cp=3, slots=5),
    Case("one slot", replicas=1, tp=1, dp=4, items=60, slots=1),
    Case("large, beyond eager buffers", replicas=1, tp=2, dp=3, items=9, slots=2, rows=1500, layout=WIDE),
    Case("four ranks, two replicas", replicas=2, tp=1, dp=2),
    Case("four ranks, tensor parallel 2, large", replicas=1, tp=2, dp=2, items=9, slots=2, rows=3000, layout=WIDE),
    Case("a pair", replicas=1, tp=1, dp=1),
    Case("a large pair", replicas=1, tp=1, dp=1, items=12, rows=6000, layout=WIDE),
)
NCCL_CASES = (
    *CASES,
    # A send that fits into NCCL's own buffers ends although nobody takes it.
    Case("a pair, beyond the buffers of NCCL", replicas=1, tp=1, dp=1, items=2, slots=2, rows=64_000, layout=WIDE),
)

Ends = tuple[FeatureSender | None, FeatureReceiver | None]
"""What a rank sends with and what it receives with."""


@dataclass(frozen=True)
class Rank:
    """What one rank of a case is made of."""

    case: Case
    world: World
    topology: Topology
    groups: Groups

    @property
    def rank(self) -> int:
        return self.world.facts.rank


@dataclass(frozen=True)
class Implementation:
    """How the contract is run for one transport."""

    transport: str
    device: Literal["cpu", "cuda"]
    cases: tuple[Case, ...] = CASES
    memory: Literal["host", "device"] = "host"
    """Where Mooncake's rings lie."""

    @property
    def value(self) -> Transport:
        return transport_for(self.transport)


IMPLEMENTATIONS = {
    "gloo": Implementation("gloo", "cpu"),
    "gloo-staged": Implementation("gloo", "cuda"),
    "nccl": Implementation("nccl", "cuda", NCCL_CASES),
    "mooncake": Implementation("mooncake", "cpu"),
    "mooncake-staged": Implementation("mooncake", "cuda"),
    "mooncake-device": Implementation("mooncake", "cuda", memory="device"),
    "toy": Implementation("toy", "cpu"),
}


def ends(rank: Rank, implementation: Implementation) -> Ends:
    case, transport = rank.case, implementation.value
    mooncake = MooncakeConfig("tcp", memory=implementation.memory)
    config = ChannelConfig(implementation.transport, send_buffers=case.buffers, mooncake=mooncake)
    wire = Wire(config, rank.topology, rank.world, rank.groups, case.layout, PATIENCE_S)
    if rank.topology.target_place(rank.rank) is None:
        return None, transport.receiver(wire, case.slots, case.rows, lambda: None)
    sender = transport.sender(wire, case.dp * case.rows, Desk(rank).announce)
    sender.connect(PATIENCE_S, check=lambda: None)
    return sender, None


def make_item(case: Case, index: int) -> WorkItem:
    """Item `index`, the same on all ranks: shards of very different lengths, some empty, some full."""
    chance = random.Random(index)
    lengths = [chance.choice((0, 1, 2, chance.randint(0, case.rows), case.rows)) for _ in range(case.dp)]
    shards = tuple(Shard((), ()) if n == 0 else Shard((index,), (n,)) for n in lengths)
    return WorkItem(index, Cursor(), Cursor(), shards)


def make_rows(case: Case, item: WorkItem) -> torch.Tensor:
    """Random bits for all rows of an item, NaN patterns included."""
    generator = torch.Generator().manual_seed(item.index)
    size = (item.tokens, case.layout.width * case.layout.dtype.itemsize)
    return torch.randint(0, 256, size, generator=generator, dtype=torch.uint8).view(case.layout.dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.cpu().view(torch.uint8), b.cpu().view(torch.uint8))


class Desk:
    """The scheduler's part: says what was announced and what is free, over the world's store."""

    def __init__(self, rank: Rank):
        self._rank = rank
        self._store = dist.PrefixStore(f"desk/{rank.case.name}", rank.world.store)

    def replica(self, index: int) -> int:
        """Who computes the item: in turns that do not go round evenly."""
        return random.Random(-index).randrange(self._rank.case.replicas)

    def slot(self, index: int) -> int:
        """Items take the slots in turn, but not in their order."""
        return self._rank.case.slots - 1 - index % self._rank.case.slots

    def free(self, index: int) -> bool:
        """Whether all draft ranks have released the item that was in the slot of item `index`."""
        earlier = index - self._rank.case.slots
        ranks = self._rank.topology.draft_ranks
        return earlier < 0 or self._store.check([f"released/{earlier}/{rank}" for rank in ranks])

    def released(self, index: int) -> None:
        self._store.set(f"released/{index}/{self._rank.rank}", "")

    def announce(self, index: int) -> None:
        self._store.set(f"announced/{index}/{self._rank.rank}", "")

    def delivered(self, index: int) -> bool:
        ranks = self._rank.topology.replicas[self.replica(index)]
        return self._store.check([f"announced/{index}/{rank}" for rank in ranks])


def produce(rank: Rank, sender: FeatureSender) -> Iterator[None]:
    """The target's part. Yields where it would wait."""
    desk, place = Desk(rank), rank.topology.target_place(rank.rank)
    assert place is not None
    for index in range(rank.case.items):
        if desk.replica(index) != place.replica:
            continue
        while not desk.free(index):
            yield
        item = make_item(rank.case, index)
        rows = sender.buffer(item)
        rows.copy_(make_rows(rank.case, item))
        if rows.is_cuda:
            torch.cuda.synchronize()  # what is sent must be complete
        sender.send(item, rows, desk.slot(index))
    sender.flush(PATIENCE_S)


def consume(rank: Rank, receiver: FeatureReceiver) -> Iterator[None]:
    """The draft's part: posts an item once it is delivered, holds as many as the ring has, releases the oldest."""
    desk = Desk(rank)
    held: dict[int, torch.Tensor] = {}
    addresses: dict[int, int] = {}
    posted = taken = 0
    while posted < rank.case.items or held:
        if posted < rank.case.items and posted - min(held, default=taken) < rank.case.slots and desk.delivered(posted):
            receiver.post(make_item(rank.case, posted), desk.replica(posted), desk.slot(posted))
            posted += 1
        elif taken < posted:
            rows = receiver.take(make_item(rank.case, taken), PATIENCE_S)
            if len(rows):
                addresses[taken] = rows.data_ptr()
            held[taken] = rows
            check_rows(rank, held, taken)
            taken += 1
        elif held and (len(held) == rank.case.slots or taken == rank.case.items):
            oldest = min(held)
            check_rows(rank, held, oldest)  # what came in meanwhile went elsewhere
            del held[oldest]
            receiver.release(make_item(rank.case, oldest), functools.partial(desk.released, oldest))
        else:
            yield
    check_slots(addresses, desk)


def check_rows(rank: Rank, held: dict[int, torch.Tensor], index: int) -> None:
    place = rank.topology.draft_place(rank.rank)
    assert place is not None
    item = make_item(rank.case, index)
    expected = make_rows(rank.case, item)[item.rows(place.dp)]
    assert same_bits(held[index], expected), f"item {index} of '{rank.case.name}' is wrong on rank {rank.rank}"


def check_slots(addresses: dict[int, int], desk: Desk) -> None:
    """The same memory for the same slot, and no slot in two places."""
    places = {(desk.slot(index), address) for index, address in addresses.items()}
    assert len(places) == len(dict(places)) == len({address for _, address in places}), addresses


def work(parts: list[Iterator[None]]) -> None:
    """Let the roles of this rank take turns until all are done."""
    deadline, chance = time.monotonic() + PATIENCE_S, random.Random(os.getpid())
    while parts:
        for part in list(parts):
            try:
                next(part)
            except StopIteration:
                parts.remove(part)
        assert time.monotonic() < deadline, "the case got nowhere"
        time.sleep(chance.random() * 0.002)


def be(rank: Rank, implementation: Implementation) -> Ends:
    """Play this rank's part of a case. The ends stay until nobody waits any more for what was sent to them."""
    sender, receiver = ends(rank, implementation)
    work([produce(rank, sender)] if sender is not None else [consume(rank, receiver)] if receiver is not None else [])
    return sender, receiver


def never_sent(rank: Rank, implementation: Implementation) -> dict[str, object]:
    """What a draft rank raises that takes an item nobody sends."""
    _, receiver = ends(rank, implementation)
    if receiver is None or implementation.value.one_sided:  # what was posted has arrived
        return {}
    item = full_item(rank.case)
    began = time.monotonic()
    receiver.post(item, 0, 0)
    try:
        receiver.take(item, GIVE_UP_S)
    except WorldError as error:
        return {"take": str(error), "take seconds": time.monotonic() - began}
    return {"take": "rows"}


def never_taken(rank: Rank, implementation: Implementation) -> dict[str, object]:
    """What a target rank raises whose features nobody takes."""
    sender, _ = ends(rank, implementation)
    if sender is None:
        time.sleep(3 * GIVE_UP_S)  # the receiver lives, but does not take
        return {}
    item = full_item(rank.case)
    sender.send(item, sender.buffer(item), 0)
    began = time.monotonic()
    told = ""
    try:
        sender.flush(GIVE_UP_S)
    except WorldError as error:
        told = str(error)
    return {"flush": told, "flush seconds": time.monotonic() - began}


def full_item(case: Case) -> WorkItem:
    return WorkItem(0, Cursor(), Cursor(), (Shard((0,), (case.rows,)),) * case.dp)


def main(name: str, folder: Path) -> None:
    torch.set_num_threads(1)
    implementation = IMPLEMENTATIONS[name]
    config = WorldConfig(
        mode="split",
        device=implementation.device,
        share_devices=implementation.transport != "nccl",
        wait_timeout_s=60.0,
    )
    world = join_world(config, RankFacts.from_environment())

    def enter(case: Case) -> Rank:
        topology = Topology.build(config, world.hosts, replicas=case.replicas, tp=case.tp, dp=case.dp, cp=case.cp)
        groups = make_groups(topology, world, implementation.value.link_backend, 60.0)
        connect_links(topology, groups, world, PATIENCE_S)
        return Rank(case, world, topology, groups)

    size = world.facts.world_size
    fits = [c for c in implementation.cases if c.replicas * c.tp + c.dp * c.cp == size]
    kept = [be(enter(case), implementation) for case in fits]
    # Failures last, each in groups of its own: a transfer that was given up leaves its connection unusable.
    large = max(fits, key=lambda case: case.rows * case.layout.bytes_per_token)
    first, second = enter(fits[0]), enter(large)
    report = {"cases": [case.name for case, _ in zip(fits, kept, strict=True)], **never_sent(first, implementation)}
    report |= never_taken(second, implementation)
    (folder / f"rank-{world.facts.rank}.json").write_text(json.dumps(report))
    while len(list(folder.glob("rank-*.json"))) < size:  # nobody's end may look like a lost connection to another
        time.sleep(0.05)
    time.sleep(0.5)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
