# SPDX-License-Identifier: Apache-2.0
"""What every rank of `specdist doctor` executes: join, examine, tell, leave. No model is loaded, no prompt is read.

torchrun --nproc-per-node N -m specdist.run.preflight.world --config configs/X.yaml [key=value ...]

Rank 0 prints the report and ends with status 1 where it found a problem.
"""

from __future__ import annotations

import argparse
import logging
import sys
import traceback
from collections.abc import Sequence

from specdist.core.errors import UserError, WorldError
from specdist.core.launch_env import RankFacts
from specdist.core.stop import end_with_launcher, leave
from specdist.core.topology import Topology
from specdist.job import config as jobs
from specdist.job.config import JobConfig, load_job
from specdist.run.preflight.local import examine_model
from specdist.run.preflight.preflight import Preflight
from specdist.world.groups import Groups, World, join_world, make_groups
from specdist.world.links import connect_links


def main(argv: Sequence[str] | None = None) -> int:
    end_with_launcher()
    parser = argparse.ArgumentParser(prog="python -m specdist.run.preflight.world", description=__doc__)
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="YAML file; several are merged")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override single keys")
    args = parser.parse_args(argv)
    logging.getLogger("torch.distributed").setLevel(logging.WARNING)
    try:
        return examine_world(load_job(args.config, args.overrides), RankFacts.from_environment())
    except UserError as error:
        print(f"specdist: {error}", file=sys.stderr, flush=True)
        return 2
    except Exception:  # noqa: BLE001 - a defect: show it whole and leave
        traceback.print_exc()
        return 1


def examine_world(job: JobConfig, who: RankFacts) -> int:
    """Take part as rank `who.rank`; returns the exit status."""
    facts, model = examine_model(job)
    world = join_world(job.world, who)
    topology = jobs.topology(job, world.hosts, world.roles)
    check = Preflight(job, world, topology)
    check.examine_hosts(facts, model)
    told = check.report
    if told is not None:  # now, in case that the groups or the links do not come up
        print(told.render_hosts(), flush=True)
    groups = make_groups(topology, world, jobs.transport(job, world.device).link_backend, job.world.wait_timeout_s)
    check.examine_links(groups, _connect(job, topology, groups, world))
    status = 0
    if told is not None and check.report is not None:
        print(check.report.render_links(told.findings), flush=True)
        status = 0 if check.report.healthy else 1
    check.part()
    return status


def _connect(job: JobConfig, topology: Topology, groups: Groups, world: World) -> str:
    """Why the links of this rank did not come up; empty where they did."""
    try:
        connect_links(topology, groups, world, job.world.join_timeout_s)
    except WorldError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    leave(main())
