# SPDX-License-Identifier: Apache-2.0
"""How long a rank's device took for something, which its host has queued or waited through."""

import contextlib
import time
from collections import deque
from collections.abc import Iterator

import torch


class DeviceTimer:
    """Adds up times on one rank's device, from when all before has ended.

    Of a wait of the host it is the part in which the device had no work any more: a host that waits for a GPU's next
    work has often queued seconds of it. An event on either side measures it, and no thread waits for it.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._seconds = 0.0
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Around what is timed, on the thread and stream that compute."""
        if self._device.type != "cuda":
            began = time.monotonic()
            yield
            self._seconds += time.monotonic() - began
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        yield
        end.record()
        self._pending.append((begin, end))

    @property
    def seconds(self) -> float:
        """Of all, as far as the device has got."""
        while self._pending and self._pending[0][1].query():  # type: ignore[no-untyped-call]
            begin, end = self._pending.popleft()
            self._seconds += begin.elapsed_time(end) / 1e3
        return self._seconds
