# SPDX-License-Identifier: Apache-2.0
"""Waits for the end of what is traced and writes it, in a thread that lives from the first traced item until then.

Here is all that takes time: waiting for the device, asking rank 0 for the time, the file.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from specdist.core.clock import ClockOffset, clock_offset
from specdist.core.errors import WorldError
from specdist.core.trace import AskClock
from specdist.run.trace.device import DeviceClock
from specdist.run.trace.part import Count, Part, Span
from specdist.run.trace.spans import HostTransfer, Timed
from specdist.training.trace_config import Window

logger = logging.getLogger(__name__)

_READINGS = 32
_ANSWER_S = 5.0
_SETTLE_S = 30.0
"""How long what is under way when the last traced item is over may take to end."""
_FINISH_S = 60.0
_LEAVE_S = 1.0


@dataclass(frozen=True)
class Who:
    """The rank that records."""

    rank: int
    ranks: int
    label: str
    host: str
    device: torch.device


@dataclass
class Kept:
    """What was recorded so far; `dropped` records found no room."""

    spans: list[Span] = field(default_factory=list)
    counts: list[Count] = field(default_factory=list)
    timed: list[Timed] = field(default_factory=list)
    transfers: list[HostTransfer] = field(default_factory=list)
    dropped: int = 0

    def __bool__(self) -> bool:
        return bool(self.spans or self.counts or self.timed or self.transfers)

    def over(self) -> bool:
        """Whether nothing of it is still under way."""
        return all(timed.over() for timed in self.timed) and all(transfer.over() for transfer in self.transfers)


def one_after_another(spans: Iterable[Span]) -> Iterator[Span]:
    """Spans of one stream in its order; where rounding made neighbours overlap, the later one begins later."""
    free = 0
    for span in sorted(spans, key=lambda s: (s.began, s.ended)):
        began = max(span.began, free)
        free = max(span.ended, began)
        yield span._replace(began=began, ended=free)


class Writer:
    """Writes `kept` once all that is traced is over; `counted` is of rank 0, whose own role may end long before the
    items do. `ask` is None where rank 0 cannot be asked."""

    def __init__(self, kept: Kept, window: Window, who: Who, directory: Path):
        self._kept, self._window, self._who, self._directory = kept, window, who, directory
        self.ask: AskClock | None = None
        self.over, self.counted, self._hurry = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="specdist-trace", daemon=True)

    def start(self) -> None:
        """The first traced item has come. Does nothing when called again."""
        if self._thread.ident is None:
            self._thread.start()

    def hurry(self) -> None:
        """Write without waiting for anything."""
        self.ask = None
        for event in (self._hurry, self.over, self.counted):
            event.set()

    def join(self) -> None:
        """Nothing more comes; wait until it is written, if there is anything to write."""
        self.over.set()
        self.counted.set()
        if self._kept:  # of a target rank that had none of the items, or of steps that were never done
            self.start()
        if self._thread.ident is not None:
            self._thread.join(_LEAVE_S if self._hurry.is_set() else _FINISH_S)

    def _work(self) -> None:
        clock = DeviceClock(self._who.device) if self._who.device.type == "cuda" else None
        try:
            if clock is not None:
                clock.anchor()
            self.over.wait()
            if self._kept.counts:
                self.counted.wait()
            self._settle()
            if clock is not None:
                clock.anchor()
        except RuntimeError as error:  # the device has failed; what the host did is known all the same
            logger.warning("what the device did is missing from the trace: %s", error)
            clock = None
        try:
            self._part(clock).write(self._directory)
        except OSError as error:  # a trace is never worth a run
            logger.warning("this rank's part of the trace could not be written: %s", error)

    def _settle(self) -> None:
        """Wait until what was traced has ended, within limits."""
        deadline = time.monotonic() + _SETTLE_S
        while not self._kept.over() and time.monotonic() < deadline:
            if self._hurry.wait(timeout=0.05):
                return

    def _offset(self) -> ClockOffset | None:
        ask = self.ask
        if ask is None:
            return None
        try:
            return clock_offset([ask(_ANSWER_S) for _ in range(_READINGS)])
        except WorldError as error:
            logger.warning("this rank's clock could not be compared with rank 0's: %s", error)
            return None

    def _part(self, clock: DeviceClock | None) -> Part:
        kept = self._kept
        spans = [*kept.spans, *(transfer.span(clock) for transfer in kept.transfers)]
        if clock is not None:
            spans += one_after_another(span for timed in kept.timed if (span := timed.span(clock)) is not None)
        return Part(
            rank=self._who.rank,
            ranks=self._who.ranks,
            label=self._who.label,
            host=self._who.host,
            first_step=self._window.first_step,
            last_step=self._window.last_step,
            clock=self._offset(),
            wall_ns=time.time_ns() - time.monotonic_ns(),
            device_error_ns=0 if clock is None else clock.error,
            dropped=kept.dropped,
            spans=spans,
            counts=kept.counts,
        )
