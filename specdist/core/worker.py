# SPDX-License-Identifier: Apache-2.0
"""Threads whose errors reach the threads that depend on them."""

import threading
from collections.abc import Callable


class Worker(threading.Thread):
    """A daemon thread that runs `body` and keeps the exception that ended it in `error`, for another thread to raise.
    `ended`: called in the thread when `body` has returned or raised, with its exception or None."""

    def __init__(
        self, name: str, body: Callable[[], None], ended: Callable[[BaseException | None], None] = lambda error: None
    ):
        super().__init__(name=name, daemon=True)
        self._body, self._ended = body, ended
        self.error: BaseException | None = None

    def ends_within(self, timeout_s: float) -> bool:
        """Start it; whether it has ended after so many seconds. Raises what ended it."""
        self.start()
        self.join(timeout_s)
        if self.error is not None:
            raise self.error
        return not self.is_alive()

    def run(self) -> None:
        try:
            self._body()
        except BaseException as error:  # noqa: BLE001 - the thread's door: nothing above it would show the error
            self.error = error
        self._ended(self.error)
