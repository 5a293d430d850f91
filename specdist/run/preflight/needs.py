# SPDX-License-Identifier: Apache-2.0
"""What a job asks of its hosts: memory of GPUs, room in the run directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from specdist.core.progress import committed
from specdist.core.topology import Topology
from specdist.draft.build import parameter_count
from specdist.export import written_formats
from specdist.job.config import JobConfig, JobFacts
from specdist.job.plan import plan_of
from specdist.job.run_dir import RunDirectory

_SAVED_BYTES = 12
"""Per parameter of a checkpoint: the fp32 weight and the two moments of AdamW."""
_EXPORT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Needs:
    """What a job asks of its hosts, in bytes; estimates, as those of `specdist plan`."""

    memory: tuple[int, ...]
    """Of each rank on its GPU; empty where the ranks are not known."""
    checkpoint: int
    room: int
    """What will be written to the run directory beyond what is there."""


def needs_of(job: JobConfig, facts: JobFacts, topology: Topology | None) -> Needs:
    """Work out what the job needs; without a topology, what it needs of the run directory.

    Raises:
        ConfigError: for a job that cannot be.
    """
    parameters = 0 if job.world.mode == "target_only" else parameter_count(job.draft, facts.target.config)
    checkpoint = _SAVED_BYTES * parameters
    exports = len(written_formats(job.draft, job.export)) * _EXPORT_BYTES[job.export.dtype] * parameters
    present = len(committed(RunDirectory(Path(job.run.dir)).checkpoints))
    # One more than are kept: the oldest goes when the newest is whole.
    missing = max(job.checkpoint.keep + 1 - present, 1)
    memory = () if topology is None else _memory(job, facts, topology)
    return Needs(memory, checkpoint, missing * checkpoint + exports)


def _memory(job: JobConfig, facts: JobFacts, topology: Topology) -> tuple[int, ...]:
    demand = plan_of(job, facts, topology, limit=0).demand()
    if topology.mode == "colocated":
        return (demand["target + draft"],) * topology.world_size
    return tuple(
        demand["draft" if topology.draft_place(rank) is not None else "target"] for rank in range(topology.world_size)
    )
