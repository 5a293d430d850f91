# SPDX-License-Identifier: Apache-2.0
"""What the recorder keeps of a span while it may still be under way on the device or on a link."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

import torch
import torch.distributed as dist

from specdist.core.trace import Transfer, Value
from specdist.run.trace.device import DeviceClock
from specdist.run.trace.part import Span

DEVICE = "device"
"""The track of what the current stream of the device does."""


def thread_track() -> str:
    """The calling thread's track; the main thread's is called host."""
    name = threading.current_thread().name
    return "host" if name == "MainThread" else name.removeprefix("specdist-")


class HostSpan:
    """A stretch of the calling thread, given to `keep` when it ends."""

    __slots__ = ("_args", "_began", "_keep", "_name")

    def __init__(self, keep: Callable[[Span], None], name: str, args: dict[str, Value]):
        self._keep, self._name, self._args = keep, name, args

    def __enter__(self) -> None:
        self._began = time.monotonic_ns()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._keep(Span(thread_track(), self._name, self._began, time.monotonic_ns(), self._args))


@dataclass
class Timed:
    """A stretch on the device between two events."""

    name: str
    args: dict[str, Value]
    began: torch.cuda.Event
    ended: torch.cuda.Event | None = None

    def over(self) -> bool:
        return self.ended is not None and self.ended.query()

    def span(self, clock: DeviceClock) -> Span | None:
        """The stretch on the host's clock; None unless it is over."""
        if not self.over():
            return None
        assert self.ended is not None
        return Span(DEVICE, self.name, clock.time(self.began), clock.time(self.ended), self.args)


class ComputeSpan(HostSpan):
    """The same on the host, where it is launched, and on the current stream of the device."""

    __slots__ = ("_timed",)

    def __init__(
        self, keep: Callable[[Span], None], time_it: Callable[[Timed], None], name: str, args: dict[str, Value]
    ):
        super().__init__(keep, name, args)
        self._timed = Timed(name, args, torch.cuda.Event(enable_timing=True))
        time_it(self._timed)

    def __enter__(self) -> None:
        super().__enter__()
        self._timed.began.record()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:  # else the device may be what failed, and what it says now would hide the error
            self._timed.ended = torch.cuda.Event(enable_timing=True)
            self._timed.ended.record()
        super().__exit__(kind, error, trace)


Watch = Callable[[dist.Work, Callable[[], None]], dist.Work]
"""Calls the function when the transfer ends; returns what is to be waited for in its place."""


def _unwatched(work: dist.Work, ended: Callable[[], None]) -> dist.Work:
    return work


class HostTransfer(Transfer):
    """A transfer that the host issues and whose end the host sees."""

    def __init__(self, track: str, name: str, args: dict[str, Value], watch: Watch):
        self._track, self._name, self._args, self._watch = track, name, args, watch
        self._began, self._ended = time.monotonic_ns(), 0

    def issued(self, work: dist.Work) -> dist.Work:
        return self._watch(work, self.ended)

    def ended(self) -> None:
        self._ended = time.monotonic_ns()

    def over(self) -> bool:
        return self._ended > 0

    def span(self, clock: DeviceClock | None) -> Span:
        """The transfer; one whose end was not seen lasts until this moment."""
        if self._ended:
            return Span(self._track, self._name, self._began, self._ended, self._args)
        return Span(self._track, self._name, self._began, time.monotonic_ns(), {**self._args, "unfinished": True})


class DeviceTransfer(HostTransfer):
    """A transfer on the device: it begins when the current stream comes to it, and ends when a stream that does nothing
    but wait for it has waited. No other stream and no host thread waits for that."""

    def __init__(self, track: str, name: str, args: dict[str, Value], stream: torch.cuda.Stream):
        super().__init__(track, name, args, _unwatched)
        self._stream = stream
        self._begin, self._end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._issued = False
        self._begin.record()

    def issued(self, work: dist.Work) -> dist.Work:
        with contextlib.suppress(RuntimeError), torch.cuda.stream(self._stream):  # whoever needs the rows tells it
            work.wait()  # for NCCL: orders this stream behind it
            self._end.record()
            self._issued = True
        return work

    def ended(self) -> None:
        """The device knows better than the host when it was."""

    def over(self) -> bool:
        return self._issued and self._end.query()

    def span(self, clock: DeviceClock | None) -> Span:
        if clock is None or not self.over():
            return super().span(None)
        return Span(self._track, self._name, clock.time(self._begin), clock.time(self._end), self._args)
