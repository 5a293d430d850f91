# SPDX-License-Identifier: Apache-2.0
"""The placement of a node, from the environment of the Slurm step that its agent is a task of.

One task a node is the rule here (see slurm/train.sbatch), so that a task's rank among the nodes is its node's. In a
heterogeneous job one step spans all components, and Slurm numbers the nodes through them all: component 0 holds the
target's nodes, every later one draft nodes.
"""

import argparse
import itertools
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from datetime import datetime

from specdist.core.errors import WorldError
from specdist.core.launch_env import Attempt, Role
from specdist_launch.launcher import NodePlacement

FIRST_PORT, PORTS = 20000, 12000
"""Ports of roll calls: above what services listen on, below the range Linux takes ephemeral ports from (32768)."""


def placement_in_step(args: argparse.Namespace) -> NodePlacement:
    """The node that this process, a task of a step, runs on; --nproc-per-node says otherwise than its GPUs. Raises
    WorldError: this is no step, or one of several tasks a node."""
    env = os.environ
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
    number, job, restart = int(env["SLURM_NODEID"]), env["SLURM_JOB_ID"], int(env.get("SLURM_RESTART_COUNT", "0"))
    return NodePlacement(
        attempt=Attempt(job, restart, _deadline(job)),
        nodes=len(hosts),
        number=number,
        host=hosts[number],
        ranks=args.nproc_per_node or int(env.get("SLURM_GPUS_ON_NODE", "0")),
        leader=(_address(hosts[0]), roll_call_port(int(job), restart)),
        role=_role(hosts[number]),
        hosts=hosts,
    )


def roll_call_port(job: int, restart: int) -> int:
    """Jobs whose ids are near each other, and the starts of one job, get different ports, two for each."""
    return FIRST_PORT + (job * 8 + restart) * 2 % PORTS


def expand_hostlist(text: str) -> Iterator[str]:
    """The names in a list as Slurm writes it: `gpu[01-03,7],login` is gpu01, gpu02, gpu03, gpu7, login.

    In the order of the list, which is that of the nodes' ranks; ClusterShell's NodeSet would sort them.
    """
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        yield from map("".join, itertools.product(*map(_expand, re.findall(r"\[[^\]]*\]|[^\[]+", part))))


def _expand(piece: str) -> Iterator[str]:
    """The texts that a piece of a list stands for: `[01-03,7]` is 01, 02, 03, 7."""
    for part in piece.strip("[]").split(","):
        first, dash, last = part.partition("-") if piece.startswith("[") else (part, "", "")
        for number in range(int(first), int(last) + 1) if dash else [first]:
            yield str(number).zfill(len(first))


def scontrol(*words: str) -> str | None:
    """What `scontrol WORDS` prints; None where there is no scontrol, as in most containers, or it has no answer."""
    if shutil.which("scontrol") is None:
        return None
    env = {k: v for k, v in os.environ.items() if k != "SLURM_TIME_FORMAT"}  # a user's own way to print times
    done = subprocess.run(["scontrol", *words], env=env, capture_output=True, text=True, timeout=60)
    return done.stdout if done.returncode == 0 else None


def _address(host: str) -> str:
    """Slurm's own address of a node: its name alone need not resolve. Its name, where Slurm cannot be asked."""
    found = re.search(r"\bNodeAddr=(\S+)", scontrol("show", "node", host) or "")
    return found[1] if found else host


def _deadline(job: str) -> float | None:
    """When the time is over. Slurm 22.05 lacks SLURM_JOB_END_TIME and has to be asked; it answers in local time."""
    if "SLURM_JOB_END_TIME" in os.environ:
        return float(os.environ["SLURM_JOB_END_TIME"])
    found = re.search(r"\bEndTime=(\d\S+)", scontrol("show", "job", job) or "")
    return datetime.fromisoformat(found[1]).timestamp() if found else None


def _role(host: str) -> Role | None:
    if "SLURM_HET_SIZE" not in os.environ:
        return None
    return "target" if host in expand_hostlist(os.environ["SLURM_JOB_NODELIST_HET_GROUP_0"]) else "draft"
