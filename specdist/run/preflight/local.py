# SPDX-License-Identifier: Apache-2.0
"""One host alone, without a world: its GPUs, the model, the run directory."""

from __future__ import annotations

import socket
from pathlib import Path

import torch

from specdist.core.errors import DataError
from specdist.core.launch_env import RankFacts
from specdist.job import config as jobs
from specdist.job.config import JobConfig, JobFacts
from specdist.run.preflight.facts import report_host, report_rank
from specdist.run.preflight.judge import judge
from specdist.run.preflight.needs import needs_of
from specdist.run.preflight.report import Report
from specdist.run.preflight.storage import examine_storage, marked


def examine_host(job: JobConfig) -> Report:
    """Examine this host for a job. What needs other hosts, the clocks and the links, is left out."""
    host = socket.gethostname()
    alone = RankFacts(rank=0, world_size=1, local_rank=0, local_world_size=1, node=0, host=host)
    facts, model = examine_model(job)
    with marked(Path(job.run.dir)) as mark:
        of_host = report_host(examine_storage(Path(job.run.dir), mark, host), network=None, clock=None)
    device = torch.device("cpu") if job.world.device == "cpu" else None
    reports = (report_rank(job, alone, device, model, of_host),)
    needs = None if facts is None else needs_of(job, facts, topology=None)
    return Report(reports, judge(reports, needs, job.preflight, job.world.share_devices))


def examine_model(job: JobConfig) -> tuple[JobFacts | None, str]:
    """The facts of the job, or why this host cannot tell them.

    Raises:
        ConfigError: the model is there and readable, and the configuration does not fit it: no host's fault.
    """
    try:
        return jobs.examine(job), ""
    except OSError as error:
        return None, f"target.path={job.target.path} cannot be read: {error}"
    except DataError as error:
        return None, str(error)
