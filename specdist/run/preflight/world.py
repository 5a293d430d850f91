# SPDX-License-Identifier: Apache-2.0
"""What every rank of `specdist doctor` executes: join, examine, report, leave. No model is loaded, no prompt is read.

torchrun --nproc-per-node N -m specdist.run.preflight.world --config configs/X.yaml [key=value ...]

Rank 0 prints the report and ends with status 1 where it found a problem.
"""

import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from specdist.core.errors import DataError, WorldError
from specdist.core.launch_env import RankFacts
from specdist.job import config as jobs
from specdist.job.config import JobConfig, JobFacts
from specdist.run.preflight.facts import HostFacts, examine_storage, marked, report_rank
from specdist.run.preflight.judge import judge, needs_of
from specdist.run.preflight.preflight import Preflight
from specdist.run.preflight.report import Report
from specdist.run.rank_program import leave_with, rank_status
from specdist.world.groups import join_world, make_groups
from specdist.world.links import connect_links


def main(argv: Sequence[str] | None = None) -> int:
    return rank_status(examine_world, "specdist.run.preflight.world", __doc__, argv)


def examine_world(job: JobConfig, who: RankFacts) -> int:
    """Take part as rank `who.rank`; returns the exit status."""
    facts, model = examine_model(job)
    world = join_world(job.world, who)
    topology = jobs.topology(job, world.hosts, world.roles)
    asked = replace(job, preflight=replace(job.preflight, level="warn", links=True))
    check = Preflight(asked, world, topology, doctor=True)
    check.hosts(facts, model)
    groups = make_groups(topology, world, jobs.transport(job, world.device).link_backend, job.world.wait_timeout_s)
    broken = ""
    try:
        connect_links(topology, groups, world, job.world.join_timeout_s)
    except WorldError as error:
        broken = str(error)
    check.links(groups, broken)
    return 0 if check.report is None or check.report.healthy else 1


def examine_alone(job: JobConfig) -> Report:
    """Examine this host without a world: its GPUs, the model, the run directory."""
    host = socket.gethostname()
    alone = RankFacts(rank=0, world_size=1, local_rank=0, local_world_size=1, host=host)
    facts, model = examine_model(job)
    with marked(Path(job.run.dir)) as mark:
        of_host = HostFacts(examine_storage(Path(job.run.dir), mark))
    device = torch.device("cpu") if job.world.device == "cpu" else None
    reports = (report_rank(job, alone, device, model, of_host),)
    needs = None if facts is None else needs_of(job, facts, topology=None)
    return Report(reports, judge(reports, needs, job.preflight, job.world.share_devices))


def examine_model(job: JobConfig) -> tuple[JobFacts | None, str]:
    """The facts of the job, or why this host cannot know them. Raises ConfigError: the model is there and readable, and
    the configuration does not fit it: no host's fault."""
    try:
        return jobs.examine(job), ""
    except OSError as error:
        return None, f"target.path={job.target.path} cannot be read: {error}"
    except DataError as error:
        return None, str(error)


if __name__ == "__main__":
    leave_with(main)
