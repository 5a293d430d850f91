# SPDX-License-Identifier: Apache-2.0
"""Signals set a flag; the training loop reads it at a step boundary, where all ranks can agree to stop."""

from __future__ import annotations

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopFlag:
    """True once the process was asked to stop. A second SIGINT ends it at once, as an impatient user expects."""

    def __init__(self) -> None:
        self.reason: str | None = None

    def __bool__(self) -> bool:
        return self.reason is not None

    def install(self) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)

    def request(self, reason: str) -> None:
        """Ask for a stop from inside the process."""
        self.reason = self.reason or reason

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason is not None:
            signal.signal(number, signal.default_int_handler)
            raise KeyboardInterrupt
        self.request(signal.Signals(number).name)
