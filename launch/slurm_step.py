# SPDX-License-Identifier: Apache-2.0
"""What a task of a Slurm step learns about itself and its world from the step's environment.

One task a node is the rule here (see slurm/train.sbatch), so that a task's rank among the nodes is its node's. In a
heterogeneous job one step spans all components, and Slurm numbers the nodes through them all: component 0 holds the
target's nodes, every later one draft nodes.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime

from specdist.core.errors import WorldError
from specdist.core.launch_env import Role

FIRST_PORT, PORTS = 20000, 12000
"""Ports of meetings: above what services listen on, below the range Linux takes ephemeral ports from (32768)."""

Scontrol = Callable[..., str | None]


@dataclass(frozen=True)
class SlurmStep:
    """One node's view of the step that starts a world."""

    hosts: tuple[str, ...]
    """The names of all nodes, in the order of their ranks."""
    node_rank: int
    leader: str
    """The address of node 0, as the other nodes reach it."""
    port: int
    """Where the nodes meet: the same on all, another one for every start of a job. The next one is free as well."""
    job: str
    restart: int
    """How often Slurm has requeued the job."""
    deadline: float | None
    """When Slurm ends the job, in seconds since the epoch; None: never, or this Slurm does not say."""
    gpus: int | None
    """GPUs of this node that Slurm gave to the job; None where it was not asked for any."""
    cpus: int
    """Processors of this node that Slurm gave to the step."""
    role: Role | None
    """What this node's component of a heterogeneous job is for; None in any other job."""

    @property
    def nodes(self) -> int:
        return len(self.hosts)

    @property
    def host(self) -> str:
        return self.hosts[self.node_rank]


def step_from_environment() -> SlurmStep:
    """Read the step that this process is a task of. Raises WorldError outside a step, or with several tasks a node."""
    return read_step(os.environ, scontrol)


def read_step(env: Mapping[str, str], ask: Scontrol) -> SlurmStep:
    """As step_from_environment, from a given environment; `ask` runs scontrol and returns None where there is none.

    Raises:
        WorldError: this is no step, or one of several tasks a node.
    """
    if "SLURM_STEP_NODELIST" not in env or "SLURM_NODEID" not in env:
        raise WorldError(
            "--slurm: this process is no task of a Slurm step; start it with srun, as slurm/train.sbatch does"
        )
    hosts = tuple(expand_hostlist(env["SLURM_STEP_NODELIST"]))
    tasks = int(env["SLURM_STEP_NUM_TASKS"])
    if tasks != len(hosts):
        raise WorldError(
            f"--slurm: srun started {tasks} tasks on {len(hosts)} nodes; one agent a node starts the ranks itself: use "
            "srun --ntasks-per-node=1"
        )
    job, restart = env["SLURM_JOB_ID"], int(env.get("SLURM_RESTART_COUNT", "0"))
    node_rank = int(env["SLURM_NODEID"])
    gpus = env.get("SLURM_GPUS_ON_NODE")
    return SlurmStep(
        hosts=hosts,
        node_rank=node_rank,
        leader=_address(hosts[0], ask),
        port=meeting_port(int(job), restart),
        job=job,
        restart=restart,
        deadline=_deadline(env, job, ask),
        gpus=None if gpus is None else int(gpus),
        cpus=int(env["SLURM_CPUS_ON_NODE"]),
        role=_role(env, hosts[node_rank]),
    )


def meeting_port(job: int, restart: int) -> int:
    """Jobs whose ids are near each other, and the starts of one job, get different ports, two for each."""
    return FIRST_PORT + (job * 8 + restart) * 2 % PORTS


def expand_hostlist(text: str) -> Iterator[str]:
    """The names in a list as Slurm writes it: `gpu[01-03,7],login` is gpu01, gpu02, gpu03, gpu7, login."""
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        prefix, bracket, rest = part.partition("[")
        if not bracket:
            yield prefix
            continue
        ranges, _, suffix = rest.partition("]")
        for number in _expand_ranges(ranges):
            for ending in expand_hostlist(suffix) if suffix else [""]:
                yield f"{prefix}{number}{ending}"


def _expand_ranges(text: str) -> Iterator[str]:
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not dash:
            yield first
            continue
        for number in range(int(first), int(last) + 1):
            yield str(number).zfill(len(first))


def scontrol(*words: str) -> str | None:
    """What `scontrol WORDS` prints; None where there is no scontrol, as in most containers, or it has no answer."""
    if shutil.which("scontrol") is None:
        return None
    env = {k: v for k, v in os.environ.items() if k != "SLURM_TIME_FORMAT"}  # a user's own way to print times
    done = subprocess.run(["scontrol", *words], env=env, capture_output=True, text=True, timeout=60)
    return done.stdout if done.returncode == 0 else None


def _address(host: str, ask: Scontrol) -> str:
    """Slurm's own address of a node: its name alone need not resolve. Its name, where Slurm cannot be asked."""
    found = re.search(r"\bNodeAddr=(\S+)", ask("show", "node", host) or "")
    return found[1] if found else host


def _deadline(env: Mapping[str, str], job: str, ask: Scontrol) -> float | None:
    """When the time is over. Slurm 22.05 lacks SLURM_JOB_END_TIME and has to be asked; it answers in local time."""
    if "SLURM_JOB_END_TIME" in env:
        return float(env["SLURM_JOB_END_TIME"])
    found = re.search(r"\bEndTime=(\d\S+)", ask("show", "job", job) or "")
    return datetime.fromisoformat(found[1]).timestamp() if found else None


def _role(env: Mapping[str, str], host: str) -> Role | None:
    if "SLURM_HET_SIZE" not in env:
        return None
    return "target" if host in expand_hostlist(env["SLURM_JOB_NODELIST_HET_GROUP_0"]) else "draft"
