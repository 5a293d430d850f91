# SPDX-License-Identifier: Apache-2.0
"""One roll call for the agents of a job's nodes and for the ranks of a world: all learn who is there or missing.
torchrun alone waits for missing members without naming them."""

import errno
import ipaddress
import json
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from specdist.core.errors import ConfigError, WorldError, first_line

_MARGIN_S = 15.0
"""The leader publishes who is missing at its own deadline; the others wait this much longer for it to arrive."""
_READ_S = 5.0
"""How long the leader, which may serve the store, stays until the others have read what it published."""
_BACKLOG = 4096
"""All ranks may connect at once."""
_POLL_S = 0.1
"""Between two looks at the store. Its own wait is in C++, where no signal handler of ours runs."""


@dataclass(frozen=True)
class RollCall:
    """One member's part in a roll call; member 0 leads.

    Attributes:
        count: how many members there are.
        name: this member, as errors name it.
        leader: member 0, as errors name it.
        key: the configuration key of `timeout_s`.
        check: called while waiting; what it raises ends the wait.
    """

    number: int
    count: int
    name: str
    leader: str
    timeout_s: float
    key: str
    check: Callable[[], None] = lambda: None

    def open_store(self, address: tuple[str, int]) -> dist.TCPStore:
        """Serve the store of the roll call at `address`, or connect to it. Raises ConfigError: its host is not known
        here. WorldError: its port is taken on the leader, or the others do not reach it in time."""
        where = f"{address[0]}:{address[1]}"
        if self.number == 0:
            try:
                return serve_store(address, self.timeout_s)
            except (OSError, dist.DistError) as error:
                raise WorldError(f"{self.name} cannot open {where}, is its port taken? {first_line(error)}") from error
        deadline = time.monotonic() + self.timeout_s
        last: Exception = OSError()
        while time.monotonic() < deadline:
            self.check()
            try:
                socket.create_connection(address, timeout=1.0).close()
                return dist.TCPStore(*address, is_master=False, timeout=timedelta(seconds=self.timeout_s))
            except (OSError, dist.DistError) as error:  # not listening yet, no such name yet, another protocol
                last = error
                time.sleep(_POLL_S)
        if isinstance(last, socket.gaierror):  # no other start would know it
            raise ConfigError(f"{self.name} does not know the host {address[0]} ({last}): name it as all hosts know it")
        raise WorldError(
            f"{self.name} did not reach the rendezvous at {where} within {self.timeout_s:.0f} s ({self.key}): is "
            f"{self.leader} running, and is the port open to the other hosts? {first_line(last)}"
        )

    def answer(
        self,
        store: dist.Store,
        entry: object,
        missing: Callable[[Mapping[int, Any]], str],
        extra: Callable[[], object] = lambda: None,
    ) -> tuple[list[Any], Any]:
        """Report `entry`, as JSON, and wait for the others; linear in their number. Returns the entries of all members
        in order, and the leader's `extra`. Raises WorldError: the text of `missing`, the same on all members; or the
        leader has no answer. `missing`: makes the error from the entries of those that are there. `extra`: what the
        leader adds once all are there."""
        try:
            store.set(f"here/{self.number}", json.dumps(entry))
            if self.number == 0:
                store.set("verdict", json.dumps(self._count(store, missing, extra)))
            limit = self.timeout_s + _MARGIN_S
            if not self._await(store, "verdict", time.monotonic() + limit):
                raise WorldError(f"{self.name} got no answer to its roll call from {self.leader} within {limit:.0f} s")
            verdict = json.loads(store.get("verdict"))
            store.set(f"read/{self.number}", "")
            if self.number == 0:
                self._await_readers(store)
        except dist.DistError as error:
            raise WorldError(
                f"{self.name} lost {self.leader} at the roll call: look at its log first. {first_line(error)}"
            ) from error
        if "error" in verdict:
            raise WorldError(verdict["error"])
        return verdict["entries"], verdict["extra"]

    def _await(self, store: dist.Store, key: str, deadline: float) -> bool:
        """Wait for a key until the deadline; whether it came."""
        while not store.check([key]):
            self.check()
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        return True

    def _count(
        self, store: dist.Store, missing: Callable[[Mapping[int, Any]], str], extra: Callable[[], object]
    ) -> dict[str, object]:
        deadline = time.monotonic() + self.timeout_s
        present = {
            number: json.loads(store.get(f"here/{number}"))
            for number in range(self.count)
            if self._await(store, f"here/{number}", deadline)
        }
        if len(present) < self.count:
            return {"error": missing(present)}
        return {"entries": list(present.values()), "extra": extra()}

    def _await_readers(self, store: dist.Store) -> None:
        deadline = time.monotonic() + _READ_S
        for number in range(1, self.count):
            if store.check([f"here/{number}"]):
                self._await(store, f"read/{number}", deadline)


@dataclass(frozen=True)
class Node:
    number: int
    host: str
    ranks: int


@dataclass(frozen=True)
class Meeting:
    """All nodes of the job, in rank order, and the store that the leader serves, for the ranks too."""

    nodes: tuple[Node, ...]
    store: dist.TCPStore = field(compare=False)

    @property
    def ranks(self) -> int:
        return sum(node.ranks for node in self.nodes)


def meet(
    me: Node,
    count: int,
    leader: tuple[str, int],
    timeout_s: float,
    expected: Sequence[str] = (),
    check: Callable[[], None] = lambda: None,
) -> Meeting:
    """Meet the agents of the other nodes at the leader's (host, port), before any rank begins; where there are none any
    port will do. Raises WorldError: some did not come within `timeout_s` seconds; names them.

    Args:
        count: how many nodes the job has; node 0 leads.
        expected: the names of all nodes in order, where the launcher knows them.
        check: called while waiting; what it raises ends the wait.
    """
    key = "launch.meet_timeout_s"
    call = RollCall(me.number, count, f"node {me.number} ({me.host})", "the agent of node 0", timeout_s, key, check)

    def missing(present: Mapping[int, Any]) -> str:
        absent = [expected[n] if expected else f"node {n}" for n in range(count) if n not in present]
        return (
            f"{len(absent)} of {count} nodes did not come to the meeting within {timeout_s:.0f} s ({key}): "
            f"{', '.join(absent)}. Present: {', '.join(host for host, _ in present.values())}"
        )

    store = call.open_store(leader if count > 1 else (leader[0], 0))
    entries, _ = call.answer(store, [me.host, me.ranks], missing)
    return Meeting(tuple(Node(number, host, ranks) for number, (host, ranks) in enumerate(entries)), store)


def serve_store(address: tuple[str, int], timeout_s: float) -> dist.TCPStore:
    """A store that listens on the address by which the others know this host: torch alone would listen on all. Port 0:
    on a free one. Raises OSError, DistError: the port is taken."""
    found = _listener(address)
    return dist.TCPStore(
        address[0],
        address[1] if found is None else found.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=None if found is None else found.detach(),
    )


def _listener(address: tuple[str, int]) -> socket.socket | None:
    """None: the address is none of this host (of a gateway, say), or of this host alone (127.0.1.1 for its name)."""
    try:
        family, _, _, _, place = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]
        if ipaddress.ip_address(place[0]).is_loopback and address[0] not in ("localhost", place[0]):
            return None
        return socket.create_server(place[:2], family=family, backlog=_BACKLOG)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise
        return None


def free_port() -> int:
    """A TCP port that is free on this host now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
