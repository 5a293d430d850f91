# SPDX-License-Identifier: Apache-2.0
"""What the scheduler knows of every rank: joined, ready, left, when last heard, and in which phase."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from specdist.core.topology import Topology

_UNKNOWN = ("target of another world", "?")

_NAMED = 4
"""So many ranks are named one by one in an error; 1,024 of them would hide what it says."""


@dataclass
class _Peer:
    joined: bool = False
    ready: bool = False
    left: bool = False
    pid: int = 0
    phase: str = ""
    phase_since: float = 0.0
    step: int = -1
    malformed: int = 0
    place: tuple[str, str] = _UNKNOWN
    """Role and host of a rank of another world."""


@dataclass(frozen=True)
class Phase:
    """What some ranks of a role are doing; numbers in it are written as N. `rank` is the one that does so for longest,
    on `host`, since `seconds`."""

    role: str
    what: str
    count: int
    rank: int
    host: str
    seconds: float


_NUMBER = re.compile(r"\d+")


class Peers:
    """The table of all ranks, kept by the server's thread. Times are in seconds of the caller's clock.

    Ranks of target worlds, which come and go, are numbered from the size of this one on, in the order of their coming.
    """

    def __init__(self, topology: Topology, now: float):
        self._topology = topology
        self._peers = [_Peer() for _ in topology.hosts]
        self._started = now
        self._heard = [now] * topology.world_size

    @property
    def present(self) -> list[int]:
        """Ranks that joined and have not left."""
        return [rank for rank, peer in enumerate(self._peers) if peer.joined and not peer.left]

    @property
    def missing(self) -> list[int]:
        return [rank for rank, peer in enumerate(self._own) if not peer.joined]

    @property
    def unready(self) -> list[int]:
        return [rank for rank, peer in enumerate(self._own) if not peer.ready]

    @property
    def _own(self) -> list[_Peer]:
        """The ranks of this world."""
        return self._peers[: self._topology.world_size]

    def is_guest(self, rank: int) -> bool:
        """Whether it is a rank of another world."""
        return rank >= self._topology.world_size

    def admit(self, now: float) -> int:
        """Make room for a rank of another world; returns its number."""
        self._peers.append(_Peer())
        self._heard.append(now)
        return len(self._peers) - 1

    def introduce(self, rank: int, role: str, host: str) -> None:
        """Say who a rank of another world is."""
        self._peers[rank].place = (role, host)

    @property
    def malformed(self) -> int:
        return sum(peer.malformed for peer in self._peers)

    def heard(self, rank: int, now: float) -> None:
        self._heard[rank] = now

    def join(self, rank: int, pid: int) -> int | None:
        """Note a rank's arrival; returns the process id of one that had joined as this rank before, else None."""
        peer = self._peers[rank]
        earlier = peer.pid if peer.joined else None
        peer.joined, peer.pid = True, pid
        return earlier

    def make_ready(self, rank: int) -> None:
        self._peers[rank].ready = True

    def leave(self, rank: int) -> None:
        self._peers[rank].left = True

    def has_left(self, rank: int) -> bool:
        return self._peers[rank].left

    def note_phase(self, rank: int, phase: str, since: float, step: int) -> None:
        self._peers[rank].phase, self._peers[rank].phase_since = phase, since
        self._peers[rank].step = step

    @property
    def step(self) -> int:
        """Optimizer steps done, as the ranks last told; -1 where none did."""
        return max(peer.step for peer in self._peers)

    def phase(self, rank: int) -> str:
        return self._peers[rank].phase

    def phases(self, now: float) -> list[Phase]:
        """What the ranks are doing, those that do the same taken together, the longest first."""
        groups: dict[tuple[str, str], list[int]] = {}
        for rank, peer in enumerate(self._peers):
            if not peer.left:
                what = _NUMBER.sub("N", peer.phase) or ("starting" if peer.joined else "not there yet")
                groups.setdefault((self.role(rank).split()[0], what), []).append(rank)
        found = []
        for (role, what), ranks in groups.items():
            slowest = min(ranks, key=lambda rank: self._peers[rank].phase_since or self._started)
            since = self._peers[slowest].phase_since or self._started
            exact = {self._peers[rank].phase for rank in ranks if self._peers[rank].phase}
            if len(exact) == 1:  # else they are at items of different numbers
                (what,) = exact
            found.append(Phase(role, what, len(ranks), slowest, self.host(slowest), now - since))
        return sorted(found, key=lambda phase: -phase.seconds)

    def count_malformed(self, rank: int) -> None:
        self._peers[rank].malformed += 1

    def silent(self, now: float, limit: float) -> list[int]:
        """Present ranks that were not heard for longer than `limit` seconds, the longest silent first."""
        late = [rank for rank in self.present if now - self._heard[rank] > limit]
        return sorted(late, key=lambda rank: self._heard[rank])

    @property
    def hosts(self) -> tuple[str, ...]:
        """The host of every rank."""
        return self._topology.hosts

    def role(self, rank: int) -> str:
        if self.is_guest(rank):
            return self._peers[rank].place[0]
        places = (self._topology.target_place(rank), self._topology.draft_place(rank))
        return " + ".join(str(place) for place in places if place is not None) or "idle"

    def host(self, rank: int) -> str:
        return self._peers[rank].place[1] if self.is_guest(rank) else self._topology.hosts[rank]

    def name(self, rank: int) -> str:
        """A rank as errors and logs name it."""
        return f"rank {rank} ({self.role(rank)}, host {self.host(rank)})"

    def state(self, rank: int, now: float) -> str:
        """What is known of a rank: when it was last heard, and in which phase since when."""
        peer = self._peers[rank]
        if not peer.joined:
            return f"never heard in {now - self._started:.0f} s"
        text = f"last heard {now - self._heard[rank]:.0f} s ago"
        if peer.phase:
            text += f", phase '{peer.phase}' for {now - peer.phase_since:.0f} s"
        if peer.malformed:
            text += f", {peer.malformed} of its messages were malformed"
        return f"{text}, pid {peer.pid}"

    def describe(self, rank: int, now: float) -> str:
        return f"{self.name(rank)} {self.state(rank, now)}"

    def describe_all(self, ranks: Iterable[int], now: float) -> str:
        """One rank per line, those in the rarest phase first: in a hang the odd one out is the suspect."""
        listed = list(ranks)
        phases = [self._peers[rank].phase for rank in listed]
        listed.sort(key=lambda rank: (phases.count(self._peers[rank].phase), -self._peers[rank].phase_since, rank))
        lines = [f"  {self.describe(rank, now)}" for rank in listed[:_NAMED]]
        if len(listed) > _NAMED:
            lines.append(f"  ... and {len(listed) - _NAMED} more")
        return "\n".join(lines)
