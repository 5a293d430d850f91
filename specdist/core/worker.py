# SPDX-License-Identifier: Apache-2.0
"""Threads whose errors reach those that depend on them."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


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


@contextmanager
def telling_deaths(tell: Callable[[BaseException], None]) -> Iterator[None]:
    """Inside it `tell` is called of an exception that ends a thread of this project's, by its name, that is no Worker:
    what waits for that thread would else end as a wait that took too long. It is called in the thread."""
    usual = threading.excepthook

    def died(death: threading.ExceptHookArgs) -> None:
        usual(death)  # into the log
        if death.thread is not None and death.thread.name.startswith("specdist-") and death.exc_value is not None:
            tell(death.exc_value)

    threading.excepthook = died
    try:
        yield
    finally:
        threading.excepthook = usual
