# SPDX-License-Identifier: Apache-2.0
"""The ways of starting a job, as a node's agent sees them."""

from __future__ import annotations

import argparse
import socket
from collections.abc import Callable
from dataclasses import dataclass

from specdist.core.errors import UserError
from specdist.core.launch_env import Attempt, parse_role
from specdist_launch.placement import NodePlacement
from specdist_launch.slurm.step import placement_in_step


@dataclass(frozen=True)
class Launcher:
    """A way of starting a job."""

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


LAUNCHERS = {
    launcher.name: launcher
    for launcher in (
        *(Launcher(name, placement_from_arguments) for name in ("agent", "local", "ssh", "ray", "submitit")),
        Launcher("submitit-slurm", placement_in_step),
        Launcher("slurm", placement_in_step, judged_by_agent=False),
    )
}
"""By name; `agent` is one that a user has started by hand."""
