# SPDX-License-Identifier: Apache-2.0
"""How long a rank had nothing to compute because it waited."""

import contextlib
import time
from collections import deque
from collections.abc import Iterator

import torch


class StallTimer:
    """Adds up waits of one rank's host, but for the part in which its device still had work.

    A host that waits for a GPU's next work has often queued seconds of it: only what is left of the wait once that has
    ended is lost. An event on either side of the wait measures how much it is, and no thread waits for it.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._seconds = 0.0
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around a wait, on the thread and stream that compute."""
        if self._device.type != "cuda":
            began = time.monotonic()
            yield
            self._seconds += time.monotonic() - began
            return
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        yield
        end.record()
        self._pending.append((begin, end))

    @property
    def seconds(self) -> float:
        """Of all waits, as far as the device has got."""
        while self._pending and self._pending[0][1].query():
            begin, end = self._pending.popleft()
            self._seconds += begin.elapsed_time(end) / 1e3
        return self._seconds
