# SPDX-License-Identifier: Apache-2.0
"""What a job asks of its hosts: memory of GPUs, room in the run directory."""

from dataclasses import dataclass
from pathlib import Path

import torch

from specdist.core.progress import committed
from specdist.core.topology import Topology
from specdist.draft.build import parameter_count
from specdist.export import written_formats
from specdist.job.config import JobConfig, JobFacts
from specdist.job.plan import plan_of, state_bytes
from specdist.job.run_dir import RunDirectory


@dataclass(frozen=True)
class Needs:
    """What a job asks of its hosts, in bytes; estimates, as those of `specdist plan`.

    Attributes:
        memory: of each rank on its GPU; empty where the ranks are not known.
        checkpoint: one of them.
        room: what will be written to the run directory beyond what is there.
    """

    memory: tuple[int, ...]
    checkpoint: int
    room: int


def needs_of(job: JobConfig, facts: JobFacts, topology: Topology | None) -> Needs:
    """Work out what the job needs; without a topology, what it needs of the run directory. Raises ConfigError."""
    parameters = 0 if job.world.mode == "target_only" else parameter_count(job.draft, facts.target.config)
    checkpoint = state_bytes(job.draft, facts.target.config, job.optimizer) if parameters else 0
    width = getattr(torch, job.export.dtype).itemsize
    exports = len(written_formats(job.draft, job.export)) * width * parameters
    present = len(committed(RunDirectory(Path(job.run.dir)).checkpoints))
    # One more than are kept: the oldest goes when the newest is whole.
    missing = max(job.checkpoint.keep + 1 - present, 1)
    return Needs(_memory(job, facts, topology), checkpoint, missing * checkpoint + exports)


def _memory(job: JobConfig, facts: JobFacts, topology: Topology | None) -> tuple[int, ...]:
    if topology is None:
        return ()
    demand = plan_of(job, facts, topology, limit=0).demand()
    roles = ("target" if topology.draft_place(rank) is None else "draft" for rank in range(topology.world_size))
    return tuple(demand.get(role, sum(demand.values())) for role in roles)  # colocated, a rank has both
