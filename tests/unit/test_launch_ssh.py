# SPDX-License-Identifier: Apache-2.0
"""Hosts and commands of `specdist train --hosts`, without starting anything."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import pytest

from specdist.core.errors import ConfigError, UserError
from specdist.core.launch_env import Attempt
from specdist.job.sections import JobConfig, RunConfig
from specdist_launch import ssh
from specdist_launch.agents import Host, agent_command, agent_words
from specdist_launch.ssh import _check_leader, find_hosts, plain_torchrun, read_hostfile

HOSTS = [Host("gpu1", 4), Host("gpu2", 2)]


def test_plain_torchrun_commands_are_what_was_agreed() -> None:
    lines = plain_torchrun(HOSTS, 29400, ["configs/my run.yaml"], ["prompts.files=[a b.jsonl]"])
    assert lines == [
        "# on gpu1\ntorchrun --nnodes 2 --node-rank 0 --nproc-per-node 4 --master-addr gpu1 --master-port 29400 "
        "-m specdist.train --config 'configs/my run.yaml' 'prompts.files=[a b.jsonl]'",
        "# on gpu2\ntorchrun --nnodes 2 --node-rank 1 --nproc-per-node 2 --master-addr gpu1 --master-port 29400 "
        "-m specdist.train --config 'configs/my run.yaml' 'prompts.files=[a b.jsonl]'",
    ]


def test_one_host_needs_no_address() -> None:
    (line,) = plain_torchrun([Host("node0", 3)], 29400, ["x.yaml"], [])
    assert line == "torchrun --standalone --nproc-per-node 3 -m specdist.train --config x.yaml"


def test_every_agent_knows_its_place() -> None:
    words = agent_words("ssh", Attempt("ssh-1", 2), HOSTS, "gpu1:29400", ["x.yaml", "run.seed=1"])
    command = agent_command(words[1])
    assert command[:4] == [sys.executable, "-m", "specdist_launch.agent", "--stdin"]
    assert " ".join(command[4:]) == (
        "--node-rank 1 --host gpu2 --nproc-per-node 2 --nodes 2 --master gpu1:29400 --hosts gpu1,gpu2 --job ssh-1 "
        "--restart 2 --launcher ssh x.yaml run.seed=1"
    )


def test_a_hostfile_is_what_mpi_and_deepspeed_write(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("# all of them\ngpu1 slots=4\n\ngpu2   # as many as the config says\n")
    assert read_hostfile(str(file)) == [("gpu1", 4), ("gpu2", None)]
    for line in ("gpu1 slots=0", "gpu1 slots=four", "gpu1 4", "gpu1 slots=1 max_slots=2"):
        file.write_text(f"gpu0\n{line}\n")
        with pytest.raises(ConfigError, match=f"hosts:2: a line is NAME or NAME slots=N, not '{line}'"):
            read_hostfile(str(file))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_hostfile(str(tmp_path / "none"))


def words(**given: object) -> argparse.Namespace:
    return argparse.Namespace(**({"hosts": None, "hostfile": None, "nproc_per_node": None, "nodes": 1} | given))


def test_ranks_are_divided_among_hosts_or_given(tmp_path: Path) -> None:
    job = JobConfig(run=RunConfig(dir="x"))
    assert find_hosts(words(hosts="a,b", nproc_per_node=3), job) == [Host("a", 3), Host("b", 3)]
    (tmp_path / "hosts").write_text("a slots=1\nb slots=2\n")
    assert find_hosts(words(hostfile=str(tmp_path / "hosts")), job) == [Host("a", 1), Host("b", 2)]
    assert find_hosts(words(nodes=2, nproc_per_node=3), job) == [Host("node0", 3), Host("node1", 3)]
    with pytest.raises(UserError, match="not both"):
        find_hosts(words(hosts="a", hostfile="b"), job)
    with pytest.raises(UserError, match="hosts named twice: a"):
        find_hosts(words(hosts="a,b,a"), job)


def test_a_first_host_that_is_unknown_is_told_before_anything_is_started() -> None:
    with pytest.raises(ConfigError, match=r"--hosts: no\.such\.host\.invalid is not known here"):
        _check_leader([Host("no.such.host.invalid", 1), Host("b", 1)])


def test_hosts_that_ssh_has_not_reached_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """It reads its input only once it is through; one that has failed is told elsewhere."""
    (stand_in := tmp_path / "ssh").write_text(
        "#!/bin/sh\ncase $1 in h1) read line;; h2) exit 255;; esac\nexec sleep 2\n"
    )
    stand_in.chmod(0o755)
    monkeypatch.setattr(ssh, "SSH", (str(stand_in),))
    monkeypatch.setattr(ssh, "_TELL_S", 0.0)
    agents = [ssh.SshAgent(host, ["agent"]) for host in ("h1", "h2")]
    deadline = time.monotonic() + 60
    while (agents[0].missing or agents[1].missing) and time.monotonic() < deadline:
        time.sleep(0.01)
    ssh.tell_of_waits(agents)
    assert not capsys.readouterr().err
    agents += [ssh.SshAgent(f"h{number}", ["agent"]) for number in range(3, 13)]
    ssh.tell_of_waits(agents)
    named = ", ".join(f"h{number}" for number in range(3, 11))
    assert capsys.readouterr().err == f"specdist: waiting for ssh to reach {named} and 2 more hosts\n"
    assert [agent.wait(60) for agent in agents[2:]] == [0] * 10
