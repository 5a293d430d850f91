# SPDX-License-Identifier: Apache-2.0
"""One node among the nodes of a job."""

from __future__ import annotations

from dataclasses import dataclass

from specdist.core.launch_env import Attempt, Role


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
