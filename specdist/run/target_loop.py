# SPDX-License-Identifier: Apache-2.0
"""The loop of a target rank: take an item the scheduler sends, run the packed forward, send the features, report."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from specdist.channel.base import FeatureSender
from specdist.channel.encoding import Parcel, Plain
from specdist.core.trace import span
from specdist.prompts.corpus import Corpus
from specdist.prompts.items import Items
from specdist.scheduler.client import ControlClient
from specdist.scheduler.messages import Computed, Dispatch, Message, ProducerReport, Stop, StopRequest
from specdist.target.base import TargetModel
from specdist.target.head import forward_item
from specdist.target.verify import verify
from specdist.training.profile import NO_PROFILE, Profile


@dataclass
class _Forward:
    """A forward that was launched and perhaps still runs. On CPU it has finished when it returns."""

    parcel: Parcel
    slot: int
    sent: Tensor
    agreed: Tensor | None
    """On the host, see `forward_item`."""
    began: torch.cuda.Event | float
    ended: torch.cuda.Event | float
    cancelled: bool
    """It was left out: its rows go their way, and nobody reads them."""

    def finished(self) -> bool:
        return not isinstance(self.ended, torch.cuda.Event) or self.ended.query()

    def seconds(self) -> float:
        if isinstance(self.began, torch.cuda.Event):
            assert isinstance(self.ended, torch.cuda.Event)
            return self.began.elapsed_time(self.ended) / 1000
        assert isinstance(self.ended, float)
        return self.ended - self.began


class Announcement:
    """Tells the scheduler what a sender announces, and `agreed` of items that are evaluated (`Computed`)."""

    def __init__(self, client: ControlClient) -> None:
        self._client = client
        self.agreed: dict[int, tuple[int, ...]] = {}

    def __call__(self, item: int) -> None:
        self._client.send(Computed(item, self.agreed.pop(item, ())))


class Producer:
    """Drives one target rank. All ranks of a replica get the same items in the same order, so they stay in step."""

    def __init__(
        self,
        engine: TargetModel,
        sender: FeatureSender,
        encoding: Plain,
        announcement: Announcement,
        client: ControlClient,
        items: Items,
        prompts: Corpus,
        slots: int,
        verify_items: int,
        timeout_s: float,
        profile: Profile = NO_PROFILE,
        alone: bool = False,
    ):
        """
        Args:
            encoding: what the sender's wire was made for.
            announcement: the sender's.
            slots: items that may be in flight: an item that another replica has lost is never older than that.
            alone: whether this rank is its whole replica. It may then leave out forwards that are not needed any more;
                others would wait in theirs.
        """
        self._engine, self._sender, self._announcement, self._client = engine, sender, announcement, client
        self._encoding = encoding
        self._items, self._prompts = items, prompts
        self._verify_left, self._timeout_s = verify_items, timeout_s
        self._slots = slots
        self._queue: deque[Dispatch] = deque()
        self._running: deque[_Forward] = deque()
        self.report = ProducerReport()
        self._began = 0.0
        self._profile, self._alone, self._cancelled = profile, alone, False

    def run(self) -> ProducerReport:
        """Work until the scheduler says stop; raises WorldError when the world fails."""
        stopped = False
        while not stopped or self._queue or self._running:  # what was given before the stop is finished
            for message in self._poll():
                match message:
                    case Dispatch():
                        self._items.forget(before=message.item - self._slots)
                        self._queue.append(message)
                    case StopRequest():  # what is not launched yet will not be trained on
                        self._cancelled = self._alone
                    case Stop():
                        stopped = True
            if self._may_launch():
                self._began = self._began or time.monotonic()
                self._launch(self._queue.popleft())
            self._report_finished()
        self._sender.flush(self._timeout_s)
        return self.report

    def _may_launch(self) -> bool:
        """One forward runs and one is queued behind it, so that the device never waits for the host. Of a replica of
        several ranks none is queued: each would issue it, and the collectives in it, before or behind the sends of the
        one that runs, as it finds that finished, and all must do the same (specdist/channel/p2p.py)."""
        return bool(self._queue) and len(self._running) < min(2 if self._alone else 1, self._sender.buffers)

    def _poll(self) -> list[Message]:
        """Messages; waits for one not at all with work at hand, and briefly with a forward under way."""
        if self._may_launch():
            return self._client.poll(0.0)
        if self._running:
            return self._client.poll(0.0005)
        with span("wait for a batch"):
            return self._client.poll(1.0)

    def _launch(self, dispatch: Dispatch) -> None:
        item = self._items[dispatch.item]
        self._client.phase = f"forward of batch {item.index}"
        oldest = self._running[0].parcel.item.index if self._running else item.index
        if self._profile.ends_at(oldest):
            self._sender.flush(self._timeout_s)  # a send that is under way would be missing
        self._profile.reach(oldest, item.index)
        with span("pack", item.index, tokens=item.tokens):
            batch = self._prompts.pack([s for shard in item.shards for s in shard.sequences])
        if self._verify_left > 0 and item.tokens:
            self._verify_left -= 1
            verify(self._engine, batch)
        with span("wait for a buffer", item.index):
            parcel = self._encoding.parcel(item)
            sent = self._sender.buffer(parcel.wire)
            rows = self._encoding.rows(parcel, sent)
        began, agreed = self._now(), None
        if not self._cancelled:
            with span("forward", item.index, tokens=item.tokens):
                agreed = forward_item(self._engine, item, batch, rows)
                self._encoding.encode(parcel, rows, sent)
                if agreed is not None:  # read when the forward is finished, without waiting for the next one
                    host = torch.empty_like(agreed, device="cpu", pin_memory=agreed.is_cuda)
                    agreed = host.copy_(agreed, non_blocking=True)
        ended = self._now()
        self._running.append(_Forward(parcel, dispatch.slot, sent, agreed, began, ended, self._cancelled))

    def _now(self) -> torch.cuda.Event | float:
        if self._engine.device.type != "cuda":
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _report_finished(self) -> None:
        """Send what is finished; the sender announces it to the scheduler."""
        while self._running and self._running[0].finished():
            done = self._running.popleft()
            item = done.parcel.item
            if done.agreed is not None:
                self._announcement.agreed[item.index] = tuple(done.agreed.tolist())
            with span("issue the sends", item.index):
                self._sender.send(done.parcel.wire, done.sent, done.slot)
            if not done.cancelled:
                self.report.add(item.tokens, done.seconds(), time.monotonic() - self._began)
            self._client.phase = "waiting for a batch"
