# SPDX-License-Identifier: Apache-2.0
"""Where a draft rank's features come from: target ranks over the channel, its own target, or a random generator."""

from __future__ import annotations

import contextlib
import functools
import math
import threading
import time
from dataclasses import replace

import torch
from torch import Tensor

from specdist.channel.base import FeatureReceiver
from specdist.core.errors import WorldError
from specdist.core.records import FeatureLayout, PackedTokens, WorkItem
from specdist.core.stop import StopFlag
from specdist.core.topology import Topology
from specdist.core.trace import span
from specdist.core.worker import Worker
from specdist.prompts.corpus import Corpus
from specdist.prompts.items import Items
from specdist.run.stall_timer import StallTimer
from specdist.scheduler.client import ControlClient
from specdist.scheduler.messages import Deliver, Message, Released, Stop, StopRequest
from specdist.target.base import TargetModel
from specdist.target.head import forward_item
from specdist.target.verify import verify
from specdist.training.parts import FeatureSource


class RemoteSource(FeatureSource):
    """Features from target ranks. A thread of its own posts each receive as soon as the scheduler says that the data
    exists, so transfers run while the trainer computes."""

    def __init__(
        self,
        client: ControlClient,
        receiver: FeatureReceiver,
        items: Items,
        stop: StopFlag,
        timeout_s: float,
        device: torch.device,
        shard: int,
    ):
        self._shard = shard
        self._waits = StallTimer(device)
        self._client, self.receiver, self._items = client, receiver, items
        self._stop, self._timeout_s = stop, timeout_s
        self._next = items.schedule.first_item
        """The first item that is not released."""
        self._delivered: set[int] = set()  # items that are posted and not yet released
        self._agreed: dict[int, int] = {}
        self._changed = threading.Condition()
        self._stopped = False
        self._thread = Worker("specdist-receiver", self._listen, lambda error: self._notify())
        self._thread.start()

    @property
    def waited_s(self) -> float:
        return self._waits.seconds

    def coming(self, item: WorkItem, stop: StopFlag) -> bool:
        self._client.phase = f"waiting for the hidden states of batch {item.index}"
        with self._waits.waiting(), span("wait for the forward", item.index):
            delivered = self._await(item.index, stop)
        if not delivered and not stop:
            raise WorldError(f"the scheduler on rank 0 ended the run before batch {item.index}")
        return delivered

    def take(self, item: WorkItem) -> Tensor:
        with self._waits.waiting(), span("wait for the transfer", item.index):
            rows = self.receiver.take(item, self._timeout_s)
        self._client.phase = f"training on batch {item.index}"
        return rows

    def release(self, item: WorkItem) -> None:
        self._delivered.discard(item.index)
        self._next = item.index + 1
        self.receiver.release(item, functools.partial(self._freed, item.index))

    def _freed(self, index: int) -> None:
        with contextlib.suppress(WorldError):  # the trainer learns it where it can do something about it
            self._client.send(Released(index))

    def agreed(self, item: WorkItem) -> int:
        return self._agreed.pop(item.index)

    def drain(self) -> None:
        """Receive and release, untrained, what was on its way beyond the last item, until the scheduler stops."""
        self._client.phase = "draining"
        while self._await(self._next):
            item = self._items[self._next]
            self.receiver.take(item, self._timeout_s)
            self.release(item)

    def _await(self, index: int, stop: StopFlag | None = None) -> bool:
        """Wait until item `index` is delivered; False if the scheduler stops, or `stop` is asked for, before."""
        deadline = time.monotonic() + self._timeout_s
        with self._changed:
            while index not in self._delivered and not self._stopped and not stop:
                if self._thread.error is not None:
                    raise self._thread.error
                self._client.check()
                if time.monotonic() > deadline:
                    limit = f"{self._timeout_s:.0f} s (world.wait_timeout_s)"
                    raise WorldError(f"no target replica delivered batch {index} within {limit}")
                self._changed.wait(timeout=0.5)
            return index in self._delivered

    def _listen(self) -> None:
        self.receiver.enter_thread()
        while not self._stopped:
            for message in self._client.poll(1.0):
                self._handle(message)

    def _handle(self, message: Message) -> None:
        match message:
            case Deliver(index, replica, slot, agreed):
                with span("post the receives", index):
                    self.receiver.post(self._items[index], replica, slot)
                if agreed:
                    self._agreed[index] = agreed[self._shard]
                self._delivered.add(index)
                self._notify()
            case StopRequest(reason, rank):
                self._stop.request(reason, f" on rank {rank}")
                self._notify()
            case Stop():
                self._stopped = True
                self._notify()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()


class ColocatedSource(FeatureSource):
    """Features from the target on the same ranks: each item is computed when the trainer asks for it.

    A replica computes, in one packed forward, the shards of its own ranks.
    """

    def __init__(
        self,
        engine: TargetModel,
        slots: list[Tensor],
        topology: Topology,
        rank: int,
        prompts: Corpus,
    ):
        place = topology.draft_place(rank)
        assert place is not None
        self._engine, self._free, self._prompts = engine, slots, prompts
        self._shards = local_shards(topology, rank)
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
        rows = self._taken.setdefault(item.index, self._free.pop())[: own.tokens]
        if own.tokens:
            with span("target forward", item.index, tokens=own.tokens):
                agreed = forward_item(self._engine, own, self._pack(own), rows)
            if agreed is not None:
                self._agreed[item.index] = agreed
        return rows[own.rows(self._shard)]

    def release(self, item: WorkItem) -> None:
        self._free.append(self._taken.pop(item.index))

    def agreed(self, item: WorkItem) -> int | Tensor:
        found = self._agreed.pop(item.index, None)
        return 0 if found is None else found[self._shard]

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

    def __init__(self, layout: FeatureLayout, vocab_size: int, shard: int, device: torch.device, seed: int):
        self._layout, self._vocab_size, self._shard = layout, vocab_size, shard
        self._device, self._seed = device, seed

    def take(self, item: WorkItem) -> Tensor:
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
