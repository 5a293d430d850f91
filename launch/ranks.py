# SPDX-License-Identifier: Apache-2.0
"""The ranks of one node: torchrun's elastic launch with a static rendezvous."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from specdist.world.roll_call import Meeting

_UNUSED_SIGNAL = "SIGQUIT"
"""torchrun ends with an error at the signals it handles, so it is given one that stands for nothing here."""
_LOUD = ("torch.distributed.elastic.multiprocessing.api", "torch.distributed.elastic.agent.server.api")
"""They log failures that the record has already."""


def run_ranks(
    meeting: Meeting, node: int, leader: str, name: str, arguments: Sequence[str], environment: Mapping[str, str]
) -> dict[int, int]:
    """Run `python ARGUMENTS` once for every rank of this node and wait for their end.

    Args:
        leader: the address of node 0, as the other nodes reach it.
        name: the attempt's, which keeps its keys in the store apart from those of others.

    Returns:
        The exit status of each rank that failed first on this node; negative: the signal that killed it.
    """
    own = meeting.nodes[node]
    config = LaunchConfig(
        min_nodes=len(meeting.nodes),
        max_nodes=len(meeting.nodes),
        nproc_per_node=own.ranks,
        run_id=name,
        rdzv_backend="static",
        rdzv_endpoint=f"{leader}:{meeting.port}",
        rdzv_configs={"rank": node, "timeout": 120},  # all agents are there: they have just met
        max_restarts=0,
        local_addr=own.host,
        signals_to_handle=_UNUSED_SIGNAL,
    )
    os.environ.update(environment)
    for name in _LOUD:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except ChildFailedError as error:
        return {rank: failure.exitcode for rank, failure in error.failures.items()}
    return {}
