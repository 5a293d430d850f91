# SPDX-License-Identifier: Apache-2.0
"""What the cluster says: its partitions, whether a job fits into them, and submitting it."""

import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from specdist.core.errors import ConfigError, UserError
from specdist.core.launch_env import Role
from specdist.job.config import JobConfig, topology
from specdist.job.launch_config import NodesConfig, SlurmConfig
from specdist_launch.ranks import ranks_per_node

SUBMIT_TIMEOUT_S = 120.0
"""A controller that is this slow to answer is down or overrun."""


@dataclass(frozen=True)
class NodeKind:
    partition: str
    nodes: int
    gpus: int
    default: bool = False
    """Whether this is the partition of jobs that name none."""


def node_kinds() -> list[NodeKind]:
    """The nodes of every partition. Raises UserError where there is no Slurm, or it does not answer."""
    return list(parse_kinds(_ask(["sinfo", "--noheader", "--all", "--format", "%P|%D|%G"])))


def parse_kinds(text: str) -> Iterator[NodeKind]:
    """Read `sinfo --format "%P|%D|%G"`: a star marks the default partition; GPUs are as `gpu:a100:8(S:0-1),nvme:1`."""
    for line in text.splitlines():
        partition, nodes, gres = line.split("|", 2)
        gpus = sum(int(count) for count in re.findall(r"(?:^|,)gpu(?::[^:,(]+)?:(\d+)", gres))
        yield NodeKind(partition.rstrip("*"), int(nodes), gpus, partition.endswith("*"))


def check_ranks(job: JobConfig) -> None:
    """Raise ConfigError where the job's ranks cannot be divided as it asks on the nodes it asks for."""
    slurm = job.launch.slurm
    roles: list[Role | None] = ["target", "draft"] if slurm.heterogeneous else [None]
    hosts: list[str] = []
    of_ranks: list[Role | None] = []
    for role, component in zip(roles, slurm.components, strict=True):
        ranks = component.gpus_per_node or ranks_per_node(job, component.nodes)
        hosts += [f"{role or ''}node{n}" for n in range(component.nodes) for _ in range(ranks)]
        of_ranks += [role] * component.nodes * ranks
    topology(job, hosts, of_ranks if slurm.heterogeneous else ())


def check_fits(slurm: SlurmConfig, kinds: Sequence[NodeKind]) -> None:
    """Raise ConfigError where the job asks for a partition, nodes or GPUs that the cluster does not have.

    What Slurm alone can judge (accounts, limits, features) it says when the job is submitted.
    """
    known = sorted({kind.partition for kind in kinds})
    for component in slurm.components:
        names = sorted({kind.partition for kind in kinds if kind.default})
        if component.partition is not None:
            names = component.partition.split(",")
        for name in names:
            if name not in known:
                raise ConfigError.at(
                    "launch.slurm.partition", f": this cluster has no partition '{name}'; it has {', '.join(known)}"
                )
        if names:  # else there is no default partition
            _check_size(component, ",".join(names), [kind for kind in kinds if kind.partition in names])


def _check_size(component: NodesConfig, partition: str, kinds: Sequence[NodeKind]) -> None:
    gpus, most = component.gpus_per_node or 0, max(kind.gpus for kind in kinds)
    if gpus > most:
        raise ConfigError.at(
            "launch.slurm.gpus_per_node", f"={gpus}: the nodes of partition {partition} have {most} GPUs at most"
        )
    fitting = sum(kind.nodes for kind in kinds if kind.gpus >= gpus)
    if component.nodes > fitting:
        nodes = f"{fitting} nodes with {gpus} GPUs" if gpus else f"{fitting} nodes"
        raise ConfigError.at("launch.slurm.nodes", f"={component.nodes}: partition {partition} has {nodes}")


def complaint(stderr: str) -> str:
    """What one of Slurm's programs prints when it refuses, as one line."""
    return "; ".join(re.sub(r"^(\w+: )?(error: )?", "", line) for line in stderr.splitlines())


def submit(script: Path) -> str:
    """Hand a batch script to Slurm; returns the job's id. Raises UserError with Slurm's own words if it refuses."""
    return _ask(["sbatch", "--parsable", str(script)]).strip().partition(";")[0]


def _ask(command: Sequence[str]) -> str:
    program = command[0]
    if shutil.which(program) is None:
        raise UserError(
            f"{program} not found: no Slurm on this machine. Run this on a login node of the cluster; --dry-run shows "
            "the script here, and specdist.submit with executor='local' runs the job here"
        )
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SUBMIT_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise UserError(f"{program}: Slurm's controller has not answered within {SUBMIT_TIMEOUT_S:.0f} s") from None
    if done.returncode != 0:
        raise UserError(f"{program}: {complaint(done.stderr) or f'exit status {done.returncode}'}")
    return done.stdout
