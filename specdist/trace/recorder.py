# SPDX-License-Identifier: Apache-2.0
"""Keeps what a rank tells of the traced items in memory, and writes it when they are over.

The stations only append to lists and record events. What waits for the device, asks rank 0 for the time and writes the
file is a thread that lives from the first traced item until that is done.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from specdist.errors import WorldError
from specdist.topology import Link
from specdist.trace.base import NO_TRANSFER, NOTHING, AskClock, Trace, Transfer, Value
from specdist.trace.clock import ClockOffset, clock_offset
from specdist.trace.config import Window
from specdist.trace.device import DeviceClock
from specdist.trace.part import Count, Part, Span
from specdist.trace.spans import ComputeSpan, DeviceTransfer, HostSpan, HostTransfer, Timed, thread_track

logger = logging.getLogger(__name__)

_MOST_RECORDS = 200_000
_READINGS = 32
_ANSWER_S = 5.0
_SETTLE_S = 30.0
"""How long what is under way when the last traced item is over may take to end."""
_LEAVE_S = 1.0
_LINK_STREAMS = 16


@dataclass(frozen=True)
class Who:
    """The rank that records."""

    rank: int
    ranks: int
    label: str
    host: str
    device: torch.device


class Recorder(Trace):
    """The recorder of a rank. Several threads may tell it things; `reach` is for the rank's main loop alone.

    Args:
        directory: where the parts of all ranks go.
        most: records that are kept at most; what is beyond is counted.
    """

    on = True

    def __init__(self, window: Window, who: Who, directory: Path, most: int = _MOST_RECORDS):
        self._window, self._items, self._who, self._directory = window, window.items, who, directory
        self._cuda = who.device.type == "cuda"
        self._room, self._dropped = most, 0
        self._spans: list[Span] = []
        self._counts: list[Count] = []
        self._timed: list[Timed] = []
        self._transfers: list[HostTransfer] = []
        self._streams: dict[Link, torch.cuda.Stream] = {}
        self._ask: AskClock | None = None
        self._over, self._hurry = threading.Event(), threading.Event()
        self._writer: threading.Thread | None = None

    @contextmanager
    def recording(self, ask: AskClock) -> Iterator[None]:
        """After an error, what is not written is written without waiting for anything."""
        self._ask = ask
        try:
            yield
        except BaseException:
            self._ask = None
            self._hurry.set()
            raise
        finally:
            self.finish()

    def finish(self) -> None:
        self._over.set()
        if self._writer is not None:
            self._writer.join(_LEAVE_S if self._hurry.is_set() else _SETTLE_S + _READINGS * _ANSWER_S)

    def reach(self, item: int) -> None:
        if self._writer is None and item >= self._items.start:
            self._writer = threading.Thread(target=self._write_soon, name="specdist-trace", daemon=True)
            self._writer.start()
        if item >= self._items.stop:
            self._over.set()

    def span(self, name: str, item: int, **args: Value) -> AbstractContextManager[None]:
        if item not in self._items or not self._has_room():
            return NOTHING
        return HostSpan(self._spans.append, name, {"item": item, **args})

    def compute(self, name: str, item: int, **args: Value) -> AbstractContextManager[None]:
        if not self._cuda:
            return self.span(name, item, **args)
        if item not in self._items or not self._has_room():
            return NOTHING
        return ComputeSpan(self._spans.append, self._timed.append, name, {"item": item, **args})

    def waited(self, name: str, since_ns: int, item: int) -> None:
        if item in self._items and self._has_room():
            self._spans.append(Span(thread_track(), name, since_ns, time.monotonic_ns(), {"item": item}))

    def transfer(self, name: str, item: int, link: Link, size: int, on_device: bool = False) -> Transfer:
        if item not in self._items or not self._has_room():
            return NO_TRANSFER
        track = f"link {link.source} to {link.destination}"
        args: dict[str, Value] = {
            "item": item, "bytes": size, "source": link.source, "destination": link.destination,
        }  # fmt: skip
        made = DeviceTransfer(track, name, args, self._stream(link)) if on_device else HostTransfer(track, name, args)
        self._transfers.append(made)
        return made

    def count(self, name: str, lowest: int, highest: int, **values: int) -> None:
        if lowest >= self._items.stop or highest < self._items.start:
            return
        if self._counts and self._counts[-1].values == values:
            return
        if self._has_room():
            self._counts.append(Count(name, time.monotonic_ns(), values))

    def _has_room(self) -> bool:
        """Take room for one record. Threads may overdraw by one each: it is a bound on memory, not a sum to keep."""
        if self._room > 0:
            self._room -= 1
            return True
        self._dropped += 1
        return False

    def _stream(self, link: Link) -> torch.cuda.Stream:
        """A stream to wait for the transfers of `link` on: few of them, of a priority that nothing else here uses, so
        that CUDA does not give out one that does work."""
        if link not in self._streams:
            made = list(self._streams.values())
            full = len(made) >= _LINK_STREAMS
            self._streams[link] = (
                made[len(made) % _LINK_STREAMS] if full else torch.cuda.Stream(self._who.device, priority=-1)
            )
        return self._streams[link]

    def _write_soon(self) -> None:
        """The body of the thread."""
        clock = DeviceClock(self._who.device) if self._cuda else None
        try:
            if clock is not None:
                clock.anchor()
            self._over.wait()
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
        while time.monotonic() < deadline:
            if all(timed.over() for timed in self._timed) and all(transfer.over() for transfer in self._transfers):
                return
            if self._hurry.wait(timeout=0.05):
                return

    def _offset(self) -> ClockOffset | None:
        if self._ask is None:
            return None
        try:
            return clock_offset([self._ask(_ANSWER_S) for _ in range(_READINGS)])
        except WorldError as error:
            logger.warning("this rank's clock could not be compared with rank 0's: %s", error)
            return None

    def _part(self, clock: DeviceClock | None) -> Part:
        spans = [*self._spans, *(transfer.span(clock) for transfer in self._transfers)]
        if clock is not None:
            spans += [span for timed in self._timed if (span := timed.span(clock)) is not None]
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
            dropped=self._dropped,
            spans=spans,
            counts=self._counts,
        )
