# SPDX-License-Identifier: Apache-2.0
"""Where a draft rank's features come from: target ranks over the channel, its own target, or a random generator."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from specdist.channel.base import FeatureReceiver
from specdist.channel.encoding import Parcel, Plain, round_as_sent
from specdist.core.device_timer import DeviceTimer
from specdist.core.errors import WorldError
from specdist.core.records import FeatureLayout, PackedTokens, WorkItem
from specdist.core.stop import StopFlag
from specdist.core.topology import Topology
from specdist.core.trace import span
from specdist.prompts.items import Items
from specdist.prompts.schedule import Schedule
from specdist.run.context import RankContext
from specdist.scheduler.awake import AwakeClock
from specdist.scheduler.client import ControlClient
from specdist.scheduler.messages import Deliver, Released, Stop, StopRequest
from specdist.target.base import TargetModel
from specdist.target.head import forward_item
from specdist.target.verify import verify
from specdist.training.parts import FeatureSource

_LOOK_S = 0.5
"""How often a wait looks whether this process was asked to stop."""
_AGREE_S = 0.005
"""How often draft ranks that wait agree on what other pods have been sent."""


def working_on(item: WorkItem, schedule: Schedule) -> str:
    """What a draft rank does with an item that has come. Of the first step it is said: kernels are compiled and
    connections made in it, so it may take minutes."""
    if item.evaluated:
        return f"evaluating on batch {item.index}"
    first = " of the first step" if item.index in schedule.training(schedule.first_step) else ""
    return f"training on batch {item.index}{first}"


class RemoteSource(FeatureSource):
    """Features from target ranks: what the scheduler says is on its way to this rank's pod, in its order of all."""

    def __init__(
        self,
        client: ControlClient,
        receiver: FeatureReceiver,
        encoding: Plain,
        items: Items,
        stop: StopFlag,
        timeout_s: float,
        device: torch.device,
        place: tuple[int, int],
        slots: int,
    ):
        """`place`: of this rank, see `Topology.shard_of`. `slots`: of a ring."""
        (self._pod, self._shard), self._pods = place, items.schedule.pods
        self._encoding, self._received_bytes = encoding, 0
        self._waits = DeviceTimer(device)
        self._client, self.receiver, self._items = client, receiver, items
        self._stop, self._timeout_s, self._clock = stop, timeout_s, AwakeClock(20 * _LOOK_S)
        self._next = items.schedule.first_item
        """The first item that is not released."""
        self._known: dict[int, Deliver] = {}  # by its number, not yet posted
        self._posts = 0  # deliveries that have been posted, by whichever pod
        self._there = set[int]()  # their items, those that this rank has not passed
        self._window = slots * self._pods  # more deliveries there cannot be that are not posted
        self._posted: dict[int, Parcel] = {}  # items that are not yet released
        self._awaited, self._wait_until = -1, 0.0
        self._agreed: dict[int, int] = {}
        self._broken: WorldError | None = None
        """What `look` and `post` met: raised where the ranks can agree on how to go on."""
        self._stopped = False

    @property
    def waited_s(self) -> float:
        return self._waits.seconds

    @property
    def received_bytes(self) -> int:
        return self._received_bytes

    def news(self) -> list[int]:
        found = [0] * self._window
        for number, delivery in self._known.items():
            found[number - self._posts] = delivery.item + 1
        return found

    def posted(self, items: range) -> bool:
        return self._there.issuperset(items)

    def waiting(self) -> contextlib.AbstractContextManager[None]:
        return self._waits.timed()

    def look(self) -> None:
        try:
            self._poll(0.0)
        except WorldError as error:
            self._broken = self._broken or error

    def await_more(self, item: int, stop: StopFlag) -> None:
        if item in self._there:  # the other pods wait
            return
        self._client.phase = f"waiting for the hidden states of batch {item}"
        # What comes to other pods is posted meanwhile: a sender may wait for that before it sends this item.
        more = self._await_more(item, stop, math.inf if self._pods == 1 else _AGREE_S)
        if not more and self._stopped and not stop:
            raise WorldError(f"the scheduler on rank 0 ended the run before batch {item}")

    def post(self, news: Sequence[int]) -> None:
        for entry in itertools.takewhile(bool, news):
            item = self._items[entry - 1]
            if item.pod == self._pod:
                self._post(item, self._posts)
            self._there.add(item.index)
            self._posts += 1

    def _post(self, item: WorkItem, number: int) -> None:
        parcel = self._posted[item.index] = self._encoding.parcel(item)
        try:
            delivery = self._heard(number)
            with span("post the receives", item.index):
                self.receiver.post(parcel.wire, delivery.replica, delivery.slot)
        except WorldError as error:
            self._broken = self._broken or error
            return
        if delivery.agreed:
            self._agreed[item.index] = delivery.agreed[self._shard]

    def _heard(self, number: int) -> Deliver:
        """What the scheduler has said to another rank of the pod at least, and to this one at the same time."""
        deadline = self._clock() + self._timeout_s
        while number not in self._known:
            if self._stopped or self._clock() > deadline:
                raise WorldError(f"the scheduler on rank 0 told others of delivery {number}, and not this rank")
            self._poll(_LOOK_S)
        return self._known.pop(number)

    def take(self, item: WorkItem) -> Tensor:
        self._raise_broken()
        with self._waits.timed(), span("wait for the transfer", item.index):
            parcel = self._posted[item.index]
            received = self.receiver.take(parcel.wire, self._timeout_s)
        self._received_bytes += parcel.sizes[self._shard]
        self._client.phase = working_on(item, self._items.schedule)
        return self._encoding.decode(parcel, self._shard, received)

    def release(self, item: WorkItem) -> None:
        self._next = item.index + 1
        self._there = {other for other in self._there if other > item.index}
        self.receiver.release(self._posted.pop(item.index).wire, functools.partial(self._freed, item.index))

    def _freed(self, index: int) -> None:
        with contextlib.suppress(WorldError):  # the trainer learns it where it can do something about it
            self._client.send(Released(index))

    def agreed(self, item: WorkItem) -> int:
        return self._agreed.pop(item.index)

    def drain(self) -> None:
        """Receive and release, untrained, what was on its way beyond the last item, until the scheduler stops. All
        draft ranks post the same, and issue no other GPU communication meanwhile."""
        self._client.phase = "draining"
        while self._posted or self._await_more(self._next):
            for number in sorted(self._known):
                self._post(self._items[self._known[number].item], number)
            item = self._items[min(self._posted)]  # some before it may never come
            self.take(item)
            self.release(item)

    def _await_more(self, index: int, stop: StopFlag | None = None, at_most_s: float = math.inf) -> bool:
        """Wait until a delivery is known that is not posted, as that of item `index` will be; False if the scheduler
        stops, `stop` is asked for, or so many seconds have passed, before."""
        now = self._clock()
        until = now + at_most_s
        if self._awaited != index:
            self._awaited, self._wait_until = index, now + self._timeout_s
        self._raise_broken()
        while not self._known and not self._stopped and not stop and now < until:
            if now > self._wait_until:
                limit = f"{self._timeout_s:.0f} s (world.wait_timeout_s)"
                raise WorldError(f"no target replica delivered batch {index} within {limit}")
            self._poll(min(_LOOK_S, at_most_s))
            now = self._clock()
        return bool(self._known)

    def _raise_broken(self) -> None:
        if self._broken is not None:
            raise self._broken

    def _poll(self, timeout_s: float) -> None:
        for message in self._client.poll(timeout_s):
            match message:
                case Deliver():
                    self._known[message.number] = message
                case StopRequest(reason, rank):
                    self._stop.request(reason, f" on rank {rank}")
                case Stop():
                    self._stopped = True


class ColocatedSource(FeatureSource):
    """Features from the target on the same ranks: each item is computed when the trainer asks for it.

    A replica computes, in one packed forward, the shards of its own ranks.
    """

    def __init__(self, context: RankContext, engine: TargetModel, slots: list[Tensor]):
        place = context.topology.draft_place(context.rank)
        assert place is not None
        self._client, self._schedule = context.client, context.resume.schedule
        self._engine, self._free = engine, slots
        self._prompts, self._dtype = context.prompts, context.job.channel.dtype
        self._shards = local_shards(context.topology, context.rank)
        self._shard = self._shards.index(place.dp)
        self._taken: dict[int, Tensor] = {}  # slots, by item
        self._agreed: dict[int, Tensor] = {}

    def verify(self, items: Items, count: int) -> None:
        """Compare the packed forward of the next `count` items with one of each document alone."""
        for index in range(items.schedule.first_item, min(items.schedule.first_item + count, items.schedule.end_item)):
            own = self._own(items[index])
            if own.tokens:
                verify(self._engine, self._pack(own))

    def take(self, item: WorkItem) -> Tensor:
        own = self._own(item)
        self._client.phase = f"forward of batch {item.index}"
        rows = self._taken.setdefault(item.index, self._free.pop())[: own.tokens]
        with span("target forward", item.index, tokens=own.tokens):
            agreed = forward_item(self._engine, own, self._pack(own), rows)
            round_as_sent(self._engine.layout, self._dtype, rows)
        if agreed is not None:
            self._agreed[item.index] = agreed
        self._client.phase = working_on(item, self._schedule)
        return rows[own.rows(self._shard)]

    def release(self, item: WorkItem) -> None:
        self._free.append(self._taken.pop(item.index))

    def agreed(self, item: WorkItem) -> Tensor:
        return self._agreed.pop(item.index)[self._shard]

    def _pack(self, item: WorkItem) -> PackedTokens:
        return self._prompts.pack([s for shard in item.shards for s in shard.sequences])

    def _own(self, item: WorkItem) -> WorkItem:
        return replace(item, shards=tuple(item.shards[d] for d in self._shards))


def local_shards(topology: Topology, rank: int) -> list[int]:
    """Colocated mode: the shards that the replica of `rank` computes, those of its own ranks."""
    place = topology.target_place(rank)
    assert place is not None
    shards = []
    for member in topology.replicas[place.replica]:
        draft = topology.draft_place(member)
        if draft is not None and draft.dp not in shards:
            shards.append(draft.dp)
    return sorted(shards)


class SyntheticSource(FeatureSource):
    """Random features, the same for the same item: to measure the draft alone. Nothing sensible is learnt from them."""

    def __init__(self, context: RankContext, shard: int):
        self._client, self._schedule = context.client, context.resume.schedule
        self._layout, self._shard = context.facts.layout, shard
        self._vocab_size, self._seed = context.facts.target.vocab_size, context.job.run.seed
        self._device = context.world.device

    def take(self, item: WorkItem) -> Tensor:
        self._client.phase = working_on(item, self._schedule)
        generator = torch.Generator(self._device).manual_seed(self._seed * 1_000_003 + item.index)
        return random_rows(self._layout, item.shards[self._shard].tokens, self._vocab_size, generator)

    def release(self, item: WorkItem) -> None:
        """The rows are garbage-collected."""


def random_rows(layout: FeatureLayout, tokens: int, vocab_size: int, generator: torch.Generator) -> Tensor:
    """Rows [tokens, layout.width] on the generator's device: normal, and choices from a vocabulary of that size."""
    device = generator.device
    rows = torch.randn(tokens, layout.width, generator=generator, dtype=layout.dtype, device=device)
    if layout.argmax_lse:
        choice = torch.randint(vocab_size, (tokens,), generator=generator, device=device)
        log_sum_exp = torch.full((tokens,), math.log(vocab_size), device=device)  # of logits around zero
        layout.write_argmax_lse(rows, torch.arange(tokens, device=device), choice, log_sum_exp)
    return rows
