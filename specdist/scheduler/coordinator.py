# SPDX-License-Identifier: Apache-2.0
"""What rank 0 does with each control message: it moves the scheduler, and says what follows. No sockets, no clock.

`receive` applies one message, `advance` sends what became possible after a batch of them, and `tick`, about once a
second, looks for whoever is late. The first failure is broadcast and is the one that every rank raises.
"""

from __future__ import annotations

import logging
import typing
from collections.abc import Callable, Iterable

from specdist.core.attempts import Failure, Kind
from specdist.core.topology import Topology
from specdist.scheduler.config import ControlConfig
from specdist.scheduler.messages import (
    PROTOCOL_VERSION,
    Abort,
    Assign,
    Computed,
    DecodeError,
    Dismiss,
    Dispatch,
    Failed,
    Goodbye,
    Heartbeat,
    Hello,
    Join,
    LastItem,
    Message,
    Ready,
    Released,
    Ring,
    Start,
    Statistics,
    Stop,
    StopAt,
    StopRequest,
    StopRequested,
    decode,
    decode_released,
    encode,
)
from specdist.scheduler.peers import Peers
from specdist.scheduler.remote_replicas import GuestRules, Guests
from specdist.scheduler.scheduler import Culprit, ProtocolError, Scheduler

logger = logging.getLogger(__name__)


class Observer:
    """What the conductor lets the world outside know. This one keeps it to itself."""

    def failed(self, failure: Failure) -> None:
        """The run has failed; called once."""

    def dismissed(self, rank: int, reason: str) -> None:
        """`rank` was asked to stop before the run had begun; called once."""

    def tell(self, words: str) -> None:
        """Something that happened to a target world."""

    def pulse(self, peers: Peers, statistics: Statistics, started: bool, now: float) -> None:
        """Called every `control.heartbeat_s` seconds until the run's end."""

    def advanced(self, scheduler: Scheduler, now: float) -> None:
        """Called after every batch of messages once work is under way."""


Send = Callable[[Iterable[int], bytes], list[int]]
"""Sends a payload to ranks, without blocking; returns the ranks that cannot be reached."""


class Conductor:
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
        rules: GuestRules | None = None,
    ):
        self.peers = Peers(topology, now)
        self.aborted: Abort | Dismiss | None = None
        self._observer = observer or Observer()
        self._scheduler, self._topology, self._config, self._send = scheduler, topology, config, send
        self._draft_ranks = topology.draft_ranks
        self.guests: Guests | None = None
        if rules is not None:
            assert scheduler is not None
            self.guests = Guests(rules, scheduler, self.peers, topology.draft_ranks, config, send, self._observer.tell)
        self._draft_of = {rank: draft for draft, rank in enumerate(topology.draft_ranks)}
        self._join_by, self._ready_by = now + join_timeout_s, now + config.load_timeout_s
        self._join_timeout = join_timeout_s
        self._next_pulse = now
        self._joined = self._ready = self._stopping = self._stopped = False
        self._stop_requested: StopRequested | None = None
        self._unreachable: set[int] = set()
        self._aborted_at = 0.0

    def receive(self, rank: int, payload: bytes, now: float) -> None:
        """Apply one message of a rank."""
        self.peers.heard(rank, now)
        if self.aborted is not None:
            self._receive_late(rank, payload)
            return
        try:
            released = decode_released(payload)
            if released is not None:
                self._released(rank, *released, now)
            else:
                self._apply(rank, decode(payload), now)
        except DecodeError as error:
            self.peers.count_malformed(rank)
            logger.warning("dropped a malformed control message of %s: %s", self.peers.name(rank), error)
        except ProtocolError as error:
            self._fail(rank, f"sent what the control protocol does not allow: {error}", now)

    def admit(self, now: float) -> int:
        """A rank of another world has come; returns its number."""
        return self.peers.admit(now)

    def advance(self, now: float) -> None:
        """Dispatch what may be dispatched, and end the run once nothing is left."""
        if self.aborted is not None or self._stopped or not self._all_joined():
            return
        scheduler = self._scheduler
        if not self._ready and not self.peers.unready:
            self._ready = True
            self._broadcast(Start(), now)
        if scheduler is not None and self._ready:
            for dispatch in scheduler.next_dispatches(now):
                self._dispatch(dispatch, scheduler, now)
            self._observer.advanced(scheduler, now)
        if self._ready and (self._stopping if scheduler is None else scheduler.finished):
            self._stopped = True
            self._broadcast(self.statistics(now), now)
            self._broadcast(Stop(), now, [rank for rank in self.peers.present if not self.peers.is_guest(rank)])
            if self.guests is not None and scheduler is not None:
                self.guests.stop(more=scheduler.cut_short)

    def tick(self, now: float) -> None:
        """Send a sign of life, and name whoever is late."""
        if now >= self._next_pulse:
            self._next_pulse = now + self._config.heartbeat_s
            self._broadcast(self.statistics(now), now)
            if self.aborted is None:
                self._observer.pulse(self.peers, self.statistics(now), self._ready, now)
        if self.aborted is None:
            self._check_start(now)
        if self.aborted is None:
            self._check_silence(now)
        if self.aborted is None and self.guests is not None and self._ready:
            self._check_guests(self.guests, now)
        if self.aborted is None and self._scheduler is not None and not self._stopped:
            culprit = self._scheduler.watch(now)
            if culprit is not None:
                self._blame(culprit, now)

    def abort(self, rank: int, message: str, now: float, failed: Failed | None = None) -> None:
        """Make `rank`'s failure everyone's. Only the first call counts: later ones are consequences.

        Args:
            failed: what the rank said itself, if it could; else it is taken for lost.
        """
        if self.aborted is not None:
            return
        failed = failed or Failed("lost", "", message, "")
        peers, step = self.peers, self.peers.step
        place, doing = (("", ""), "") if rank < 0 else ((peers.role(rank), peers.host(rank)), peers.phase(rank))
        abort = Abort(rank, step, *place, failed.kind, failed.exception, message, doing)
        kind = typing.cast(Kind, failed.kind)
        self._observer.failed(  # before the others hear of it, who know less
            Failure(kind, message, rank, *place, step, doing, failed.exception, failed.traceback)
        )
        self._end(abort, now)

    def _end(self, message: Abort | Dismiss, now: float) -> None:
        self.aborted, self._aborted_at = message, now
        unreachable = self._send(self.peers.present, encode(message))
        if unreachable:
            logger.warning("ranks %s could not be told of the end", unreachable)

    def statistics(self, now: float) -> Statistics:
        return Statistics() if self._scheduler is None else self._scheduler.statistics(now)

    def done(self, now: float) -> bool:
        """Whether every rank has left, or has had `heartbeat_s` seconds to leave after a failure."""
        if self.aborted is not None:
            return not self.peers.present or now - self._aborted_at > self._config.heartbeat_s
        return self._stopped and not self.peers.present

    def _apply(self, rank: int, message: Message, now: float) -> None:
        if self.guests is not None and self.peers.is_guest(rank):
            self.guests.apply(rank, message, now)
            return
        match message:
            case Heartbeat(seconds, step, phase):
                self.peers.note_phase(rank, phase, now - seconds, step)
            case Computed(item, replica):
                self._computed(rank, item, replica, now)
            case Hello(version, pid):
                self._hello(rank, version, pid, now)
            case Ready():
                self.peers.make_ready(rank)
            case Failed(_, _, text, _):
                # A rank whose process is gone failed first: what the others then meet is a consequence.
                self._broadcast(self.statistics(now), now, [r for r in self.peers.present if r != rank])
                self.abort(rank, text, now, message)
            case StopRequest(reason):
                self._stop_request(rank, reason, now)
            case LastItem(item):
                self._last_item(rank, item, now)
            case Ring() if self.guests is not None:
                self.guests.publish(message)
            case Goodbye():
                self.peers.leave(rank)
                if not self._stopped:
                    self.abort(rank, f"left before the end of the run; {self.peers.state(rank, now)}", now)
            case _:
                raise ProtocolError(f"{type(message).__name__} is not for the scheduler")

    def _all_joined(self) -> bool:
        if not self._joined:
            self._joined = not self.peers.missing
        return self._joined

    def _receive_late(self, rank: int, payload: bytes) -> None:
        """After a failure only arrivals and departures matter: who comes late is told, who leaves is not waited for."""
        assert self.aborted is not None
        try:
            message = decode(payload)
        except DecodeError:
            self.peers.count_malformed(rank)
            return
        if isinstance(message, Goodbye):
            self.peers.leave(rank)
        elif isinstance(message, Hello | Join):
            self.peers.join(rank, message.pid)
            self._send([rank], encode(self.aborted))
        elif isinstance(message, Failed):
            logger.info("%s failed too: %s", self.peers.name(rank), message.message)

    def _hello(self, rank: int, version: int, pid: int, now: float) -> None:
        earlier = self.peers.join(rank, pid)
        if version != PROTOCOL_VERSION:
            text = f"speaks version {version} of the control protocol, rank 0 speaks {PROTOCOL_VERSION}"
            self.abort(rank, f"{text}: install the same specdist on all hosts", now)
        elif earlier is not None:
            self.abort(rank, f"two processes say they are this rank: pid {earlier} and pid {pid}", now)

    def _computed(self, rank: int, item: int, replica: int, now: float) -> None:
        replicas = self._topology.replicas
        if self._scheduler is None or not 0 <= replica < len(replicas) or replicas[replica][0] != rank:
            raise ProtocolError(f"Computed({item}, {replica}) does not come from the first rank of that replica")
        deliver = self._scheduler.on_computed(item, replica, now)
        if deliver is not None:
            self._broadcast(deliver, now, self._draft_ranks)

    def _released(self, rank: int, item: int, draft: int, now: float) -> None:
        if self._scheduler is None or self._draft_of.get(rank) != draft:
            raise ProtocolError(f"{Released(item, draft)} does not come from that draft rank")
        self._scheduler.on_released(item, draft, now)

    def _stop_request(self, rank: int, reason: str, now: float) -> None:
        if self._stop_requested is not None:  # a signal reaches many ranks at once: the first speaks for all
            return
        self._stop_requested = StopRequested(rank, reason)
        if not self._ready:
            self._end(Dismiss(rank, reason), now)
            self._observer.dismissed(rank, reason)
            return
        self._broadcast(self._stop_requested, now)
        if not self._draft_ranks and self._scheduler is not None:  # no trainer to decide where the run ends
            self._scheduler.stop_now()

    def _last_item(self, rank: int, item: int, now: float) -> None:
        if not self._draft_ranks or rank != self._draft_ranks[0]:
            raise ProtocolError(f"{LastItem(item)}: only the first draft rank decides where the run ends")
        if self._scheduler is not None:
            self._scheduler.stop_after(item)
        self._stopping = True
        self._broadcast(StopAt(item), now)

    def _broadcast(self, message: Message, now: float, ranks: Iterable[int] | None = None) -> None:
        """Encode once, send to `ranks` (default: all present ones); a rank that cannot be reached fails the run."""
        for rank in self._send(self.peers.present if ranks is None else ranks, encode(message)):
            if self.guests is not None and self.peers.is_guest(rank):
                self.guests.lost(rank, now)
                continue
            # Once the run has ended a rank that cannot be reached may just have left, its goodbye still unread.
            if not self.peers.has_left(rank) and (not self._stopped or rank in self._unreachable):
                self.abort(rank, f"the connection to it is lost; {self.peers.state(rank, now)}", now)
            self._unreachable.add(rank)

    def _check_start(self, now: float) -> None:
        late = self.peers.missing
        if late and now > self._join_by:
            listed = self.peers.describe_all(late, now)
            count = f"{len(late)} of {self._topology.world_size} ranks"
            self.abort(late[0], f"{count} did not join the control plane in {self._join_timeout:.0f} s:\n{listed}", now)
            return
        late = self.peers.unready
        if late and now > self._ready_by and not self._stopped:
            count = f"{len(late)} of {self._topology.world_size} ranks"
            limit = f"{self._config.load_timeout_s:.0f} s (control.load_timeout_s)"
            self.abort(late[0], f"{count} not ready after {limit}:\n{self.peers.describe_all(late, now)}", now)

    def _check_silence(self, now: float) -> None:
        silent = [r for r in self.peers.silent(now, self._config.silence_s) if not self.peers.is_guest(r)]
        if silent:
            limit = f"{self._config.silence_s:.0f} s (control.silence_s)"
            listed = self.peers.describe_all(silent, now)
            self.abort(silent[0], f"{len(silent)} ranks not heard for more than {limit}:\n{listed}", now)

    def _fail(self, rank: int, why: str, now: float) -> None:
        """Something is wrong with `rank`: the run fails, or does without it if it is one of another world."""
        if self.guests is not None and self.peers.is_guest(rank):
            self.guests.drop(rank, why, now)
        else:
            self.abort(rank, why, now)

    def _dispatch(self, dispatch: Dispatch, scheduler: Scheduler, now: float) -> None:
        if self.guests is None:
            self._broadcast(dispatch, now, self._topology.replicas[dispatch.replica])
            return
        assign = Assign(dispatch.item, dispatch.replica, scheduler.places[dispatch.item])
        self._broadcast(assign, now, self.guests.ranks(dispatch.replica))

    def _check_guests(self, guests: Guests, now: float) -> None:
        reason = guests.tick(now)
        if reason is not None and not self._stopped:
            self.abort(-1, reason, now, Failed("world", "", reason, ""))

    def _blame(self, culprit: Culprit, now: float) -> None:
        assert self._scheduler is not None
        held = f"item {culprit.item} for {culprit.seconds:.0f} s (limit {self._scheduler.timeout:.0f} s)"
        if culprit.role == "target":
            replica = culprit.indices[0]
            ranks = self._topology.replicas[replica] if self.guests is None else tuple(self.guests.ranks(replica))
            what = f"target replica {culprit.indices[0]} has been computing {held}"
        else:
            ranks = tuple(self._draft_ranks[d] for d in culprit.indices)
            others = "no other has either" if culprit.everyone else f"{len(self._draft_ranks) - len(ranks)} others have"
            what = f"has not released {held}; {others}"
        self._fail(ranks[0], f"{what}:\n{self.peers.describe_all(ranks, now)}", now)
