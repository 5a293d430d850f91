# SPDX-License-Identifier: Apache-2.0
"""A clock that stands still while its process does: who was suspended cannot say that others were silent, and they were
suspended too where a batch system, or a terminal's Ctrl-Z, has done it."""

import threading
import time


class AwakeClock:
    """Called it says what `time.monotonic` does, in seconds, less what has passed between two calls that were more than
    `at_most_s` apart: its process calls it more often than that while it runs. Any thread may."""

    def __init__(self, at_most_s: float):
        self._at_most_s, self._missed, self._last = at_most_s, 0.0, time.monotonic()
        self._lock = threading.Lock()

    def __call__(self) -> float:
        with self._lock:
            now = time.monotonic()
            if now - self._last > self._at_most_s:
                self._missed += now - self._last
            self._last = now
            return now - self._missed
