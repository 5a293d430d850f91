# SPDX-License-Identifier: Apache-2.0
"""The ways of starting a job, as a node's agent sees them."""

import argparse
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from specdist.core.errors import UserError
from specdist.core.launch_env import Attempt, Role, parse_role


@dataclass(frozen=True)
class NodePlacement:
    """One node among the nodes of one start of a job."""

    attempt: Attempt
    nodes: int
    number: int
    """This one's, which is its rank among the nodes; node 0 leads."""
    host: str
    """Its name in tables and errors."""
    ranks: int
    """Ranks to start on it; 0: as many as the configuration divides among the nodes."""
    leader: tuple[str, int]
    """Host and port of the roll call, as all nodes reach it."""
    role: Role | None = None
    """The role of all its ranks, where the launcher decides it."""
    hosts: tuple[str, ...] = ()
    """The names of all nodes in order, where the launcher knows them."""
    launched: float = field(default_factory=time.time)
    """When the launcher began, in seconds since the epoch; by default now."""
    prompts_s: float = 0.0
    """Seconds since then that its preparation of the prompts took."""


@dataclass(frozen=True)
class Launcher:
    name: str
    """As the records have it."""
    placement: Callable[[argparse.Namespace], NodePlacement]
    """Where this node is among the nodes, from the agent's arguments or its environment. Raises UserError."""
    judged_by_agent: bool = True
    """Whether the first node's agent says what becomes of the job; otherwise a batch script does, by verdict.py."""


def placement_from_arguments(args: argparse.Namespace) -> NodePlacement:
    """As the launcher's command line has it. Raises UserError."""
    host, _, port = args.master.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--master is HOST:PORT, not '{args.master}'")
    return NodePlacement(
        attempt=Attempt(args.job, args.restart, args.deadline),
        nodes=args.nodes,
        number=args.node_rank,
        host=args.host or socket.gethostname(),
        ranks=args.nproc_per_node or 0,
        leader=(host, int(port)),
        role=parse_role(args.role),
        hosts=tuple(filter(None, args.hosts.split(","))),
    )
