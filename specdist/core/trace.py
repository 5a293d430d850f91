# SPDX-License-Identifier: Apache-2.0
"""What the stations of a rank tell the timeline. These forms keep nothing and cost next to nothing; `recorder` keeps.

Everything that is recorded belongs to a work item, so that all ranks record the same stretch of the run: target ranks
know no steps. What belongs to a whole step is told with its first item.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch.distributed as dist

from specdist.core.clock import ClockReading
from specdist.core.topology import Link

Value = int | float | str | bool
AskClock = Callable[[float], ClockReading]
"""Asks rank 0 for its time, within a number of seconds; raises WorldError."""


class Transfer:
    """A payload on a link, from its issue on."""

    def issued(self, work: dist.Work) -> dist.Work:
        """The transfer is under way, as `work`; returns what is to be waited for in its place."""
        return work

    def ended(self) -> None:
        """It is known to have ended, at the latest at this moment."""


NOTHING: AbstractContextManager[None] = nullcontext()
NO_TRANSFER = Transfer()


class Trace:
    """The recorder that is off."""

    on = False

    def reach(self, item: int) -> None:
        """All before `item` is done on this rank, and `item` is next."""

    def recording(self, ask: AskClock) -> AbstractContextManager[None]:
        """Around the rank's work: what is not written when it ends is written then."""
        return NOTHING

    def abandon(self) -> None:
        """The world has failed: what was recorded is written without waiting for anything."""

    def finish(self) -> None:
        """Nothing more comes: waits until what was recorded is written. The control plane is still up."""

    def span(self, name: str, item: int, **args: Value) -> AbstractContextManager[None]:
        """What happens inside, on the calling thread's track."""
        return NOTHING

    def compute(self, name: str, item: int, **args: Value) -> AbstractContextManager[None]:
        """The same, and what the current stream of the device does of it, on the device's track."""
        return NOTHING

    def waited(self, name: str, since_ns: int, item: int) -> None:
        """The calling thread has waited, since a moment of `time.monotonic_ns`, for what turned out to be `item`."""

    def transfer(self, name: str, item: int, link: Link, size: int, on_device: bool = False) -> Transfer:
        """`size` bytes of `item` are about to cross `link`; `on_device`: in order with the current CUDA stream."""
        return NO_TRANSFER

    def count(self, name: str, lowest: int, highest: int, **values: int) -> None:
        """Quantities at this moment, at which the items `lowest` to `highest` are on their way."""


NO_TRACE = Trace()
