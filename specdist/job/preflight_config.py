# SPDX-License-Identifier: Apache-2.0
"""What is checked before a run, and what is done about it."""

from dataclasses import dataclass
from typing import Literal

from specdist.channel.config import parse_bytes
from specdist.core.errors import ConfigError, check_range


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
