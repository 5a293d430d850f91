# SPDX-License-Identifier: Apache-2.0
"""What `specdist launch ray` decides without a cluster; tests/ray has one."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from specdist.core.errors import ConfigError, UserError
from specdist.core.launch_env import Attempt
from specdist_launch import cli, ray_agents, ray_hosts
from specdist_launch.ray_agents import Begun, Ended, Stop, agent_commands, agent_environment, host_names, run_agent
from specdist_launch.ray_hosts import (
    LOCAL,
    ClusterError,
    GpuHost,
    Place,
    Shape,
    choose_shape,
    cluster_address,
    describe_cluster,
    in_order,
)
from specdist_launch.ray_launch import read_environment
from specdist_launch.supervise import supervise
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
        (None, {"RAY_ADDRESS": "local"}, LOCAL),
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
        ("head:", "not 'head:'"),
        ("ray://svc:10001", "ray job submit --address http://svc:8265 -- specdist launch ray"),
    ],
)
def test_other_addresses_are_refused(address, said):
    with pytest.raises(ClusterError) as error:
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


def test_the_agents_of_a_job(tmp_path):
    places = [Place(host("10.0.0.1", name="a"), None), Place(host("10.0.0.2", name="b"), None)]
    names = host_names(places)
    assert names == ["a", "b"]
    assert host_names([*places, places[0]]) == ["10.0.0.1", "10.0.0.2", "10.0.0.1"]
    first, second = agent_commands(names, 8, "10.0.0.1:5000", Attempt("ray-1", 2), tmp_path / "c.yaml")
    assert " ".join(second) == (
        "--node-rank 1 --host b --nodes 2 --nproc-per-node 8 --master 10.0.0.1:5000 --hosts a,b --job ray-1 "
        f"--restart 2 --launcher ray {tmp_path}/c.yaml"
    )
    assert first[:4] == ["--node-rank", "0", "--host", "a"]


def test_a_task_passes_on_what_its_agent_says(tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\necho "$*"; echo "$PWD $ASKED" >&2; exit 75\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    begun, *lines, ended = run_agent(["--nodes", "1"], str(tmp_path), {"ASKED": "yes"})
    assert isinstance(begun, Begun)
    assert lines == ["-m specdist_launch.agent --nodes 1\n", f"{tmp_path} yes\n"]
    assert ended == Ended(75)


def test_an_agent_hears_sigint_although_rays_processes_block_it(tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        task = run_agent([], str(tmp_path), {})
        begun = next(task)
        assert isinstance(begun, Begun)
        ray_agents.deliver(begun.pid, signal.SIGINT)
        assert list(task) == [Ended(-signal.SIGINT)]
        assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def test_a_task_that_is_given_up_ends_its_agent(tmp_path, monkeypatch):
    program, told = tmp_path / "python", tmp_path / "told"
    program.write_text(f"#!/bin/sh\ntrap 'kill $!; touch {told}; exit' TERM\nsleep 60 &\necho here\nwait\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    task = run_agent([], str(tmp_path), {})
    assert isinstance(next(task), Begun)
    assert next(task) == "here\n"
    task.close()
    deadline = time.monotonic() + 10
    while not told.exists():
        assert time.monotonic() < deadline, "no SIGTERM came"
        time.sleep(0.01)


def test_a_signal_for_an_agent_that_has_ended_is_no_error():
    done = subprocess.Popen(["true"])
    done.wait()
    ray_agents.deliver(done.pid, signal.SIGTERM)


def test_two_requests_are_passed_on_and_the_third_ends_the_driver():
    stop = Stop()
    before = signal.getsignal(signal.SIGTERM)
    with stop:
        assert not stop.requested()
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert stop.signals == [signal.SIGTERM, signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert stop.requested()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(("stopped", "starts"), [(True, 1), (False, 3)])
def test_a_job_that_was_asked_to_stop_is_not_started_again(stopped, starts):
    seen = []
    status = supervise(lambda attempt: seen.append(attempt) or AGAIN, "ray-1", 2, lambda: stopped)
    assert (status, [attempt.restart for attempt in seen]) == (AGAIN, list(range(starts)))


def test_hosts_that_do_not_see_the_files(tmp_path):
    assert ray_agents.missing([str(tmp_path), "/nowhere"]) == ["/nowhere"]


@pytest.fixture
def no_cluster(monkeypatch):
    for name in ("RAY_ADDRESS", "FQ_RAY_IP"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no Ray cluster is named"),
        (["--nodes", "0"], "--nodes is at least 1, not 0"),
        (["--gpus-per-node", "-1"], "--gpus-per-node is at least 1, not -1"),
        (["--env", "NOWHERE_SET"], "NOWHERE_SET is not set here"),
    ],
)
def test_bad_words_get_one_line(words, said, capsys, no_cluster):
    assert cli.main(["launch", "ray", "run.dir=unused", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("specdist: ")
    assert said in error
    assert error.count("\n") == 1


def test_without_ray_it_says_how_to_install_it(monkeypatch, capsys, no_cluster):
    monkeypatch.setattr(ray_hosts.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["launch", "ray", "run.dir=unused", "--address", "127.0.0.1:1"]) == 2
    assert "pip install 'specdist[ray]'" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--local-fallback"], ["--address", "local"]])
def test_this_machine_is_used_when_asked_for(words, monkeypatch, no_cluster):
    called = []
    launch = cli.main
    monkeypatch.setattr(cli, "main", lambda words: called.append(words) or 7)
    assert launch(["launch", "ray", "run.dir=unused", "--retries", "1", *words]) == 7
    assert called == [["train", "run.dir=unused", "--retries", "1"]]
