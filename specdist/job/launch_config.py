# SPDX-License-Identifier: Apache-2.0
"""How a job is started, watched and started again: what is asked of Slurm, its container, the checks of its hosts."""

import re
from dataclasses import dataclass, field, replace
from typing import Literal

from specdist.channel.config import parse_bytes
from specdist.core.errors import ConfigError, check_range

_TIME = re.compile(r"(\d+-\d+(:\d+){0,2}|\d+(:\d+){1,2}|UNLIMITED|INFINITE)")


@dataclass(frozen=True)
class NodesConfig:
    """One component of a heterogeneous job: nodes of one kind, which all take one role. Unset: as the job's."""

    nodes: int = 0
    """How many. Set for both roles, or for none."""
    gpus_per_node: int | None = None
    """GPUs of each; every one gets a rank."""
    partition: str | None = None
    """Where they come from."""
    constraint: str | None = None
    """Features they must have."""


@dataclass(frozen=True)
class SlurmConfig:
    """What `specdist launch slurm` asks of Slurm; its options of the same names override these."""

    nodes: int = 1
    """Nodes of the job; each runs one agent, which starts the ranks."""
    gpus_per_node: int | None = None
    """GPUs of each node; every one gets a rank. Unset: no GPUs are asked for, the config's ranks are divided."""
    partition: str | None = None
    """Partition, or several with commas; unset: the cluster's default."""
    time: str | None = None
    """Time limit, [DAYS-]HOURS:MINUTES:SECONDS. Write it in quotes: YAML reads a bare 4:00:00 as the number 14400."""
    account: str | None = None
    """Account to charge."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features the nodes must have."""
    exclude: str | None = None
    """Nodes to leave out, as `specdist doctor` names bad ones."""
    reservation: str | None = None
    """Reservation to run in."""
    job_name: str = "specdist"
    """The name in the queue."""
    exclusive: bool = True
    """Whole nodes, with all their processors and memory. false: say with cpus_per_task what the job gets of each."""
    cpus_per_task: int | None = None
    """Processors of each node. Unset: all of them if exclusive, else Slurm's default, which may be one."""
    options: list[str] = field(default_factory=list)
    """Further options of sbatch, as --mail-type=END."""
    setup: list[str] = field(default_factory=list)
    """Shell lines that run before the ranks start, as `module load cuda` or `source .venv/bin/activate`. Unset: this
    Python, and the environment of the shell that submits."""
    target: NodesConfig = field(default_factory=NodesConfig)
    """Heterogeneous job: the target's nodes."""
    draft: NodesConfig = field(default_factory=NodesConfig)
    """Heterogeneous job: the draft's nodes."""

    def __post_init__(self) -> None:
        check_range("launch.slurm", self, "nodes", "gpus_per_node", "cpus_per_task", least=1, most=10**4)
        for role in ("target", "draft"):
            check_range(f"launch.slurm.{role}", getattr(self, role), "gpus_per_node", least=1, most=10**4)
            check_range(f"launch.slurm.{role}", getattr(self, role), "nodes", most=10**4)
        if self.time is not None and not _TIME.fullmatch(self.time):
            raise ConfigError.at(
                "launch.slurm.time",
                f"is [DAYS-]HOURS:MINUTES:SECONDS in quotes ('4:00:00'; YAML reads a bare 4:00:00 as "
                f"the number 14400), not '{self.time}'",
            )
        if (self.target.nodes > 0) != (self.draft.nodes > 0) or min(self.target.nodes, self.draft.nodes) < 0:
            raise ConfigError.at(
                "launch.slurm.target.nodes",
                f"={self.target.nodes}, launch.slurm.draft.nodes={self.draft.nodes}: a "
                "heterogeneous job has nodes of both, any other job sets neither",
                "launch.slurm.draft.nodes",
            )
        if self.heterogeneous and any(component.gpus_per_node is None for component in self.components):
            raise ConfigError.at(
                "launch.slurm.gpus_per_node",
                ": a heterogeneous job sets it for target and draft, or for all nodes; each GPU gets a rank",
            )

    @property
    def time_s(self) -> float | None:
        """The time limit in seconds; None where there is none. Slurm's M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
        if self.time in (None, "UNLIMITED", "INFINITE"):
            return None
        days, dash, rest = self.time.rpartition("-")
        parts = [int(part) for part in rest.split(":")]
        hours, minutes, seconds = [*parts, 0, 0][:3] if dash or len(parts) == 3 else [0, *parts]
        return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds

    @property
    def components(self) -> list[NodesConfig]:
        """The nodes to ask for, one entry a component, the target's first; a plain job has one."""
        own = NodesConfig(self.nodes, self.gpus_per_node, self.partition, self.constraint)
        if not self.heterogeneous:
            return [own]
        return [
            replace(own, **{name: value for name, value in vars(part).items() if value})
            for part in (self.target, self.draft)
        ]

    @property
    def heterogeneous(self) -> bool:
        return self.target.nodes > 0


@dataclass(frozen=True)
class ContainerConfig:
    """The container that a job's processes run in."""

    kind: Literal["none", "pyxis", "apptainer"] = "none"
    """none: no container; pyxis: srun's --container-image (enroot); apptainer: apptainer exec --nv."""
    image: str | None = None
    """What the runtime takes: /images/specdist.sqsh or nvcr.io#org/image:tag (pyxis), image.sif (apptainer)."""
    mounts: list[str] = field(default_factory=list)
    """Further HOST_PATH:CONTAINER_PATH; the working and the run directory are mounted at their own places anyway."""
    options: list[str] = field(default_factory=list)
    """Further options of the runtime, as --no-container-entrypoint or --cleanenv."""

    def __post_init__(self) -> None:
        if (self.kind == "none") != (self.image is None):
            raise ConfigError.at(
                "launch.container.kind",
                f"={self.kind} with launch.container.image={self.image or 'null'}: set both, or neither",
                "launch.container.image",
            )


@dataclass(frozen=True)
class LaunchConfig:
    """How a job is started, watched and started again."""

    retries: int = 3
    """How often a batch job that failed is started again. Preemptions do not count, and progress since the failure
    before starts the count anew. An error of the user's, or the same one at the same step, is never tried again. As
    often may the time limit come before a single step is done."""
    stop_before_end_s: float = 120.0
    """So many seconds before the batch system's time limit the job saves and leaves, to be started again."""
    on_event: str | None = None
    """Shell command that the first node runs when a start has ended, as `mail -s "$SPECDIST_EVENT $SPECDIST_RUN_DIR"
    me@example.org`: SPECDIST_EVENT is finished, stopped (asked to, as at a preemption) or failed, SPECDIST_REASON says
    why and what follows. It has a minute."""
    meet_timeout_s: float = 300.0
    """How long the agents of a job's nodes wait for each other, in seconds, before they name those that are missing."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    """What is asked of Slurm."""
    container: ContainerConfig = field(default_factory=ContainerConfig)
    """The container that a batch job's processes run in."""

    def __post_init__(self) -> None:
        if self.slurm.time_s is not None and self.slurm.time_s <= self.stop_before_end_s:
            raise ConfigError.at(
                "launch.slurm.time",
                f"={self.slurm.time} is no more than launch.stop_before_end_s={self.stop_before_end_s:g}, the seconds "
                "before its end in which a job saves and leaves: give it more time, or set that lower",
                "launch.stop_before_end_s",
            )
        check_range("launch", self, "retries", least=0)
        check_range("launch", self, "stop_before_end_s", "meet_timeout_s", above=0)


@dataclass(frozen=True)
class PreflightConfig:
    """The checks at the start of a job; `specdist doctor` makes the same ones without a run."""

    level: Literal["skip", "warn", "strict"] = "warn"
    """skip: no checks at the start of a job; warn: report, and stop only on what would certainly fail; strict: stop on
    every problem."""
    links: bool = True
    """Measure the bandwidth of every link at the start of a job."""
    min_free_memory: float = 0.9
    """The share of a GPU's memory that must be free at the start; below it, something else is on the GPU."""
    max_clock_skew_s: float = 2.0
    """How far a host's clock may be from that of rank 0, in seconds."""
    min_link_gb_per_s: float | None = None
    """A link slower than this is a problem, in 10^9 bytes a second; null: only compare the links with each other."""
    link_payload: str | None = None
    """What is sent to measure a link, for example 64MiB; null: 64MiB between GPUs, 4MiB between CPUs."""
    report: str | None = None
    """A file that rank 0 writes the whole report to, as JSON; null: none."""

    def __post_init__(self) -> None:
        check_range("preflight", self, "min_free_memory", least=0, most=1)
        check_range("preflight", self, "max_clock_skew_s", "min_link_gb_per_s", above=0)
        if self.link_payload is not None and parse_bytes(self.link_payload, "preflight.link_payload") < 1:
            raise ConfigError.at("preflight.link_payload", "is at least one byte")
