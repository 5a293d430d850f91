# SPDX-License-Identifier: Apache-2.0
"""Where the agents of a job's nodes meet before they start ranks: who is there, how many ranks each has, and on which
port of the leader torchrun's own rendezvous is.

torchrun alone waits for missing agents without saying which; and its port must be free on a host that nobody has asked.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from specdist.core.errors import WorldError

_MARGIN_S = 15.0
"""The leader publishes who is missing at its own deadline; the others wait so much longer for it."""
_READ_S = 5.0
"""How long the leader, which serves the store, stays for the others to read its verdict."""
_SLICE_S = 1.0
"""The store waits in C++, where no signal handler of ours runs; so it waits in slices."""


@dataclass(frozen=True)
class Node:
    """One node of a job, as its agent knows it."""

    number: int
    host: str
    ranks: int


@dataclass(frozen=True)
class Meeting:
    """All nodes of the job, in rank order, and the port of torchrun's rendezvous on the leader."""

    nodes: tuple[Node, ...]
    port: int

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
    """Meet the agents of the other nodes at the leader's (host, port).

    Args:
        count: how many nodes the job has; node 0 leads.
        expected: the names of all nodes in order, where the launcher knows them.
        check: called about once a second; what it raises ends the wait.

    Raises:
        WorldError: some did not come within `timeout_s` seconds; names them.
    """
    if count == 1:
        return Meeting((me,), free_port())
    store = _open(me, leader, timeout_s, check)
    try:
        store.set(f"node/{me.number}", json.dumps([me.host, me.ranks]))
        if me.number == 0:
            store.set("verdict", json.dumps(_count(store, count, timeout_s, expected, check)))
        if not _await(store, "verdict", time.monotonic() + timeout_s + _MARGIN_S, check):
            raise WorldError(f"node {me.number} ({me.host}): the leader at {_text(leader)} does not say who is there")
        verdict = json.loads(store.get("verdict"))
        store.set(f"read/{me.number}", "")
        if me.number == 0:
            _await_readers(store, count, check)
    except dist.DistError as error:
        raise WorldError(f"node {me.number} ({me.host}) lost the leader at {_text(leader)}: {error}") from error
    if "error" in verdict:
        raise WorldError(verdict["error"])
    nodes = tuple(Node(number, host, ranks) for number, (host, ranks) in enumerate(verdict["nodes"]))
    return Meeting(nodes, verdict["port"])


def free_port() -> int:
    """A TCP port that is free on this host now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _text(leader: tuple[str, int]) -> str:
    return f"{leader[0]}:{leader[1]}"


def _open(me: Node, leader: tuple[str, int], timeout_s: float, check: Callable[[], None]) -> dist.Store:
    where = f"node {me.number} ({me.host}): the meeting of the job's nodes at {_text(leader)}"
    if me.number == 0:
        try:
            return dist.TCPStore(*leader, is_master=True, wait_for_workers=False)
        except dist.DistError as error:
            raise WorldError(f"{where} cannot be opened here, is its port taken? {error}") from error
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        check()
        try:
            socket.create_connection(leader, timeout=_SLICE_S).close()
            return dist.TCPStore(*leader, is_master=False, timeout=timedelta(seconds=timeout_s))
        except OSError:  # nobody listens there yet, or the name is not known yet
            time.sleep(_SLICE_S / 4)
        except dist.DistError as error:
            raise WorldError(f"{where} does not speak our protocol: {error}") from error
    raise WorldError(
        f"{where} did not answer within {timeout_s:.0f} s (launch.meet_timeout_s): is the agent of node 0 running, and "
        "is the port open to the other nodes?"
    )


def _await(store: dist.Store, key: str, deadline: float, check: Callable[[], None]) -> bool:
    """Wait for a key until the deadline; whether it came."""
    while True:
        check()
        try:
            store.wait([key], timedelta(seconds=_SLICE_S))
            return True
        except dist.DistStoreError:
            if time.monotonic() > deadline:
                return False


def _count(
    store: dist.Store, count: int, timeout_s: float, expected: Sequence[str], check: Callable[[], None]
) -> dict[str, object]:
    deadline = time.monotonic() + timeout_s
    present: dict[int, tuple[str, int]] = {}
    for number in range(count):
        if _await(store, f"node/{number}", deadline, check):
            host, ranks = json.loads(store.get(f"node/{number}"))
            present[number] = (host, ranks)
    if len(present) == count:
        return {"nodes": [present[number] for number in range(count)], "port": free_port()}
    missing = [number for number in range(count) if number not in present]
    names = [expected[number] if expected else f"node {number}" for number in missing]
    there = ", ".join(host for host, _ in present.values())
    return {
        "error": f"{len(missing)} of {count} nodes did not come to the meeting within {timeout_s:.0f} s "
        f"(launch.meet_timeout_s): {', '.join(names)}. Present: {there}"
    }


def _await_readers(store: dist.Store, count: int, check: Callable[[], None]) -> None:
    """Serve the store, a little, until all present nodes have read the verdict."""
    deadline = time.monotonic() + _READ_S
    for number in range(1, count):
        if store.check([f"node/{number}"]):
            _await(store, f"read/{number}", deadline, check)
