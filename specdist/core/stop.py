# SPDX-License-Identifier: Apache-2.0
"""Signals set a flag, which the training loop reads between steps, where all ranks can agree; how a process ends."""

import ctypes
import os
import signal
import sys
import time
from enum import StrEnum
from types import FrameType
from typing import NoReturn

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class StopReason(StrEnum):
    """Why a run was asked to stop: a signal, or the end of the batch system's time limit."""

    INTERRUPT = "SIGINT"
    TERMINATE = "SIGTERM"
    USER1 = "SIGUSR1"
    USER2 = "SIGUSR2"
    TIME_LIMIT = "the end of the time limit"
    ANOTHER_RANK = "another rank was asked to"

    @property
    def of_time_limit(self) -> bool:
        """Whether the time limit is behind it: the batch scripts ask for SIGUSR2 shortly before it."""
        return self in (StopReason.TIME_LIMIT, StopReason.USER1, StopReason.USER2)


_PR_SET_PDEATHSIG = 1
"""prctl(2): the signal that the kernel sends to this process when the one that started it ends."""


def end_with_launcher() -> None:
    """Let the kernel send SIGTERM to this process when its launcher dies, so that no rank is ever left behind.

    A launcher that is killed with SIGKILL (out of memory, an impatient user, a batch system at its time limit) cannot
    tell its ranks. They would hold their GPUs until every other wait of theirs has run out.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))


class StopFlag:
    """True once the process was asked to stop. A second SIGINT ends it at once. `deadline`: when the batch system ends
    the job, in seconds since the epoch; `margin_s` seconds before it the flag becomes true by itself."""

    def __init__(self, deadline: float | None = None, margin_s: float = 0.0) -> None:
        self.reason: StopReason | None = None
        self.detail = ""
        self._interrupted = False
        # By a clock that nobody sets: the batch system counts seconds, too.
        self._stop_at = None if deadline is None else time.monotonic() + deadline - margin_s - time.time()

    def __bool__(self) -> bool:
        if self.reason is None and self._stop_at is not None and time.monotonic() >= self._stop_at:
            self.reason = StopReason.TIME_LIMIT
        return self.reason is not None

    def install(self) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)

    def uninstall(self) -> None:
        """From here on a signal ends the process at once: everything worth keeping is saved."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    def request(self, reason: StopReason, detail: str = "") -> None:
        """Ask for a stop from inside the process; the first request counts. `detail`: words that follow the reason."""
        if self.reason is None:
            self.reason, self.detail = reason, detail

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                signal.signal(number, signal.default_int_handler)
                raise KeyboardInterrupt
            self._interrupted = True  # not `reason`: that of another rank may be here before our own signal
        self.request(StopReason(signal.Signals(number).name))


def leave(status: int) -> NoReturn:
    """End the process without finalisers: those of the process groups would wait for ranks that are gone, after a
    failure in threads that are stuck in a transfer with them. All files of the run are closed by now."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:  # also where their reader is gone: a fork would go on as the process that it is a copy of
        os._exit(status)
