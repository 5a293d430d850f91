# SPDX-License-Identifier: Apache-2.0
"""Which steps are traced: the keys, and the items that belong to them."""

from __future__ import annotations

from dataclasses import dataclass

from specdist.core.errors import ConfigError
from specdist.core.progress import Progress

WARM_UP_STEPS = 20
"""Steps of a start that are over before it is traced, where trace.start does not say: compilation, allocations."""
_MOST_STEPS = 1000


@dataclass(frozen=True)
class TraceConfig:
    """A timeline of a few steps over all ranks, for Perfetto (docs/trace.md)."""

    steps: int | None = None
    """Optimizer steps to record, at most 1000; null records nothing. Every start of the job writes one timeline, and
    `specdist trace RUN_DIR` puts it together."""
    start: int | None = None
    """The first of them, 1 being the first of the run; null is the 21st step of every start, after it has warmed up."""

    def __post_init__(self) -> None:
        if self.steps is not None and not 1 <= self.steps <= _MOST_STEPS:
            raise ConfigError.at("trace.steps", f"is a number of steps, 1 to {_MOST_STEPS}, or null, not {self.steps}")
        if self.start is not None and self.start < 1:
            raise ConfigError.at("trace.start", f"is at least 1, the first step of the run, not {self.start}")
        if self.start is not None and self.steps is None:
            raise ConfigError.at(
                "trace.start",
                f"={self.start} records nothing: say with trace.steps how many steps it shall be",
                "trace.steps",
            )

    def check(self, last_step: int | None) -> None:
        """Raise ConfigError where no start of a job whose last step is known could reach the first traced one."""
        first = self.start or WARM_UP_STEPS + 1
        if self.steps is not None and last_step is not None and first > last_step:
            default = "" if self.start else " (trace.start=null, after the warm-up)"
            raise ConfigError.at(
                "trace.steps",
                f"={self.steps} would record nothing: it begins with step {first}{default} and "
                f"train.steps={last_step}; set trace.start to a step of the run",
                "train.steps trace.start",
            )


@dataclass(frozen=True)
class Window:
    """The traced steps, `first_step` being 1 for the first of the run, and the items that they are made of."""

    first_step: int
    last_step: int
    items: range


def find_window(config: TraceConfig, progress: Progress, end_item: int, accumulation: int) -> Window | None:
    """What a start of the job records that goes on from `progress` and ends before item `end_item`; None for nothing.

    Steps that an earlier start has done are left out.
    """
    if config.steps is None:
        return None
    first = config.start or progress.step + WARM_UP_STEPS + 1
    last = first + config.steps - 1
    first = max(first, progress.step + 1)

    def item(step: int) -> int:
        return min(progress.next_item + (step - progress.step) * accumulation, end_item)

    items = range(item(first - 1), item(last)) if last >= first else range(0)
    if not items:
        return None
    return Window(first, first + -(-len(items) // accumulation) - 1, items)
