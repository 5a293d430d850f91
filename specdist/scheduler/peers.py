# SPDX-License-Identifier: Apache-2.0
"""What the scheduler knows of every rank: joined, ready, left, when it last sent something, and in which phase."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from specdist.core.attempts import Failure
from specdist.core.topology import Topology

_NAMED = 4
"""This many ranks are named one by one in an error; 1,024 of them would hide what it says."""
_NUMBER = re.compile(r"\d+")


@dataclass
class Peer:
    """A rank. Times are in seconds of the server's clock."""

    role: str
    host: str
    heard_at: float
    joined: bool = False
    ready: bool = False
    left: bool = False
    pid: int = 0
    phase: str = ""
    phase_since: float = 0.0
    step: int = -1
    """Optimizer steps done, as the rank last reported; -1 where it does not count them."""
    trouble: str = ""
    malformed: int = 0
    lost_at: float | None = None
    """Since when messages to it cannot be sent, and none has come from it."""

    @property
    def present(self) -> bool:
        return self.joined and not self.left

    def join(self, pid: int) -> int | None:
        """Note its arrival; returns the process id of one that had joined as this rank before, else None."""
        earlier = self.pid if self.joined else None
        self.joined, self.pid = True, pid
        return earlier

    def lose(self, now: float) -> None:
        self.lost_at = now if self.lost_at is None else self.lost_at


@dataclass(frozen=True)
class Phase:
    """What some ranks of a role are doing; `rank` on `host` does so for longest, since `seconds`."""

    role: str
    what: str
    count: int
    rank: int
    host: str
    seconds: float


class Peers:
    """The table of all ranks, kept by the server's thread.

    Ranks of target worlds, which come and go, are numbered from the size of this one on, in the order of their coming.
    """

    def __init__(self, topology: Topology, now: float):
        self.hosts = topology.hosts
        self.refused = 0
        """Connections without the run's secret that were not let in, or broken because of a forged frame, and messages
        that are no rank's."""
        self._started = now
        self._peers = [Peer(topology.role(rank), host, now) for rank, host in enumerate(topology.hosts)]

    def __getitem__(self, rank: int) -> Peer:
        return self._peers[rank]

    @property
    def present(self) -> list[int]:
        return [rank for rank, peer in enumerate(self._peers) if peer.present]

    @property
    def missing(self) -> list[int]:
        return [rank for rank, peer in enumerate(self._own) if not peer.joined]

    @property
    def unready(self) -> list[int]:
        return [rank for rank, peer in enumerate(self._own) if not peer.ready]

    @property
    def _own(self) -> list[Peer]:
        return self._peers[: len(self.hosts)]

    def is_remote(self, rank: int) -> bool:
        return rank >= len(self.hosts)

    def admit(self, now: float) -> int:
        """Make room for a rank of a target world; returns its number."""
        self._peers.append(Peer("target of another world", "?", now))
        return len(self._peers) - 1

    @property
    def places(self) -> tuple[tuple[str, str], ...]:
        """Role and host of every rank, in the order of the ranks."""
        return tuple((peer.role, peer.host) for peer in self._peers)

    @property
    def malformed(self) -> int:
        """Messages of ranks of this run that could not be decoded."""
        return sum(peer.malformed for peer in self._peers)

    @property
    def step(self) -> int:
        """Optimizer steps done; -1 where no rank counts them."""
        return max(peer.step for peer in self._peers)

    @property
    def trouble(self) -> str:
        """What a rank says is wrong with saving."""
        return next((peer.trouble for peer in self._peers if peer.trouble), "")

    def phases(self, now: float) -> list[Phase]:
        """What the ranks are doing, those that do the same taken together, the longest first."""
        groups: dict[tuple[str, str], list[int]] = {}
        for rank, peer in enumerate(self._peers):
            if not peer.left:
                what = _NUMBER.sub("N", peer.phase) or ("starting" if peer.joined else "not there yet")
                groups.setdefault((peer.role.split()[0], what), []).append(rank)
        found = []
        for (role, what), ranks in groups.items():  # they are at items of different numbers
            slowest = min(ranks, key=lambda rank: self._peers[rank].phase_since or self._started)
            peer = self._peers[slowest]
            seconds = now - (peer.phase_since or self._started)
            found.append(Phase(role, peer.phase or what, len(ranks), slowest, peer.host, seconds))
        return sorted(found, key=lambda phase: -phase.seconds)

    def blame(self, rank: int, failure: Failure) -> Failure:
        """`failure` as that of `rank` (-1: of none), with what is known of it."""
        failure = replace(failure, rank=rank, step=self.step)
        if rank < 0:
            return failure
        peer = self._peers[rank]
        pid = 0 if failure.exception else peer.pid
        return replace(failure, role=peer.role, host=peer.host, doing=peer.phase, pid=pid)

    def silent(self, now: float, limit: float) -> list[int]:
        """Present ranks that have sent nothing for longer than `limit` seconds, the longest silent first."""
        late = [rank for rank in self.present if now - self._peers[rank].heard_at > limit]
        return sorted(late, key=lambda rank: self._peers[rank].heard_at)

    def name(self, rank: int) -> str:
        return f"rank {rank} ({self._peers[rank].role}, host {self._peers[rank].host})"

    def state(self, rank: int, now: float) -> str:
        """What is known of a rank: when it last sent something, and in which phase since when."""
        peer = self._peers[rank]
        if not peer.joined:
            return f"has sent nothing in {now - self._started:.0f} s"
        text = f"last message {now - peer.heard_at:.0f} s ago"
        if peer.phase:
            text += f", phase '{peer.phase}' for {now - peer.phase_since:.0f} s"
        if peer.malformed:
            text += f", {peer.malformed} of its messages were malformed"
        return f"{text}, pid {peer.pid}"

    def describe_all(self, ranks: Iterable[int], now: float) -> str:
        """One rank per line, those in the rarest phase first: in a hang the odd one out is the suspect."""
        listed = list(ranks)
        phases = [self._peers[rank].phase for rank in listed]
        listed.sort(key=lambda rank: (phases.count(self._peers[rank].phase), -self._peers[rank].phase_since, rank))
        lines = [f"  {self.name(rank)} {self.state(rank, now)}" for rank in listed[:_NAMED]]
        if len(listed) > _NAMED:
            lines.append(f"  ... and {len(listed) - _NAMED} more")
        return "\n".join(lines)
