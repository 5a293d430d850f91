# SPDX-License-Identifier: Apache-2.0
"""The loop of a target rank: take an item from the scheduler, run the packed forward, report, send the features."""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import time
from collections import deque
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from specdist.channel.base import DropSender, FeatureSender
from specdist.channel.encoding import Parcel, Plain
from specdist.channel.ring import Ring
from specdist.core.attempts import Ending
from specdist.core.device_timer import Moment
from specdist.core.errors import say
from specdist.core.files import to_json
from specdist.core.trace import span
from specdist.core.worker import Worker
from specdist.prompts.corpus import Corpus
from specdist.prompts.items import Items
from specdist.run.context import RankContext
from specdist.scheduler.client import ControlClient
from specdist.scheduler.messages import Computed, Dispatch, Message, Produced, ProducerReport, Send, Stop, StopRequest
from specdist.target.base import TargetModel
from specdist.target.head import forward_item
from specdist.target.verify import verify
from specdist.training.profile import NO_PROFILE, Profile


@dataclass(eq=False)
class _Forward:
    """A forward that was launched and perhaps still runs. On CPU it has finished when it returns."""

    parcel: Parcel
    sent: Tensor
    agreed: Tensor | None
    """On the host, see `forward_item`."""
    began: Moment
    ended: Moment


class Producer:
    """Drives one target rank. All ranks of a replica get the same orders, so they stay in step.

    A thread hears the scheduler, and sends what it wants sent: the main one may be in a forward then.
    """

    def __init__(
        self,
        engine: TargetModel,
        sender: FeatureSender,
        encoding: Plain,
        client: ControlClient,
        items: Items,
        prompts: Corpus,
        verify_items: int,
        timeout_s: float,
        profile: Profile = NO_PROFILE,
        alone: bool = False,
        in_turn: bool = False,
    ):
        """
        Args:
            encoding: what the sender's wire was made for.
            alone: whether this rank is its whole replica. It may then leave out forwards that are not needed any more;
                others would wait in theirs.
            in_turn: forwards and sends are issued in the order in which the scheduler asks for them, which is the same
                on all ranks of the replica (specdist/channel/p2p.py).
        """
        self._engine, self._sender, self._encoding, self._client = engine, sender, encoding, client
        self._items, self._prompts = items, prompts
        self._verify_left, self._timeout_s = verify_items, timeout_s
        self._heard: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        """What is for the main thread; None: the other has ended."""
        self._orders: deque[Dispatch | Send] = deque()
        self._running: deque[_Forward] = deque()
        self._held: list[_Forward] = []
        """What is computed. An item that is to be dropped may be there again before it is."""
        self._listener = Worker("specdist-sender", self._listen, lambda error: self._heard.put(None))
        self.report = ProducerReport()
        self._began = 0.0
        self._profile, self._alone, self._in_turn = profile, alone, in_turn

    def run(self) -> ProducerReport:
        """Work until the scheduler says stop; raises WorldError when the world fails."""
        self._listener.start()
        stopped = False
        while not stopped or self._orders or self._running:  # others of the replica may have begun what was given
            for message in self._poll():
                match message:
                    case Dispatch(_, _, oldest):
                        self._items.forget(before=oldest)
                        self._orders.append(message)
                    case Send(_, _, slot):
                        self._orders.append(message) if slot >= 0 else self._send(message)
                    case StopRequest() | Stop():
                        stopped |= isinstance(message, Stop)
                        if self._alone:  # what is not launched yet will not be trained on
                            self._orders.clear()
            self._work()
            self._report_finished()
        self._listener.join(self._timeout_s)
        for done in self._held:  # nobody asks for it any more
            self._sender.drop(done.sent)
        self._sender.flush(self._timeout_s)
        return self.report

    def _work(self) -> None:
        while self._orders and isinstance(order := self._orders[0], Send):
            self._orders.popleft()
            self._send(order)
        if self._may_launch():
            self._began = self._began or time.monotonic()
            self._launch(self._orders.popleft().item)

    def _may_launch(self) -> bool:
        """One forward runs and one is queued behind it, so that the device never waits for the host."""
        return bool(self._orders) and len(self._running) < 2 and self._sender.available

    def _poll(self) -> list[Message]:
        """Messages; waits for one not at all with work at hand, and briefly with a forward or a send under way."""
        if self._may_launch():
            return self._take(0.0)
        if self._running or self._orders:
            return self._take(0.0005)
        with span("wait for a batch"):
            return self._take(1.0)

    def _take(self, timeout_s: float) -> list[Message]:
        messages: list[Message] = []
        with contextlib.suppress(queue.Empty):
            message = self._heard.get(timeout_s > 0, timeout_s)
            while message is not None:
                messages.append(message)
                message = self._heard.get_nowait()
        if self._listener.error is not None:
            raise self._listener.error
        self._sender.check()
        return messages

    def _listen(self) -> None:
        """The body of the thread, until the end of the work."""
        if self._engine.device.type == "cuda":
            torch.cuda.set_device(self._engine.device)
        stopped = False
        while not stopped:
            for message in self._client.poll(1.0):
                stopped |= isinstance(message, Stop)
                if isinstance(message, Send) and not self._in_turn:
                    self._send(message)
                else:
                    self._heard.put(message)

    def _send(self, order: Send) -> None:
        done = next(done for done in self._held if done.parcel.item.index == order.item)
        if order.slot < 0:
            self._sender.drop(done.sent)
        else:
            with span("issue the sends", order.item):
                self._sender.send(done.parcel.wire, done.sent, order.slot)
        self._held.remove(done)  # not before: a timeline that covers it goes on until then

    def _launch(self, index: int) -> None:
        item = self._items[index]
        self._client.phase = f"forward of batch {item.index}"
        oldest = min([done.parcel.item.index for done in (*self._held, *self._running)], default=item.index)
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
        began = Moment(self._engine.device)
        with span("forward", item.index, tokens=item.tokens):
            agreed = forward_item(self._engine, item, batch, rows)
            self._encoding.encode(parcel, rows, sent)
            if agreed is not None:  # read when the forward is finished, without waiting for the next one
                host = torch.empty_like(agreed, device="cpu", pin_memory=agreed.is_cuda)
                agreed = host.copy_(agreed, non_blocking=True)
        self._running.append(_Forward(parcel, sent, agreed, began, Moment(self._engine.device)))

    def _report_finished(self) -> None:
        """Tell the scheduler what is finished, and keep it until it is to be sent."""
        while self._running and self._running[0].ended.reached():
            done = self._running.popleft()
            item, seconds = done.parcel.item, done.ended.since(done.began)
            agreed = () if done.agreed is None else tuple(done.agreed.tolist())
            self._held.append(done)
            self._client.send(Computed(item.index, item.tokens, seconds, agreed))
            self.report.add(item.tokens, seconds, time.monotonic() - self._began)
            self._client.phase = "waiting for a batch"


def producer_of(context: RankContext, engine: TargetModel, encoding: Plain, sender: FeatureSender) -> Producer:
    """Of this rank, whose `sender` is connected; features travel as `encoding` says."""
    job, split = context.job, context.topology.mode == "split"
    return Producer(
        engine,
        sender,
        encoding,
        context.client,
        context.items(),
        context.prompts,
        job.target.verify,
        context.timeout_s,
        context.profile,
        alone=job.target.tp == 1,
        in_turn=split and job.target.tp > 1 and not context.transport.one_sided,
    )


def produce(context: RankContext) -> None:
    job, topology = context.job, context.topology
    item_tokens = topology.shards * job.prompts.tokens_per_rank
    context.begin("loading the target")
    engine = context.load_engine(item_tokens)
    layout = context.facts.layout
    sender: FeatureSender
    if topology.mode == "target_only":
        encoding = Plain(layout)
        sender = DropSender(Ring(layout, 1, item_tokens, context.world.device))
    else:
        encoding, sender = context.sender(context.client)
        context.begin("connecting to the draft ranks")
        sender.connect(job.control.load_timeout_s, context.client.check)
    producer = producer_of(context, engine, encoding, sender)
    context.client.ready()
    context.started()
    report = producer.run()
    if topology.mode == "split":
        context.client.send(Produced(report))
    elif topology.mode == "target_only" and context.rank == 0:
        _report_target_only(context, report)
        state: Literal["stopped", "finished"] = "stopped" if context.stop else "finished"
        context.record.end(Ending(state, context.resume.progress.step, context.stop.reason, context.stop.detail))


def _report_target_only(context: RankContext, report: ProducerReport) -> None:
    summary = {"mode": "target_only", **dataclasses.asdict(report), "tokens_per_s": report.tokens_per_s}
    context.run_dir.write(context.run_dir.summary, to_json(summary))
    say(
        f"target only: {report.items} batches, {report.tokens:,} tokens in {report.elapsed_s:.1f} s = "
        f"{report.tokens_per_s:,.0f} tokens/s on replica 0, busy {report.busy_s / max(report.elapsed_s, 1e-9):.0%}",
    )
