# SPDX-License-Identifier: Apache-2.0
"""How a job is started, watched and started again."""

from __future__ import annotations

from dataclasses import dataclass, field

from specdist.core.errors import ConfigError
from specdist.job.slurm_config import ContainerConfig, SlurmConfig


@dataclass(frozen=True)
class LaunchConfig:
    """How a job is started, watched and started again."""

    retries: int = 3
    """How often a batch job that failed is started again. Preemptions do not count, and progress since the failure
    before starts the count anew. An error of the user's, or the same one at the same step, is never tried again. As
    often may the time limit come before a single step is done."""
    stop_before_end_s: float = 120.0
    """So many seconds before the batch system's time limit the job saves and leaves, to be started again."""
    meet_timeout_s: float = 300.0
    """How long the agents of a job's nodes wait for each other, in seconds, before they name those that are missing."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    """What is asked of Slurm."""
    container: ContainerConfig = field(default_factory=ContainerConfig)
    """The container that a batch job's processes run in."""

    def __post_init__(self) -> None:
        if self.retries < 0:
            raise ConfigError.at("launch.retries", f"is at least 0, not {self.retries}")
        for key in ("stop_before_end_s", "meet_timeout_s"):
            if getattr(self, key) <= 0:
                raise ConfigError.at(f"launch.{key}", f"is a number of seconds > 0, not {getattr(self, key)}")
