# SPDX-License-Identifier: Apache-2.0
"""One node among the nodes of a job."""

from __future__ import annotations

import argparse
import socket
from dataclasses import dataclass

from specdist.core import launch_env as contract
from specdist.core.errors import UserError
from specdist.core.launch_env import Attempt
from specdist.job.config import JobConfig
from specdist_launch.local import ranks_per_node
from specdist_launch.slurm_step import step_from_environment


@dataclass(frozen=True)
class Place:
    """This node among the nodes of the job."""

    nodes: int
    number: int
    host: str
    ranks: int
    leader: tuple[str, int]
    role: contract.Role | None = None
    hosts: tuple[str, ...] = ()
    """The names of all nodes, where the launcher knows them."""


def place_from_arguments(args: argparse.Namespace) -> tuple[Place, Attempt]:
    """Where the launcher has put this node. Raises UserError."""
    host, _, port = args.master.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--master is HOST:PORT, not '{args.master}'")
    place = Place(
        nodes=args.nodes,
        number=args.node_rank,
        host=args.host or socket.gethostname(),
        ranks=args.nproc_per_node,
        leader=(host, int(port)),
        role=contract.parse_role(args.role),
        hosts=tuple(filter(None, args.hosts.split(","))),
    )
    return place, Attempt(args.job, args.restart, args.deadline)


def place_from_slurm(job: JobConfig, ranks: int | None) -> tuple[Place, Attempt]:
    """Where the Slurm step has put this node, with `ranks` ranks or as many as it has GPUs. Raises UserError."""
    step = step_from_environment()
    ranks = ranks or step.gpus or ranks_per_node(job, step.nodes)
    place = Place(step.nodes, step.node_rank, step.host, ranks, (step.leader, step.port), step.role, step.hosts)
    return place, Attempt(step.job, step.restart, step.deadline)
