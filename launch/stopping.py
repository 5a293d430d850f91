# SPDX-License-Identifier: Apache-2.0
"""Signals that ask a node's agent to stop, passed on to its ranks. Light to import: a signal may come at once."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType

import psutil

from specdist.core.errors import Dismissed
from specdist.core.launch_env import STOP
from specdist.core.stop import STOP_SIGNALS, StopReason


class StopForwarding:
    """Passes every request to stop on to this process's children, the ranks, which save and leave.

    A second SIGINT kills them: somebody is impatient, and what was saved before is there. A second SIGTERM does not:
    Slurm sends several when it preempts a job.
    """

    def __init__(self) -> None:
        self.reason: StopReason | None = None
        """The first signal that asked for a stop."""

    def __enter__(self) -> StopForwarding:
        self._earlier = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise Dismissed if a stop was asked for: for waits before the ranks exist."""
        if self.reason is not None:
            raise Dismissed(f"{self.reason} before the ranks were started")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = self.reason is not None and number == signal.SIGINT
        self.reason = self.reason or StopReason(signal.Signals(number).name)
        os.environ[STOP] = self.reason  # for ranks that do not exist yet
        for child in psutil.Process().children():
            child.send_signal(signal.SIGKILL if again else number)
