# SPDX-License-Identifier: Apache-2.0
"""How long the control plane waits."""

from __future__ import annotations

from dataclasses import dataclass

from specdist.errors import ConfigError


@dataclass(frozen=True)
class ControlConfig:
    """Liveness of the ranks, seen from the scheduler and back."""

    heartbeat_s: float = 5.0
    """Seconds between signs of life, in both directions."""
    silence_s: float = 120.0
    """A rank (or the scheduler) that was not heard for so many seconds is taken for dead and named."""
    load_timeout_s: float = 1800.0
    """Seconds from the start until every rank must have loaded its models and be ready."""

    def __post_init__(self) -> None:
        if self.heartbeat_s <= 0:
            raise ConfigError(f"control.heartbeat_s is a number of seconds > 0, not {self.heartbeat_s}")
        if self.silence_s < 2 * self.heartbeat_s:
            raise ConfigError(
                f"control.silence_s ({self.silence_s}) must be at least twice control.heartbeat_s ({self.heartbeat_s})"
            )
        if self.load_timeout_s <= 0:
            raise ConfigError(f"control.load_timeout_s is a number of seconds > 0, not {self.load_timeout_s}")
