# SPDX-License-Identifier: Apache-2.0
"""Target worlds on the scheduler's side: replicas that join, write into the rings, and are dropped when they are lost.

A replica is dropped at the first sign that it is gone: its connection breaks, it is silent, it fails, it keeps an item
for too long. What it had not delivered is computed by the others. It may have been about to write, so the slots it was
given stay out of use until it says that it writes no more, or its connections have been gone for `drain_s` seconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from specdist.scheduler.config import ControlConfig
from specdist.scheduler.messages import (
    PROTOCOL_VERSION,
    Abort,
    Arrived,
    Failed,
    Goodbye,
    Heartbeat,
    Join,
    Message,
    Produced,
    Ready,
    Ring,
    Stop,
    StopRequest,
    Welcome,
    Written,
    encode,
)
from specdist.scheduler.peers import Peers
from specdist.scheduler.scheduler import ProtocolError, Scheduler

Send = Callable[[Iterable[int], bytes], list[int]]


@dataclass(frozen=True)
class GuestRules:
    """What the draft world asks of target worlds.

    Attributes:
        terms: what they must know of the run, as `Welcome` tells it.
        drain_s: seconds after which nothing that a lost replica sent is on its way any more.
    """

    terms: str
    drain_s: float


State = Literal["joining", "live", "leaving", "dropped", "settled"]
"""joining: not all of its ranks are ready; live: it gets work; leaving: it finishes, and says so; dropped: it may still
write; settled: it writes no more."""


@dataclass
class _Replica:
    """A replica of a target world. `ranks`: by tensor-parallel index; `gone`: since when one cannot be reached."""

    number: int
    shares: int
    state: State = "joining"
    ranks: dict[int, int] = field(default_factory=dict)
    ready: set[int] = field(default_factory=set)
    written: Counter[int] = field(default_factory=Counter)
    done: set[int] = field(default_factory=set)
    gone: dict[int, float] = field(default_factory=dict)
    delivered: int = 0
    verdict: bytes = b""
    """What its ranks are told once it is dropped."""

    @property
    def members(self) -> list[int]:
        return list(self.ranks.values())


class Guests:
    """The replicas of all target worlds. Lives in the server's thread, as the conductor does.

    Args:
        tell: lets people know, in words, of what becomes of replicas.
    """

    def __init__(
        self,
        rules: GuestRules,
        scheduler: Scheduler,
        peers: Peers,
        draft_ranks: tuple[int, ...],
        config: ControlConfig,
        send: Send,
        tell: Callable[[str], None],
    ):
        self._rules, self._scheduler, self._peers, self._draft_ranks = rules, scheduler, peers, draft_ranks
        self._config, self._send, self._tell = config, send, tell
        self._replicas: list[_Replica] = []
        self._by_name: dict[tuple[str, int], _Replica] = {}
        self._of: dict[int, _Replica] = {}
        self._rings: dict[int, bytes] = {}
        self._alone_since: float | None = None
        self._end: Stop | None = None
        self.reports: list[Produced] = []
        """What the first rank of each replica that has left did."""

    def ranks(self, replica: int) -> list[int]:
        """The ranks of a replica, by their numbers here."""
        return self._replicas[replica].members

    def publish(self, ring: Ring) -> None:
        """The memory of a draft rank is there."""
        self._rings[ring.draft] = encode(ring)
        self._send(self._present, self._rings[ring.draft])

    def stop(self, more: bool) -> None:
        """The draft world ends: let everybody finish and go. `more`: another start of it may follow."""
        self._end = Stop(int(more))
        for replica in self._replicas:
            if replica.state in ("joining", "live"):
                self._dismiss(replica, self._end)

    def apply(self, rank: int, message: Message, now: float) -> None:
        """Apply a message of a rank of a target world.

        Raises:
            ProtocolError: the message is not one that it may send.
        """
        if isinstance(message, Join):
            self._join(rank, message)
            return
        replica = self._of.get(rank)
        if replica is None:
            raise ProtocolError(f"{type(message).__name__} does not come from a rank that has joined")
        replica.gone.pop(rank, None)
        match message:
            case Heartbeat(seconds, step, phase):
                self._peers.note_phase(rank, phase, now - seconds, step)
            case Ready():
                self._ready(replica, rank)
            case Written(item):
                self._written(replica, item, now)
            case Produced():
                self._produced(replica, rank, message)
            case StopRequest():
                if replica.state in ("joining", "live"):
                    self._dismiss(replica, Stop())
            case Failed(_, exception, text, _):
                self.drop(rank, f"{exception}: {text}" if exception else text, now)
            case Goodbye():
                self._goodbye(replica, rank, now)
            case _:
                raise ProtocolError(f"{type(message).__name__} is not for the scheduler")

    def lost(self, rank: int, now: float) -> None:
        """A message to `rank` could not be sent."""
        self.drop(rank, "the connection to it is lost", now)
        if rank in self._of:
            self._of[rank].gone.setdefault(rank, now)

    def drop(self, rank: int, why: str, now: float) -> None:
        """Do without the replica of `rank`; `why`: what is wrong with that rank."""
        replica = self._of.get(rank)
        if replica is None:
            self._peers.leave(rank)
            return
        if replica.state in ("dropped", "settled"):
            return
        items = self._take_back(replica)
        replica.state = "dropped"
        again = f"; computed again: items {', '.join(map(str, items))}" if items else ""
        self._tell(f"{self._peers.name(rank)} is dropped after {replica.delivered} items: {why}{again}")
        replica.verdict = self._abort(rank, "lost", f"was dropped: {why}")
        for member in replica.members:
            self._peers.leave(member)
        self._chase(replica, now)

    def tick(self, now: float) -> str | None:
        """Look for who is silent and who is gone for good; returns why the run cannot go on, if there is no replica."""
        for rank in self._peers.silent(now, self._config.silence_s):
            if self._peers.is_guest(rank):
                self.drop(rank, f"not heard for more than {self._config.silence_s:.0f} s (control.silence_s)", now)
        for replica in self._replicas:
            if replica.state == "dropped":
                self._chase(replica, now)
        return self._why_alone(now)

    def _why_alone(self, now: float) -> str | None:
        limit = f"{self._config.replica_timeout_s:.0f} s (control.replica_timeout_s)"
        start = "start one with `specdist train CONFIG --role target`"
        if self._scheduler.replicas or self._scheduler.finished:
            self._alone_since = None
        elif self._alone_since is None:
            self._alone_since = now
            self._tell(f"no target replica is there, waiting up to {limit}: {start}")
        elif now - self._alone_since > self._config.replica_timeout_s:
            return f"no target replica has been there for {limit}: {start}"
        return None

    @property
    def _present(self) -> list[int]:
        return [rank for rank in self._of if not self._peers.has_left(rank)]

    def _join(self, rank: int, join: Join) -> None:
        if self._peers.join(rank, join.pid) is not None:
            raise ProtocolError("it has joined before")
        if join.version != PROTOCOL_VERSION:
            spoken = f"speaks version {join.version} of the control protocol, not {PROTOCOL_VERSION}"
            self._refuse(rank, "refused", f"{spoken}: install the same specdist on both sides")
            return
        if self._end is not None and self._end.more:
            self._refuse(rank, "world", "the draft world is about to leave")
            return
        key = (join.world, join.replica)
        if key not in self._by_name:
            self._by_name[key] = _Replica(len(self._replicas), join.shares)
            self._replicas.append(self._by_name[key])
        replica = self._by_name[key]
        if replica.state != "joining" or join.tp in replica.ranks or not 0 <= join.tp < replica.shares:
            what = f"no place for tensor-parallel rank {join.tp} in its replica ({replica.state})"
            self._refuse(rank, "world", f"there is {what}")
            return
        replica.ranks[join.tp] = rank
        self._of[rank] = replica
        self._peers.introduce(rank, f"target replica {replica.number} tp {join.tp}", join.host)
        self._send([rank], encode(Welcome(rank, self._rules.terms)))
        for ring in self._rings.values():
            self._send([rank], ring)
        if self._end is not None:
            self._dismiss(replica, self._end)

    def _refuse(self, rank: int, kind: str, why: str) -> None:
        self._send([rank], self._abort(rank, kind, why))
        self._peers.leave(rank)

    def _abort(self, rank: int, kind: str, why: str) -> bytes:
        place = (self._peers.role(rank), self._peers.host(rank))
        return encode(Abort(rank, self._peers.step, *place, kind, "", why, self._peers.phase(rank)))

    def _ready(self, replica: _Replica, rank: int) -> None:
        self._peers.make_ready(rank)
        replica.ready.add(rank)
        if len(replica.ready) == replica.shares and replica.state == "joining":
            replica.state = "live"
            self._scheduler.add_replica(replica.number)
            self._tell(f"{self._peers.name(rank)} takes part")

    def _written(self, replica: _Replica, item: int, now: float) -> None:
        if replica.state != "live":
            return
        replica.written[item] += 1
        if replica.written[item] < replica.shares:
            return
        del replica.written[item]
        self._scheduler.on_computed(item, replica.number, now)
        replica.delivered += 1
        slot = self._scheduler.places[item]
        self._send(self._draft_ranks, encode(Arrived(item, replica.number, slot, replica.shares)))

    def _dismiss(self, replica: _Replica, stop: Stop) -> None:
        """Its ranks finish what they were given, and say when all that they wrote has arrived."""
        self._take_back(replica)
        if replica.state == "joining":  # it may be loading its model: nobody waits for it
            for rank in replica.members:
                self._peers.leave(rank)
        replica.state = "leaving"
        self._send(replica.members, encode(stop))

    def _produced(self, replica: _Replica, rank: int, message: Produced) -> None:
        if replica.ranks[0] == rank:
            self.reports.append(message)
        replica.done.add(rank)
        if len(replica.done) == replica.shares and replica.state != "settled":
            replica.state = "settled"
            self._scheduler.places.clear(replica.number)
            if not self._scheduler.finished:
                self._tell(f"{self._peers.name(rank)} has left after {replica.delivered} items")

    def _goodbye(self, replica: _Replica, rank: int, now: float) -> None:
        self._peers.leave(rank)
        if rank not in replica.done:
            self.drop(rank, "it left", now)
        replica.gone.setdefault(rank, now)

    def _take_back(self, replica: _Replica) -> tuple[int, ...]:
        """Give it no more work; returns the items that others have to compute."""
        return self._scheduler.drop_replica(replica.number) if replica.state == "live" else ()

    def _chase(self, replica: _Replica, now: float) -> None:
        """Tell the ranks of a dropped replica, until all of them have been out of reach for long enough."""
        for rank in self._send([r for r in replica.members if r not in replica.gone], replica.verdict):
            replica.gone[rank] = now
        if len(replica.gone) == len(replica.ranks) and now - max(replica.gone.values()) > self._rules.drain_s:
            replica.state = "settled"
            self._scheduler.places.clear(replica.number)
