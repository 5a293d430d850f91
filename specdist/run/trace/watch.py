# SPDX-License-Identifier: Apache-2.0
"""When the transfers of gloo end.

That shows only to whoever waits for one, and to one waiter only. So a thread waits, one for every link, in the order in
which the transfers were issued, and the stations wait for it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist


class WatchedWork(dist.Work):
    """Stands for a transfer that a watcher waits for."""

    def __init__(self) -> None:
        super().__init__()
        self._over = threading.Event()
        self._error: RuntimeError | None = None

    def end(self, error: RuntimeError | None) -> None:
        self._error = error
        self._over.set()

    def is_completed(self) -> bool:
        return self._over.is_set()

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Wait for it; a timeout of zero is none. Raises RuntimeError, as the transfer itself does."""
        if not self._over.wait(timeout.total_seconds() or None):
            raise RuntimeError(f"the transfer did not end within {timeout.total_seconds():.1f} s")
        if self._error is not None:
            raise self._error
        return True


class Watcher:
    """The thread of one link."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[dist.Work, WatchedWork, Callable[[], None]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._watch, name="specdist-watch", daemon=True).start()

    def watch(self, work: dist.Work, ended: Callable[[], None]) -> WatchedWork:
        """Call `ended` when `work` has ended; wait for what this returns, not for `work`."""
        watched = WatchedWork()
        self._queue.put((work, watched, ended))
        return watched

    def close(self) -> None:
        """No more transfers come."""
        self._queue.put(None)

    def _watch(self) -> None:
        while (task := self._queue.get()) is not None:
            work, watched, ended = task
            error = None
            try:
                work.wait()
            except RuntimeError as caught:  # raised where the transfer is waited for
                error = caught
            ended()
            watched.end(error)
