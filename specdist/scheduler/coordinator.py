# SPDX-License-Identifier: Apache-2.0
"""What rank 0 does with each control message: it moves the scheduler, and says what follows. No sockets; the clock is
the caller's.

`receive` applies one message, `advance` sends what became possible after a batch of them, and `tick`, about once a
second, looks for ranks that are late. The first failure is broadcast and is the one that every rank raises.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import replace

from specdist.core.attempts import Failure
from specdist.core.errors import say
from specdist.core.stop import StopReason
from specdist.core.topology import Topology
from specdist.scheduler import messages
from specdist.scheduler.config import ControlConfig
from specdist.scheduler.peers import Peers
from specdist.scheduler.replicas import RemoteRules, Replicas, Send
from specdist.scheduler.scheduler import Culprit, ProtocolError, Scheduler

logger = logging.getLogger(__name__)


class Observer:
    """What the coordinator reports to people. This one drops it."""

    def failed(self, failure: Failure) -> None:
        """The run has failed, and all ranks have been told; called once."""

    def dismissed(self, rank: int, reason: StopReason) -> None:
        """`rank` was asked to stop before the run had begun; called once."""

    def pulse(self, peers: Peers, statistics: messages.Statistics, started: bool, now: float) -> None:
        """Called every `control.heartbeat_s` seconds until the run's end."""

    def advanced(self, scheduler: Scheduler, now: float) -> None:
        """Called after every batch of messages once work is under way."""


class Coordinator:
    """The protocol on rank 0.

    Args:
        scheduler: None where no features travel between ranks (draft only, colocated): then only liveness, failures
            and stop requests are handled.
        rules: where the target replicas are in worlds of their own and join this one; else None.
    """

    def __init__(
        self,
        scheduler: Scheduler | None,
        topology: Topology,
        config: ControlConfig,
        send: Send,
        *,
        join_timeout_s: float,
        now: float,
        observer: Observer | None = None,
        rules: RemoteRules | None = None,
    ):
        self.peers = Peers(topology, now)
        self.aborted: messages.Abort | None = None
        self._observer = observer or Observer()
        self._scheduler, self._config, self._send = scheduler, config, send
        self._draft_ranks = topology.draft_ranks
        self._draft_of = {rank: draft for draft, rank in enumerate(topology.draft_ranks)}
        self.replicas: Replicas | None = None
        if scheduler is not None:
            self.replicas = Replicas(scheduler, self.peers, config, send, topology, rules)
        self._join_by, self._ready_by = now + join_timeout_s, now + config.load_timeout_s
        self._join_timeout = join_timeout_s
        self._next_pulse = now
        self._joined = self._ready = self._stopping = self._stopped = False
        self._report_by: float | None = None
        self._stop_requested = False
        self._aborted_at = 0.0

    def receive(self, rank: int, payload: bytes, now: float) -> None:
        peer = self.peers[rank]
        peer.heard_at, peer.lost_at = now, None
        try:
            message = messages.decode(payload)
            if self.aborted is None:
                self._apply(rank, message, now)
            else:
                self._apply_late(rank, message)
        except messages.DecodeError as error:
            peer.malformed += 1
            logger.warning("dropped a malformed control message of %s: %s", self.peers.name(rank), error)
        except ProtocolError as error:
            self._fail(rank, f"sent what the control protocol does not allow: {error}", now)

    def refuse(self, what: str) -> None:
        """Count what was dropped because it is not this run's, and say so at the first, the tenth, and so on."""
        self.peers.refused = count = self.peers.refused + 1
        if count == 10 ** (len(str(count)) - 1):
            say(f"dropped {what}" + (f", the {count}th" if count > 1 else " (more are counted)"))

    def miss(self, rank: int, now: float) -> None:
        """Messages of a rank are missing: what it has done is not known any more."""
        if not self._stopped:
            self._fail(rank, f"messages of it were lost with its connection; {self.peers.state(rank, now)}", now)

    def advance(self, now: float) -> None:
        """Give the replicas their orders, and end the run once nothing is left."""
        self._joined = self._joined or not self.peers.missing
        if self.aborted is not None or not self._joined:
            return
        if self._stopped:
            self._report(now)
            return
        scheduler = self._scheduler
        if not self._ready and not self.peers.unready:
            self._ready = True
            self._broadcast(messages.StartWork(), now)
        if scheduler is not None and self.replicas is not None and self._ready:
            for order in scheduler.next_orders(now):
                self._broadcast(order, now, self.replicas.ranks(order.replica))
            self._observer.advanced(scheduler, now)
        if self._ready and (self._stopping if scheduler is None else scheduler.finished):
            self._stop(now)

    def tick(self, now: float) -> None:
        """Send a sign of life, and name the ranks that are late."""
        if now >= self._next_pulse:
            self._next_pulse = now + self._config.heartbeat_s
            self._broadcast(messages.Pulse(self.statistics(now)), now)
            if self.aborted is None:
                self._observer.pulse(self.peers, self.statistics(now), self._ready, now)
        for check in (self._check_start, self._check_silence, self._check_remote, self._check_work):
            if self.aborted is None:
                check(now)

    def abort(self, rank: int, failure: str | Failure, now: float) -> None:
        """Make `rank`'s failure everyone's. Only the first call counts: later ones are consequences.

        Args:
            rank: -1 where none is to blame.
            failure: what the rank said itself, or, where it is taken for lost, why.
        """
        if self.aborted is None:
            failure = self.peers.blame(rank, Failure("lost", failure) if isinstance(failure, str) else failure)
            self._end(messages.Abort(replace(failure, traceback="")), now)
            self._observer.failed(failure)  # once all have been told: a disk may be slow, or full

    def statistics(self, now: float) -> messages.Statistics:
        return messages.Statistics() if self._scheduler is None else self._scheduler.statistics(now)

    def done(self, now: float) -> bool:
        """Whether every rank has left, or has had `heartbeat_s` seconds to leave after a failure."""
        if self.aborted is not None:
            return not self.peers.present or now - self._aborted_at > self._config.heartbeat_s
        return self._stopped and not self.peers.present

    def _apply(self, rank: int, message: messages.Message, now: float) -> None:
        match message:
            case messages.Released(item) if self._scheduler is not None and rank in self._draft_of:
                self._scheduler.on_released(item, self._draft_of[rank], now)
            case messages.Computed() if self.replicas is not None:
                self.replicas.computed(rank, message, now)
            case messages.Sent() if self.replicas is not None:
                deliver = self.replicas.sent(rank, message, now)
                if deliver is not None and self._scheduler is not None:
                    first = self._scheduler.pod(deliver.item) * (each := self._scheduler.pod_ranks)
                    self._broadcast(deliver, now, self._draft_ranks[first : first + each])
            case messages.Heartbeat(seconds, step, phase, trouble):
                peer = self.peers[rank]
                peer.phase, peer.phase_since, peer.step, peer.trouble = phase, now - seconds, step, trouble
            case messages.ClockProbe(asked):  # not `now`, which is that of a whole batch of messages
                self._send([rank], messages.encode(messages.ClockProbe(asked, time.time_ns())))
            case messages.Produced(report) if self.replicas is not None:
                self.replicas.produced(rank, report)
            case _ if self.replicas is not None and self.peers.is_remote(rank):
                self.replicas.apply(rank, message, now)
            case _:
                self._apply_own(rank, message, now)

    def _apply_own(self, rank: int, message: messages.Message, now: float) -> None:
        match message:
            case messages.Hello(version, pid):
                self._hello(rank, version, pid, now)
            case messages.Ready():
                self.peers[rank].ready = True
            case messages.Failed(failure):
                # A rank whose process is gone failed first: what the others then meet is a consequence.
                others = [other for other in self.peers.present if other != rank]
                self._broadcast(messages.Pulse(self.statistics(now)), now, others)
                self.abort(rank, failure, now)
            case messages.StopRequest(reason):
                self._stop_request(rank, reason, now)
            case messages.LastItem(item) if rank in self._draft_ranks[:1]:
                if self._scheduler is not None:
                    self._scheduler.stop_after(item)
                self._stopping = True
            case messages.RingAddress() if self.replicas is not None and rank in self._draft_of:
                self.replicas.publish(message)
            case messages.Goodbye():
                self.peers[rank].left = True
                if not self._stopped:
                    self.abort(rank, f"left before the end of the run; {self.peers.state(rank, now)}", now)
            case _:
                raise ProtocolError(f"{message} is not for the scheduler, or not from this rank")

    def _apply_late(self, rank: int, message: messages.Message) -> None:
        """After a failure: a rank that joins late gets it, and a rank that leaves is not waited for."""
        assert self.aborted is not None
        match message:
            case messages.Goodbye():
                self.peers[rank].left = True
            case messages.Hello(_, pid):
                self.peers[rank].join(pid)
                self._send([rank], messages.encode(self.aborted))
            case messages.Failed():
                logger.info("%s failed too: %s", self.peers.name(rank), message.failure.message)

    def _hello(self, rank: int, version: int, pid: int, now: float) -> None:
        earlier = self.peers[rank].join(pid)
        if version != messages.PROTOCOL_VERSION:
            text = f"speaks version {version} of the control protocol, rank 0 speaks {messages.PROTOCOL_VERSION}"
            self.abort(rank, f"{text}: install the same specdist on all hosts", now)
        elif earlier is not None:
            self.abort(rank, f"two processes say they are this rank: pid {earlier} and pid {pid}", now)

    def _stop_request(self, rank: int, reason: StopReason, now: float) -> None:
        if self._stop_requested:  # a signal reaches many ranks at once: the first speaks for all
            return
        self._stop_requested = True
        if not self._ready:
            message = f"stopped before the first step ({reason} on rank {rank})"
            self._end(messages.Abort(Failure("world", message), "dismissed"), now)
            self._observer.dismissed(rank, reason)
            return
        self._broadcast(messages.StopRequest(reason, rank), now)
        if self._scheduler is not None:  # the trainer needs no more than what has been delivered
            self._scheduler.stop_now()

    def _stop(self, now: float) -> None:
        """The work is done: let the ranks go. Replicas then report what they did to the first draft rank."""
        self._stopped = True
        self._broadcast(messages.Pulse(self.statistics(now)), now)
        self._broadcast(messages.Stop(), now, [rank for rank in self.peers.present if not self.peers.is_remote(rank)])
        if self._scheduler is not None and self._draft_ranks:
            self._report_by = now + self._scheduler.timeout
            assert self.replicas is not None
            self.replicas.stop(more=self._scheduler.cut_short)

    def _report(self, now: float) -> None:
        """Send the first draft rank what the replicas did, once all have reported or have had the time to."""
        if self._report_by is None or self.replicas is None or (self.replicas.working and now < self._report_by):
            return
        self._report_by = None
        self._broadcast(messages.Reports(tuple(self.replicas.reports)), now, self._draft_ranks[:1])

    def _end(self, message: messages.Abort, now: float) -> None:
        self.aborted, self._aborted_at = message, now
        unreachable = self._send(self.peers.present, messages.encode(message))
        if unreachable:
            logger.warning("the end could not be sent to ranks %s", unreachable)

    def _broadcast(self, message: messages.Message, now: float, ranks: Iterable[int] | None = None) -> None:
        """Encode once, send to `ranks` (default: all present ones); a rank that cannot be reached fails the run."""
        for rank in self._send(self.peers.present if ranks is None else ranks, messages.encode(message)):
            if self.replicas is not None and self.peers.is_remote(rank):
                self.replicas.lost(rank, now)
                continue
            peer = self.peers[rank]
            # Once the run has ended a rank that cannot be reached may just have left, its goodbye still unread.
            if not peer.left and (not self._stopped or peer.lost_at is not None):
                self.abort(rank, f"the connection to it is lost; {self.peers.state(rank, now)}", now)
            peer.lose(now)

    def _check_start(self, now: float) -> None:
        world_size = len(self.peers.hosts)
        if (late := self.peers.missing) and now > self._join_by:
            what = f"did not join the control plane in {self._join_timeout:.0f} s"
        elif (late := self.peers.unready) and now > self._ready_by and not self._stopped:
            what = f"not ready after {self._config.load_timeout_s:.0f} s (control.load_timeout_s)"
        else:
            return
        self.abort(late[0], self._known(f"{len(late)} of {world_size} ranks {what}", late, now), now)

    def _check_silence(self, now: float) -> None:
        silent = [r for r in self.peers.silent(now, self._config.silence_s) if not self.peers.is_remote(r)]
        if silent:
            limit = f"{self._config.silence_s:.0f} s (control.silence_s)"
            self.abort(silent[0], self._known(f"silent for more than {limit}", silent, now), now)

    def _check_remote(self, now: float) -> None:
        if self.replicas is None or not self._ready:
            return
        reason = self.replicas.tick(now)
        if reason is not None and not self._stopped:
            self.abort(-1, Failure("world", reason), now)

    def _check_work(self, now: float) -> None:
        """Blame a replica or draft ranks that have held an item for too long."""
        culprit = None if self._scheduler is None or self._stopped else self._scheduler.watch(now)
        if culprit is not None:
            ranks, what = self._accuse(culprit)
            self._fail(ranks[0], self._known(what, ranks, now), now)

    def _known(self, what: str, ranks: list[int], now: float) -> str:
        """What is wrong with `ranks`, and what is known of each."""
        one = f"; {self.peers.state(ranks[0], now)}"
        return what + (one if len(ranks) == 1 else f":\n{self.peers.describe_all(ranks, now)}")

    def _accuse(self, culprit: Culprit) -> tuple[list[int], str]:
        assert self._scheduler is not None
        assert self.replicas is not None
        held = f"batch {culprit.item} for {culprit.seconds:.0f} s (limit {self._scheduler.timeout:.0f} s)"
        if culprit.role == "target":
            replica = culprit.indices[0]
            return self.replicas.suspects(
                replica, culprit.item
            ), f"target replica {replica} has been {culprit.doing} {held}"
        ranks = [self._draft_ranks[draft] for draft in culprit.indices]
        others = f"{culprit.others} others have" if culprit.others else "no other has either"
        return ranks, f"has not released {held}; {others}"

    def _fail(self, rank: int, why: str, now: float) -> None:
        """Something is wrong with `rank`: the run fails, or does without it if it is one of another world."""
        if self.replicas is not None and self.peers.is_remote(rank):
            self.replicas.drop(rank, why, now)
        else:
            self.abort(rank, why, now)
