# SPDX-License-Identifier: Apache-2.0
"""Start a world on a Ray cluster's hosts: `specdist launch ray`. This folder is the only part that knows Ray.

Ray finds the GPU hosts, reserves them and runs one task on each, which is no more than the parent of that host's agent.
The ranks are torchrun's and know nothing of Ray.
"""

import argparse
import os

from specdist.core.errors import UserError, say
from specdist.core.launch_env import TOKEN, Attempt, make_token
from specdist_launch import words


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


def main(args: argparse.Namespace) -> int:
    environment = read_environment(args.env)
    from specdist_launch.agents import new_job, supervise
    from specdist_launch.ranks import world_size
    from specdist_launch.ray.agents import run_agents
    from specdist_launch.ray.cluster import choose_shape, cluster_address, connect, gpu_hosts, reserve

    connect(cluster_address(args.address, os.environ))
    job = words.load_checked(args.config)
    ranks = None if job.draft.dp is None else world_size(job, 0)
    shape = choose_shape(ranks, args.nodes, args.gpus_per_node, gpu_hosts())
    config, text = words.snapshot(job, "logs")
    words.save(config, text)

    if not job.world.scheduler:
        make_token()
    environment = {name: os.environ[name] for name in (TOKEN,) if name in os.environ} | environment

    def start(attempt: Attempt, received: list[int]) -> int:
        with reserve(shape, args.wait) as hosts:
            named = ", ".join(host.address for host in hosts)
            say(f"{attempt.name}: {shape.gpus} ranks on each of {named}")
            return run_agents(hosts, shape.gpus, attempt, config, environment, received)

    return supervise(start, new_job("ray"), job.launch.retries if args.retries is None else args.retries)


def read_environment(words: list[str]) -> dict[str, str]:
    """Variables as --env names them: NAME=VALUE, or NAME for its value here. Raises UserError: it has none."""
    found = {}
    for word in words:
        name, given, value = word.partition("=")
        if not given and name not in os.environ:
            raise UserError(f"--env {name}: {name} is not set here; give it as {name}=VALUE")
        found[name] = value if given else os.environ[name]
    return found
