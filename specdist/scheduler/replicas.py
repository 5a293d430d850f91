# SPDX-License-Identifier: Apache-2.0
"""The target replicas: which ranks each has, and what those have said of the items that it was given.

Those of the scheduler's own world are there from start to end. Those of target worlds join at any time, agree on the
terms of the run, and may leave or be lost. Such a replica is dropped at the first sign that it is gone: its connection
breaks, it is silent, it fails, it keeps an item for too long. What it had not delivered is computed by the others. It
may have been about to write, so the slots it was given stay out of use until it says that it writes no more, or its
connections have been gone for `drain_s` seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from specdist.core.attempts import Failure
from specdist.core.errors import say
from specdist.core.topology import Topology
from specdist.scheduler import messages
from specdist.scheduler.config import ControlConfig
from specdist.scheduler.peers import Peers
from specdist.scheduler.scheduler import ProtocolError, Scheduler

Send = Callable[[Iterable[int], bytes], list[int]]
"""Sends a payload to ranks, without blocking; returns the ranks that cannot be reached."""


State = Literal["joining", "live", "leaving", "dropped", "settled"]
"""joining: not all of its ranks are ready; live: it gets work; leaving: it finishes, and says so; dropped: it may still
write; settled: it writes no more. In one world all are live from the start."""


@dataclass
class Replica:
    """One replica of `size` ranks, `ranks` by tensor-parallel index."""

    number: int
    size: int
    ranks: dict[int, int]
    state: State = "live"
    said: dict[tuple[type[messages.Message], int], set[int]] = field(default_factory=dict)
    """The ranks that have computed, or sent, an item which others have not."""
    delivered: int = 0
    done: set[int] = field(default_factory=set)
    """The ranks that write no more."""

    @property
    def members(self) -> list[int]:
        return list(self.ranks.values())


@dataclass(frozen=True)
class RemoteRules:
    """What the draft world asks of target worlds.

    Attributes:
        terms: gives what they must know of the run by then, as `Welcome` carries it.
        drain_s: seconds after which nothing that a lost replica sent is on its way any more.
    """

    terms: Callable[[], str]
    drain_s: float


class Replicas:
    """All replicas. In the server's thread, as the coordinator is.

    Args:
        own: the scheduler's own world.
        rules: where target worlds may join; else None.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        peers: Peers,
        config: ControlConfig,
        send: Send,
        own: Topology,
        rules: RemoteRules | None,
    ):
        self._scheduler, self._peers, self._config, self._send, self._rules = scheduler, peers, config, send, rules
        self._replicas: list[Replica] = []
        self._of: dict[int, Replica] = {}
        self.reports: list[messages.ProducerReport] = []
        """What the first rank of each replica that has ended did."""
        self._by_name: dict[tuple[str, int], Replica] = {}
        self._rings: dict[int, bytes] = {}
        self._verdicts: dict[int, bytes] = {}
        """What is sent to the ranks of a dropped replica."""
        self._alone_since: float | None = None
        self._end: messages.Stop | None = None
        for ranks, pods in zip(own.replicas, own.reach, strict=True):
            replica = Replica(len(self._replicas), len(ranks), dict(enumerate(ranks)))
            self._replicas.append(replica)
            self._of |= dict.fromkeys(ranks, replica)
            scheduler.add_replica(replica.number, pods)

    def ranks(self, replica: int) -> list[int]:
        return self._replicas[replica].members

    def suspects(self, replica: int, item: int) -> list[int]:
        """The ranks of a replica, those that have not computed or sent `item` first."""
        said = self._replicas[replica].said
        done = said.get((messages.Computed, item)) or said.get((messages.Sent, item), set())
        return sorted(self.ranks(replica), key=done.__contains__)

    @property
    def working(self) -> bool:
        """Whether some replica has not ended yet, and ranks of it are there."""
        return any(
            self._peers[rank].present
            for replica in self._replicas
            if replica.state not in ("dropped", "settled")
            for rank in replica.members
        )

    def computed(self, rank: int, message: messages.Computed, now: float) -> None:
        """`rank` has computed an item; the scheduler is told once all ranks of its replica have. All find the same
        `agreed`. Raises ProtocolError: it was not to compute that item now."""
        replica = self._replica(rank)
        if self._all_said(replica, rank, message):
            item, tokens, seconds, agreed = message.item, message.tokens, message.seconds, message.agreed
            self._scheduler.on_computed(item, replica.number, now, agreed, tokens, seconds)

    def sent(self, rank: int, message: messages.Sent, now: float) -> messages.Deliver | None:
        """`rank` has sent its share of an item; returns the delivery once all ranks of its replica have. Raises
        ProtocolError: it was not to send that item."""
        replica = self._replica(rank)
        if not self._all_said(replica, rank, message):
            return None
        deliver = self._scheduler.on_sent(message.item, replica.number, now)
        replica.delivered += 1
        return deliver

    def _all_said(self, replica: Replica, rank: int, message: messages.Computed | messages.Sent) -> bool:
        if replica.state != "live":
            return False
        ranks = replica.said.setdefault((type(message), message.item), set())
        ranks.add(rank)
        if len(ranks) < replica.size:
            return False
        del replica.said[type(message), message.item]
        return True

    def produced(self, rank: int, report: messages.ProducerReport) -> None:
        """All that `rank` has sent has arrived, and it sends nothing more."""
        replica = self._replica(rank)
        if replica.ranks.get(0) == rank:
            self.reports.append(report)
        replica.done.add(rank)
        if len(replica.done) == replica.size and replica.state != "settled":
            self._settle(replica)
            if not self._scheduler.finished:
                say(f"{self._peers.name(rank)} has left after {replica.delivered} batches")

    def publish(self, ring: messages.RingAddress) -> None:
        self._rings[ring.draft] = messages.encode(ring)
        self._send([rank for rank in self._of if self._peers[rank].present], self._rings[ring.draft])

    def stop(self, more: bool) -> None:
        """The draft world ends: let target worlds finish and go. `more`: another start of it may follow."""
        if self._rules is None:
            return
        if self._scheduler.replicas:  # what these can do counts, not what others could that have left before
            self.reports.clear()
        self._end = messages.Stop(more)
        for replica in self._replicas:
            if replica.state in ("joining", "live"):
                self._dismiss(replica, self._end)

    def apply(self, rank: int, message: messages.Message, now: float) -> None:
        """Apply a message that a rank of the draft world does not send, or that means something else from one. Raises
        ProtocolError: the message is not one that it may send."""
        match message:
            case messages.Hello(version, pid, messages.RemotePlace() as place):
                self._join(rank, version, pid, place)
            case messages.Ready():
                self._ready(self._replica(rank), rank)
            case messages.StopRequest():
                replica = self._replica(rank)
                if replica.state in ("joining", "live"):
                    self._dismiss(replica, messages.Stop())
            case messages.Failed(failure):
                self.drop(rank, f"{failure.exception}: {failure.message}".removeprefix(": "), now)
            case messages.Goodbye():
                self._goodbye(self._replica(rank), rank, now)
            case _:
                raise ProtocolError(f"{type(message).__name__} is not for the scheduler")

    def lost(self, rank: int, now: float) -> None:
        self.drop(rank, "the connection to it is lost", now)
        self._peers[rank].lose(now)

    def drop(self, rank: int, why: str, now: float) -> None:
        """Do without the replica of `rank`; `why`: what is wrong with that rank."""
        replica = self._of.get(rank)
        if replica is None:
            self._peers[rank].left = True
            return
        if replica.state in ("dropped", "settled"):
            return
        items = self._take_back(replica)
        replica.state = "dropped"
        again = f"; computed again: batches {', '.join(map(str, items))}" if items else ""
        say(f"{self._peers.name(rank)} is dropped after {replica.delivered} batches: {why}{again}")
        blame = self._peers.blame(rank, Failure("lost", f"was dropped: {why}"))
        self._verdicts[replica.number] = messages.encode(messages.Abort(blame))
        self._leave(replica)
        self._chase(replica, now)

    def tick(self, now: float) -> str | None:
        """Look for who is silent and who is gone for good; returns why the run cannot go on, if there is no replica."""
        for rank in self._peers.silent(now, self._config.silence_s):
            if self._peers.is_remote(rank):
                self.drop(rank, f"silent for more than {self._config.silence_s:.0f} s (control.silence_s)", now)
        for replica in self._replicas:
            if replica.state == "dropped":
                self._chase(replica, now)
        return None if self._rules is None else self._why_alone(now)

    def _why_alone(self, now: float) -> str | None:
        limit = f"{self._config.replica_timeout_s:.0f} s (control.replica_timeout_s)"
        start = "start one with `specdist train CONFIG --role target`"
        if self._scheduler.replicas or self._scheduler.finished:
            self._alone_since = None
        elif self._alone_since is None:
            self._alone_since = now
            say(f"no target replica is there, waiting up to {limit}: {start}")
        elif now - self._alone_since > self._config.replica_timeout_s:
            return f"no target replica has been there for {limit}: {start}"
        return None

    def _join(self, rank: int, version: int, pid: int, place: messages.RemotePlace) -> None:
        assert self._rules is not None  # else no rank of a target world is admitted
        peer = self._peers[rank]
        if peer.join(pid) is not None:
            raise ProtocolError("it has joined before")
        if version != messages.PROTOCOL_VERSION:
            spoken = f"speaks version {version} of the control protocol, not {messages.PROTOCOL_VERSION}"
            self._refuse(rank, f"{spoken}: install the same specdist on both sides", "refused")
            return
        if self._end is not None and self._end.more:
            self._refuse(rank, "the draft world is about to leave")
            return
        key = (place.world, place.replica)
        if key not in self._by_name:
            self._by_name[key] = Replica(len(self._replicas), place.size, {}, "joining")
            self._replicas.append(self._by_name[key])
        replica = self._by_name[key]
        if replica.state != "joining" or place.tp in replica.ranks or not 0 <= place.tp < replica.size:
            self._refuse(rank, f"its replica has no place for tensor-parallel rank {place.tp} ({replica.state})")
            return
        replica.ranks[place.tp] = rank
        self._of[rank] = replica
        peer.role, peer.host = f"target replica {replica.number} tp {place.tp}", place.host
        for payload in (messages.encode(messages.Welcome(rank, self._rules.terms())), *self._rings.values()):
            self._send([rank], payload)
        if self._end is not None:
            self._dismiss(replica, self._end)

    def _refuse(self, rank: int, why: str, kind: Literal["failed", "refused"] = "failed") -> None:
        self._send([rank], messages.encode(messages.Abort(self._peers.blame(rank, Failure("world", why)), kind)))
        self._peers[rank].left = True

    def _ready(self, replica: Replica, rank: int) -> None:
        self._peers[rank].ready = True
        ready = sum(self._peers[member].ready for member in replica.members)
        if ready == replica.size and replica.state == "joining":
            replica.state = "live"
            self._scheduler.add_replica(replica.number)
            say(f"{self._peers.name(rank)} takes part")

    def _dismiss(self, replica: Replica, stop: messages.Stop) -> None:
        """Its ranks finish what they were given, and say when all that they wrote has arrived."""
        self._take_back(replica)
        if replica.state == "joining":  # it may be loading its model: nothing waits for it
            self._leave(replica)
        replica.state = "leaving"
        self._send(replica.members, messages.encode(stop))

    def _goodbye(self, replica: Replica, rank: int, now: float) -> None:
        self._peers[rank].left = True
        if rank not in replica.done:
            self.drop(rank, "it left", now)
        self._peers[rank].lose(now)

    def _leave(self, replica: Replica) -> None:
        for rank in replica.members:
            self._peers[rank].left = True

    def _take_back(self, replica: Replica) -> tuple[int, ...]:
        """Give it no more work; returns the items that others have to compute."""
        return self._scheduler.drop_replica(replica.number) if replica.state == "live" else ()

    def _chase(self, replica: Replica, now: float) -> None:
        """Tell the ranks of a dropped replica, until all of them have been out of reach for long enough."""
        peers = {rank: self._peers[rank] for rank in replica.members}
        reachable = [rank for rank, peer in peers.items() if peer.lost_at is None]
        for rank in self._send(reachable, self._verdicts[replica.number]):
            peers[rank].lose(now)
        assert self._rules is not None
        gone = [peer.lost_at for peer in peers.values() if peer.lost_at is not None]
        if len(gone) == len(peers) and now - max(gone) > self._rules.drain_s:
            self._settle(replica)

    def _settle(self, replica: Replica) -> None:
        replica.state = "settled"
        self._scheduler.settle_replica(replica.number)

    def _replica(self, rank: int) -> Replica:
        if rank not in self._of:
            raise ProtocolError("it belongs to no target replica")
        return self._of[rank]
