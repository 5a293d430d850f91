# SPDX-License-Identifier: Apache-2.0
"""What `specdist launch ray` decides without a cluster; tests/ray has one."""

from __future__ import annotations

import signal
import socket
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import pytest

from specdist.core.errors import ConfigError, UserError
from specdist_launch import cli
from specdist_launch.agents import supervise
from specdist_launch.ray import cluster
from specdist_launch.ray.agents import HostAgent, agent_environment, examine_host, host_names, run_agent
from specdist_launch.ray.cluster import (
    GpuHost,
    Shape,
    choose_shape,
    cluster_address,
    describe_cluster,
    in_order,
)
from specdist_launch.ray.launch import read_environment
from specdist_launch.verdict import AGAIN


def host(address: str, gpus: int = 8, name: str = "") -> GpuHost:
    return GpuHost(f"id-{address}", address, name or f"host-{address}", gpus)


CLUSTER = [host("10.0.0.1"), host("10.0.0.2"), host("10.0.0.3", gpus=4)]


@pytest.mark.parametrize(
    ("option", "environment", "found"),
    [
        ("a:1", {"RAY_ADDRESS": "b:2", "FQ_RAY_IP": "c"}, "a:1"),
        (None, {"RAY_ADDRESS": "b:2", "FQ_RAY_IP": "c"}, "b:2"),
        (None, {"FQ_RAY_IP": "head.ns.svc.cluster.local"}, "head.ns.svc.cluster.local:6379"),
        (None, {"FQ_RAY_IP": "head", "RAY_PORT": "6380"}, "head:6380"),
        ("[::1]:6379", {}, "[::1]:6379"),
    ],
)
def test_the_nearest_address_counts(option, environment, found):
    assert cluster_address(option, environment) == found


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("", "none is joined by accident"),
        ("auto", "HOST:PORT (its head's, mostly port 6379), not 'auto'"),
        ("head", "not 'head'"),
        ("local", "not 'local'"),
        ("head:", "not 'head:'"),
        ("ray://svc:10001", "ray job submit --address http://svc:8265 -- specdist launch ray"),
    ],
)
def test_other_addresses_are_refused(address, said):
    with pytest.raises(UserError) as error:
        cluster_address(None, {"RAY_ADDRESS": address})
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_hosts_are_ordered_by_address_as_numbers():
    hosts = [host("10.0.0.10"), host("fd00::1"), host("10.0.0.9"), host("9.255.0.1"), host("head")]
    assert [h.address for h in in_order(hosts)] == ["head", "9.255.0.1", "10.0.0.9", "10.0.0.10", "fd00::1"]


@pytest.mark.parametrize(
    ("ranks", "hosts", "gpus", "shape"),
    [
        (8, None, None, Shape(1, 8)),
        (3, None, None, Shape(1, 3)),
        (12, None, None, Shape(2, 6)),
        (16, None, None, Shape(2, 8)),
        (18, None, None, Shape(3, 6)),
        (16, 4, None, Shape(4, 4)),
        (16, None, 4, Shape(4, 4)),
        (16, 2, 8, Shape(2, 8)),
        (None, None, None, Shape(2, 8)),
        (None, None, 4, Shape(3, 4)),
        (None, 1, None, Shape(1, 8)),
        (None, 5, 2, Shape(5, 2)),
    ],
)
def test_the_shape_follows_from_what_is_given(ranks, hosts, gpus, shape):
    assert choose_shape(ranks, hosts, gpus, CLUSTER) == shape


@pytest.mark.parametrize(
    ("ranks", "hosts", "gpus", "said"),
    [
        (12, 2, 8, "2 x 8 GPUs are not the job's 12 ranks"),
        (12, 5, None, "5 x 2 GPUs are not the job's 12 ranks"),
        (12, None, 8, "1 x 8 GPUs are not the job's 12 ranks"),
        (2, 4, None, "4 x 1 GPUs are not the job's 2 ranks"),
    ],
)
def test_a_shape_that_does_not_come_out_shows_its_arithmetic(ranks, hosts, gpus, said):
    with pytest.raises(ConfigError, match=said):
        choose_shape(ranks, hosts, gpus, CLUSTER)


def test_an_empty_cluster_needs_a_shape():
    with pytest.raises(ConfigError, match="no GPU host yet"):
        choose_shape(8, None, None, [])
    assert choose_shape(8, 2, None, []) == Shape(2, 4)


def test_a_shortage_counts_gpus_hosts_and_what_is_taken():
    assert describe_cluster(Shape(2, 8), [CLUSTER[0], CLUSTER[2]], free=12.0) == (
        "have 12 of 16 GPUs, hosts 10.0.0.1 (8), 10.0.0.3 (4)"
    )
    assert describe_cluster(Shape(2, 8), CLUSTER[:2], free=8.0).endswith(", 8 of them taken by others")
    assert "hosts none" in describe_cluster(Shape(1, 1), [], free=0.0)


def test_an_agents_environment():
    ray = {"CUDA_VISIBLE_DEVICES": "10,2,0", "OMP_NUM_THREADS": "1", "PATH": "/bin"}
    assert agent_environment(ray, {"NCCL_DEBUG": "INFO"}) == {
        "CUDA_VISIBLE_DEVICES": "0,2,10",
        "PATH": "/bin",
        "NCCL_DEBUG": "INFO",
    }
    assert agent_environment(ray, {"OMP_NUM_THREADS": "4"})["OMP_NUM_THREADS"] == "4"
    for devices in ("GPU-b,GPU-a", ""):
        assert agent_environment({"CUDA_VISIBLE_DEVICES": devices}, {})["CUDA_VISIBLE_DEVICES"] == devices


def test_variables_are_given_or_taken_from_here(monkeypatch):
    monkeypatch.setenv("HERE", "x=y")
    assert read_environment(["HERE", "THERE=a=b", "EMPTY="]) == {"HERE": "x=y", "THERE": "a=b", "EMPTY": ""}
    with pytest.raises(UserError, match="MISSING is not set here"):
        read_environment(["MISSING"])


def test_hosts_are_called_by_name_unless_two_have_the_same():
    first, second = host("10.0.0.1", name="a"), host("10.0.0.2", name="b")
    assert host_names([first, second]) == ["a", "b"]
    assert host_names([first, second, first]) == ["10.0.0.1", "10.0.0.2", "10.0.0.1"]


@pytest.fixture
def agents(monkeypatch, tmp_path):
    """Stands in for Ray: `remote` tasks are threads of this process, and agents a program of the test's."""
    program = tmp_path / "python"
    monkeypatch.setattr(sys, "executable", str(program))

    def start(*lines: str) -> HostAgent:
        program.write_text("\n".join(["#!/bin/bash", *lines]))
        program.chmod(0o755)
        start = partial(executor.submit, run_agent, ["X"], str(tmp_path), {"ASKED": "yes"})
        return HostAgent("h2", "127.0.0.1", start)

    errors = SimpleNamespace(RayError=LostError, RayTaskError=KeyError)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(get=Future.result, exceptions=errors))
    with ThreadPoolExecutor() as executor:
        yield start


class LostError(Exception):
    """Ray's, where a host is gone."""


def test_what_an_agent_prints_reaches_the_terminal(agents, tmp_path, capsys):
    assert agents('echo "$*"; echo "$PWD $ASKED" >&2; exit 75').wait() == 75
    assert capsys.readouterr().err == f"-m specdist_launch.agent --stdin X\n{tmp_path} yes\n"


def test_signals_reach_an_agent_by_name(agents, capsys):
    agent = agents("read first; read second; echo $first $second; kill -KILL $$")
    agent.signal(signal.SIGINT)  # before it is connected, too
    agent.signal(signal.SIGTERM)
    assert agent.wait() == 128 + signal.SIGKILL
    assert capsys.readouterr().err == "SIGINT SIGTERM\n"


def test_a_host_that_is_lost_is_named(agents, capsys, monkeypatch):
    agent = agents("exit 0")

    def lose(task: Future) -> None:
        raise LostError("The worker died\nmore")

    monkeypatch.setattr(sys.modules["ray"], "get", lose)
    assert agent.wait() is None
    assert capsys.readouterr().err == "specdist: h2: lost: The worker died\n"


def test_a_connection_without_the_agents_secret_is_closed(agents, capsys):
    def start(driver: tuple[str, int], token: str) -> Future:
        with socket.create_connection(driver) as connection:
            connection.sendall(b"?" * len(token))
            assert connection.recv(1) == b""
        ended = Future()
        ended.set_result(0)
        return ended

    HostAgent("h2", "127.0.0.1", start).wait()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("stopped", "starts"), [(True, 1), (False, 3)])
def test_a_job_that_was_asked_to_stop_is_not_started_again(stopped, starts):
    seen = []

    def start(attempt, received):
        seen.append(attempt)
        received += [signal.SIGTERM] * stopped
        return AGAIN

    status = supervise(start, "ray-1", 2)
    assert (status, [attempt.restart for attempt in seen]) == (AGAIN, list(range(starts)))


def test_hosts_that_do_not_see_the_files(tmp_path):
    assert examine_host([str(tmp_path), "/nowhere"])[0] == ["/nowhere"]


@pytest.fixture
def no_cluster(monkeypatch):
    for name in ("RAY_ADDRESS", "FQ_RAY_IP"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no Ray cluster is named"),
        (["--nodes", "0"], "--nodes is 0: it must be from 1 to 10,000"),
        (["--gpus-per-node", "-1"], "--gpus-per-node is -1: it must be from 1 to 10,000"),
        (["--wait", "nan"], "--wait is nan"),
        (["--env", "NOWHERE_SET"], "NOWHERE_SET is not set here"),
    ],
)
def test_bad_words_get_one_line(words, said, capsys, no_cluster):
    assert cli.main(["launch", "ray", "run.dir=unused", "target.path=unused", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("specdist: ")
    assert said in error
    assert error.count("\n") == 1


def test_without_ray_it_says_how_to_install_it(monkeypatch, capsys, no_cluster):
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["launch", "ray", "run.dir=unused", "target.path=unused", "--address", "127.0.0.1:1"]) == 2
    assert "pip install -e '.[ray]'" in capsys.readouterr().err
