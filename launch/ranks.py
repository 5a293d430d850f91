# SPDX-License-Identifier: Apache-2.0
"""How many ranks a job has, and how many of them each node."""

from specdist.core.errors import ConfigError
from specdist.job.sections import JobConfig


def world_size(job: JobConfig, devices: int) -> int:
    """How many ranks to start: what the config adds up to, or one per GPU where it leaves a number open."""
    target, draft = job.target.replicas * job.target.tp, job.draft.dp
    if job.world.role == "target":
        return target
    if job.world.mode == "split" and job.world.role == "both":
        if draft is not None:
            return target + draft * job.draft.cp
        if devices > target:
            return devices
        raise ConfigError.at(
            "draft.dp",
            f"is not set and this machine shows {devices} GPUs: set draft.dp (or --nproc-per-node, where the "
            f"command has it) to say how many ranks beside the {target} of the target to start",
        )
    if job.world.role == "draft":
        target = 0
    return max(devices, 1) if draft is None else max(draft * job.draft.cp, target)


def ranks_per_node(job: JobConfig, nodes: int) -> int:
    """The ranks of each of `nodes` equal nodes; raises ConfigError where the job's ranks do not divide among them."""
    ranks = world_size(job, 0)
    if ranks % nodes:
        raise ConfigError(
            f"{ranks} ranks (target.replicas x target.tp + draft.dp x draft.cp) do not divide among {nodes} nodes: "
            "change one of them, or say with --nproc-per-node how many ranks each node has",
            "target.replicas target.tp draft.dp draft.cp",
        )
    return ranks // nodes
