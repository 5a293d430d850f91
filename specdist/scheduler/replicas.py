# SPDX-License-Identifier: Apache-2.0
"""The target replicas: which ranks each has, and what those have said of the items that it was given."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from specdist.scheduler.messages import Deliver, ProducerReport
from specdist.scheduler.peers import Peers
from specdist.scheduler.scheduler import ProtocolError, Scheduler

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
    computed: dict[int, set[int]] = field(default_factory=dict)
    """The ranks that have computed an item which others have not."""
    delivered: int = 0
    done: set[int] = field(default_factory=set)
    """The ranks that write no more."""

    @property
    def members(self) -> list[int]:
        return list(self.ranks.values())


class Replicas:
    """The replicas of the scheduler's own world. In the server's thread, as the coordinator is."""

    def __init__(self, scheduler: Scheduler, peers: Peers, own: Iterable[tuple[int, ...]] = ()):
        self._scheduler, self._peers = scheduler, peers
        self._replicas: list[Replica] = []
        self._of: dict[int, Replica] = {}
        self.reports: list[ProducerReport] = []
        """What the first rank of each replica that has ended did."""
        for ranks in own:
            replica = Replica(len(self._replicas), len(ranks), dict(enumerate(ranks)))
            self._replicas.append(replica)
            self._of |= dict.fromkeys(ranks, replica)
            scheduler.add_replica(replica.number)

    def ranks(self, replica: int) -> list[int]:
        """The ranks of a replica, by their numbers here."""
        return self._replicas[replica].members

    def suspects(self, replica: int, item: int) -> list[int]:
        """The ranks of a replica, those that have not computed `item` first."""
        done = self._replicas[replica].computed.get(item, set())
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

    def computed(self, rank: int, item: int, now: float) -> Deliver | None:
        """`rank` has computed its share of `item`; returns the delivery once all ranks of its replica have.

        Raises:
            ProtocolError: it was not to compute that item now.
        """
        replica = self._replica(rank)
        if replica.state != "live":
            return None
        ranks = replica.computed.setdefault(item, set())
        ranks.add(rank)
        if len(ranks) < replica.size:
            return None
        del replica.computed[item]
        replica.delivered += 1
        return self._scheduler.on_computed(item, replica.number, now)

    def produced(self, rank: int, report: ProducerReport) -> bool:
        """All that `rank` has sent has arrived, and it sends nothing more; whether that ends its replica."""
        replica = self._replica(rank)
        if replica.ranks.get(0) == rank:
            self.reports.append(report)
        replica.done.add(rank)
        ends = len(replica.done) == replica.size and replica.state != "settled"
        if ends:
            self._settle(replica)
        return ends

    def _settle(self, replica: Replica) -> None:
        replica.state = "settled"
        self._scheduler.slots.clear(replica.number)

    def _replica(self, rank: int) -> Replica:
        if rank not in self._of:
            raise ProtocolError("it belongs to no target replica")
        return self._of[rank]
