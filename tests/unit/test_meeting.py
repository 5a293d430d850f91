# SPDX-License-Identifier: Apache-2.0
"""The agents of a job's nodes meet, and name those that do not come."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Sequence

import psutil
import pytest
import torch.distributed as dist

from specdist.core.errors import ConfigError, Dismissed, UserError, WorldError
from specdist.core.launch_env import interface_towards
from specdist.world.roll_call import Meeting, Node, RollCall, meet, serve_store
from tests.ports import reserve_port

HOSTS = ("a", "b", "c")


def meet_all(present: Sequence[int], timeout_s: float, delay_s: float = 0.0) -> dict[int, Meeting | UserError]:
    """Let the agents of `present` nodes meet, each in a thread; the leader comes `delay_s` later than the others."""
    leader, found = ("127.0.0.1", reserve_port()), dict[int, Meeting | UserError]()

    def agent(number: int) -> None:
        if number == 0:
            time.sleep(delay_s)
        try:
            found[number] = meet(Node(number, HOSTS[number], number + 1), len(HOSTS), leader, timeout_s, HOSTS)
        except UserError as error:
            found[number] = error

    threads = [threading.Thread(target=agent, args=(number,)) for number in present]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_all_learn_of_all_nodes_in_order_whoever_comes_first() -> None:
    found = meet_all((0, 1, 2), 60.0, delay_s=1.0)
    meeting = found[0]
    assert isinstance(meeting, Meeting)
    assert meeting.nodes == (Node(0, "a", 1), Node(1, "b", 2), Node(2, "c", 3))
    assert meeting.ranks == 6
    assert found == {0: meeting, 1: meeting, 2: meeting}
    meeting.store.set("of", "all")
    assert [other.store.get("of") for other in found.values() if isinstance(other, Meeting)] == [b"all"] * 3


def test_everyone_learns_who_is_missing() -> None:
    found = meet_all((0, 2), 3.0)
    for number in (0, 2):
        error = found[number]
        assert isinstance(error, WorldError)
        assert "1 of 3 nodes did not come to the meeting within 3 s (launch.meet_timeout_s): b. Present: a, c" in str(
            error
        )


def test_the_leader_waits_in_its_store_no_longer_than_the_others() -> None:
    call = RollCall(0, 2, "rank 0", "rank 0", 7.0, "world.join_timeout_s")
    assert call.open_store(("127.0.0.1", reserve_port())).timeout.total_seconds() == 7.0


def test_without_a_leader_the_wait_is_bounded() -> None:
    error = meet_all((1,), 2.0)[1]
    assert isinstance(error, WorldError)
    assert "node 1 (b) did not reach the rendezvous at 127.0.0.1:" in str(error)
    assert "within 2 s (launch.meet_timeout_s)" in str(error)


def test_a_leader_whose_name_is_unknown_is_no_reason_for_another_start() -> None:
    with pytest.raises(ConfigError, match=r"node 1 \(b\) does not know the host no\.such\.host\.invalid"):
        meet(Node(1, "b", 1), 2, ("no.such.host.invalid", 1), 0.5)


def test_one_node_meets_nobody() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        meeting = meet(Node(0, "a", 4), 1, taken.getsockname(), 0.1)
    assert meeting.ranks == 4
    assert dist.TCPStore("127.0.0.1", meeting.store.port, is_master=False).num_keys() > 0


@pytest.mark.parametrize("number", [0, 1])
def test_a_stop_ends_the_wait(number: int) -> None:
    began = time.monotonic()

    def check() -> None:
        if time.monotonic() - began > 0.5:
            raise Dismissed("SIGTERM")

    with pytest.raises(Dismissed):
        meet(Node(number, "a", 1), 2, ("127.0.0.1", reserve_port()), 120.0, check=check)
    assert time.monotonic() - began < 30.0


def test_this_host_needs_no_interface() -> None:
    assert interface_towards("127.0.0.1", 1) is None


@pytest.mark.parametrize("given", [False, True])
def test_a_store_listens_on_one_address_only(given: bool) -> None:
    port = reserve_port() if given else 0  # not a parameter: each worker of the tests would have another
    store = serve_store(("127.0.0.1", port), 20.0)
    assert store.port == port or port == 0
    listening = [c.laddr for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert [where.ip for where in listening if where.port == store.port] == ["127.0.0.1"]
    store.set("a", "b")
    with pytest.raises(OSError, match="in use"):
        serve_store(("127.0.0.1", store.port), 20.0)
