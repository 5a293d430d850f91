# SPDX-License-Identifier: Apache-2.0
"""How far the target runs ahead, and how long the control plane waits."""

from dataclasses import dataclass

from specdist.core.errors import ConfigError, check_range


@dataclass(frozen=True)
class SchedulerConfig:
    """How far the target may run ahead of the draft; the receive buffers (channel.memory) bound it too."""

    queue_depth: int = 2
    """Batches outstanding at one target replica, at most channel.send_buffers: 1 computing, the others queued so that
    it never waits for a message."""

    def __post_init__(self) -> None:
        check_range("scheduler", self, "queue_depth", least=1)


@dataclass(frozen=True)
class ControlConfig:
    """Liveness of the ranks, seen from the scheduler and back."""

    heartbeat_s: float = 5.0
    """Seconds between signs of life, in both directions."""
    silence_s: float = 120.0
    """After this many seconds without a message a rank (or the scheduler) is taken for dead and named."""
    load_timeout_s: float = 1800.0
    """Seconds from the start until every rank must have loaded its models and be ready."""

    replica_timeout_s: float = 1800.0
    """Two worlds: seconds for which the draft world goes on without any target replica before it gives up."""
    scheduler_timeout_s: float = 1800.0
    """Two worlds: seconds for which a target world looks for the scheduler, or waits for it to come back."""

    def __post_init__(self) -> None:
        seconds = ("heartbeat_s", "load_timeout_s", "replica_timeout_s", "scheduler_timeout_s")
        check_range("control", self, *seconds, above=0)
        if self.silence_s < 2 * self.heartbeat_s:
            raise ConfigError.at(
                "control.silence_s",
                f"({self.silence_s}) must be at least twice control.heartbeat_s ({self.heartbeat_s})",
                "control.heartbeat_s",
            )
