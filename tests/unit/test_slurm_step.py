# SPDX-License-Identifier: Apache-2.0
"""What a task learns from a Slurm step's environment; the environments below are recorded ones (Slurm 22.05)."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping

import pytest

from specdist.core.errors import WorldError
from specdist_launch.launcher import NodePlacement
from specdist_launch.slurm.step import FIRST_PORT, PORTS, expand_hostlist, placement_in_step, roll_call_port

PLAIN = {
    "SLURMD_NODENAME": "n2", "SLURM_CPUS_ON_NODE": "1", "SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_ID": "17",
    "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_LOCALID": "0", "SLURM_NODEID": "1",
    "SLURM_PROCID": "1", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2",
}  # fmt: skip
HETEROGENEOUS = {
    "SLURMD_NODENAME": "n3", "SLURM_CPUS_ON_NODE": "3", "SLURM_GPUS_ON_NODE": "1", "SLURM_HET_SIZE": "2",
    "SLURM_JOB_ID": "2", "SLURM_JOB_ID_HET_GROUP_0": "2", "SLURM_JOB_ID_HET_GROUP_1": "3",
    "SLURM_JOB_NODELIST": "n[1-3]", "SLURM_JOB_NODELIST_HET_GROUP_0": "n1", "SLURM_JOB_NODELIST_HET_GROUP_1": "n[2-3]",
    "SLURM_NODEID": "2", "SLURM_PROCID": "2", "SLURM_STEP_NODELIST": "n[1-3]", "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_NUM_TASKS": "3", "SLURM_RESTART_COUNT": "1",
}  # fmt: skip
ANSWERS = {
    ("show", "node", "n1"): "NodeName=n1 Arch=x86_64 CoresPerSocket=1\n   NodeAddr=10.0.0.1 NodeHostName=vm\n",
    ("show", "job", "17"): "JobId=17\n   StartTime=2026-11-25T18:33:11 EndTime=2026-11-25T18:38:11 Deadline=N/A\n",
    ("show", "job", "2"): "JobId=2\n   StartTime=2026-11-25T18:33:11 EndTime=Unknown Deadline=N/A\n",
}


def ask(*words: str) -> str | None:
    return ANSWERS.get(words)


def no_scontrol(*words: str) -> str | None:
    return None


Read = Callable[..., NodePlacement]


@pytest.fixture
def read_step(monkeypatch: pytest.MonkeyPatch) -> Read:
    """The placement in a step with this environment alone, where scontrol answers so."""

    def read(env: Mapping[str, str], scontrol: Callable[..., str | None] = ask, ranks: int | None = None):
        for name in [name for name in os.environ if name.startswith("SLURM")]:
            monkeypatch.delenv(name)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("specdist_launch.slurm.step.scontrol", scontrol)
        return placement_in_step(argparse.Namespace(nproc_per_node=ranks))

    return read


def test_a_plain_step(read_step: Read):
    step = read_step(PLAIN)
    assert (step.hosts, step.nodes, step.number, step.host) == (("n1", "n2"), 2, 1, "n2")
    assert (step.leader[0], step.attempt.job, step.attempt.restart, step.role) == ("10.0.0.1", "17", 0, None)
    assert step.ranks == 2
    assert read_step(PLAIN, ranks=1).ranks == 1


def test_the_end_of_the_job_is_in_the_environment_or_asked_for(read_step: Read):
    asked = read_step(PLAIN).attempt.deadline
    assert asked is not None
    assert asked % 60 == 11  # whatever the time zone of this machine
    assert read_step({**PLAIN, "SLURM_JOB_END_TIME": "1790000000"}).attempt.deadline == 1790000000.0
    assert read_step(HETEROGENEOUS).attempt.deadline is None  # no limit


def test_a_heterogeneous_step_is_one_world_with_roles(read_step: Read):
    step = read_step(HETEROGENEOUS)
    assert (step.hosts, step.number, step.host, step.role) == (("n1", "n2", "n3"), 2, "n3", "draft")
    assert (step.attempt.job, step.attempt.restart) == ("2", 1)
    first = read_step({**HETEROGENEOUS, "SLURM_NODEID": "0", "SLURMD_NODENAME": "n1"})
    assert (first.host, first.role) == ("n1", "target")
    assert first.leader == step.leader


def test_inside_a_container_the_leaders_name_has_to_do(read_step: Read):
    step = read_step(PLAIN, no_scontrol)
    assert (step.leader[0], step.attempt.deadline) == ("n1", None)


def test_no_gpus_asked_for(read_step: Read):
    assert read_step({k: v for k, v in PLAIN.items() if k != "SLURM_GPUS_ON_NODE"}).ranks == 0


def test_no_step_and_too_many_tasks_are_said(read_step: Read):
    with pytest.raises(WorldError, match="no task of a Slurm step"):
        read_step({"SLURM_JOB_ID": "17"})
    with pytest.raises(WorldError, match="16 tasks on 2 nodes"):
        read_step({**PLAIN, "SLURM_STEP_NUM_TASKS": "16"})


def test_each_start_of_each_job_meets_elsewhere():
    ports = [roll_call_port(job, restart) for job in range(4_000_000, 4_000_100) for restart in range(8)]
    assert len({*ports, *(port + 1 for port in ports)}) == 2 * len(ports)
    assert all(FIRST_PORT <= port < FIRST_PORT + PORTS for port in ports)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("login", "login"),
        ("n3,b[2,1]", "n3 b2 b1"),
        ("n[1-3]", "n1 n2 n3"),
        ("gpu[01-03,7],login,dgx-2", "gpu01 gpu02 gpu03 gpu7 login dgx-2"),
        ("a[1-2]b[09-10]", "a1b09 a1b10 a2b09 a2b10"),
        ("n[098-101]-ib", "n098-ib n099-ib n100-ib n101-ib"),
    ],
)
def test_host_lists(text, names):
    assert list(expand_hostlist(text)) == names.split()
