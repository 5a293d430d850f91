# SPDX-License-Identifier: Apache-2.0
"""Start a world on a Ray cluster's hosts: `specdist launch ray`. The only part of the project that knows Ray.

Ray finds the GPU hosts, reserves them and runs one task on each, which is no more than the parent of that host's agent.
The ranks are torchrun's and know nothing of Ray.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from specdist.core.errors import ConfigError, UserError

if TYPE_CHECKING:  # light at import: `specdist --help` answers at once
    from specdist.core.launch_env import Attempt
    from specdist.job.config import JobConfig
    from specdist_launch.ray_hosts import Place


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address", metavar="HOST:PORT", help="the cluster's head (default: RAY_ADDRESS, or KubeRay's)"
    )
    parser.add_argument("--nodes", type=int, metavar="N", help="hosts of the job (default: the fewest that will do)")
    parser.add_argument(
        "--gpus-per-node", type=int, metavar="P", help="GPUs, and ranks, of each (default: divide them)"
    )
    parser.add_argument("--wait", type=float, default=300, metavar="SECONDS", help="for the GPUs (default 300)")
    parser.add_argument("--retries", type=int, metavar="N", help="starts after a failure (default: launch.retries)")
    parser.add_argument(
        "--env", action="append", default=[], metavar="NAME[=VALUE]", help="a variable for the ranks; may be repeated"
    )
    parser.add_argument(
        "--local-fallback", action="store_true", help="start on this machine where no cluster is named or answers"
    )


def main(args: argparse.Namespace) -> int:
    environment = read_environment(args.env)
    for option, value in {"--nodes": args.nodes, "--gpus-per-node": args.gpus_per_node}.items():
        if value is not None and value < 1:
            raise ConfigError(f"{option} is at least 1, not {value}")
    if not _join_cluster(args):
        return _train_here(args)

    from specdist.job.config import examine, load_job
    from specdist.job.run_dir import RunDirectory
    from specdist_launch.ray_agents import Stop, run_agents
    from specdist_launch.ray_hosts import choose_shape, gpu_hosts, reserve
    from specdist_launch.supervise import new_job, supervise

    job = load_job([w for w in args.config if "=" not in w], [w for w in args.config if "=" in w])
    examine(job)
    RunDirectory(Path(job.run.dir)).check(job)
    shape = choose_shape(_ranks(job), args.nodes, args.gpus_per_node, gpu_hosts())
    job_id, stop = new_job("ray"), Stop()
    config = _snapshot(job, job_id)

    def start(attempt: Attempt) -> int:
        with reserve(shape, args.wait) as places:
            _announce(places, shape.gpus, attempt)
            return run_agents(places, shape.gpus, attempt, config, environment, stop)

    retries = job.launch.retries if args.retries is None else args.retries
    try:
        return supervise(start, job_id, retries, stop.requested)
    except KeyboardInterrupt:  # while it waited for GPUs, or after the requests that it passes on
        return 128 + signal.SIGINT


def read_environment(words: Sequence[str]) -> dict[str, str]:
    """Variables as --env names them: NAME=VALUE, or NAME for its value here.

    Raises:
        UserError: NAME has no value here.
    """
    found = {}
    for word in words:
        name, given, value = word.partition("=")
        if not given and name not in os.environ:
            raise UserError(f"--env {name}: {name} is not set here; give it as {name}=VALUE")
        found[name] = value if given else os.environ[name]
    return found


def _join_cluster(args: argparse.Namespace) -> bool:
    """Join the cluster; False where the job is to run on this machine instead."""
    from specdist_launch.ray_hosts import LOCAL, ClusterError, cluster_address, connect

    try:
        address = cluster_address(args.address, os.environ)
        if address != LOCAL:
            connect(address)
    except ClusterError as error:
        if not args.local_fallback:
            raise
        print(f"specdist: {error}; starting on this machine (--local-fallback)", file=sys.stderr)
        return False
    return address != LOCAL


def _train_here(args: argparse.Namespace) -> int:
    from specdist_launch import cli

    retries = [] if args.retries is None else ["--retries", str(args.retries)]
    return cli.main(["train", *args.config, *retries])


def _ranks(job: JobConfig) -> int | None:
    """The job's ranks; None where its configuration leaves them open."""
    from specdist_launch.local import world_size

    return None if job.draft.dp is None else world_size(job, 0)


def _snapshot(job: JobConfig, job_id: str) -> Path:
    """Write the resolved configuration where all hosts see it."""
    from specdist.core.config import to_yaml
    from specdist.core.files import write_atomically

    path = Path(job.run.dir).absolute() / "logs" / f"{job_id}.yaml"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, to_yaml(job))
    except OSError as error:
        raise ConfigError.at("run.dir", f": {job.run.dir} cannot be written: {error}") from error
    return path


def _announce(places: Sequence[Place], gpus: int, attempt: Attempt) -> None:
    hosts = ", ".join(place.host.address for place in places)
    print(f"specdist: {attempt.name}: {gpus} ranks on each of {hosts}", file=sys.stderr)
