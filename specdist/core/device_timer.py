# SPDX-License-Identifier: Apache-2.0
"""How long a rank's device took for something, which its host has queued or waited through."""

import contextlib
import time
from collections import deque
from collections.abc import Iterator

import torch


class Moment:
    """When a rank's device has done all that is queued on the current stream by now. No thread waits for it."""

    def __init__(self, device: torch.device):
        on_gpu = device.type == "cuda"
        self.event = torch.cuda.Event(enable_timing=True) if on_gpu else None  # type: ignore[no-untyped-call]
        self.time = time.monotonic()
        if self.event is not None:
            self.event.record()

    def reached(self) -> bool:
        return self.event is None or self.event.query()  # type: ignore[no-untyped-call]

    def since(self, earlier: "Moment") -> float:
        """Seconds from an earlier one on; both are reached."""
        if self.event is None or earlier.event is None:
            return self.time - earlier.time
        return float(earlier.event.elapsed_time(self.event)) / 1e3


class DeviceTimer:
    """Adds up times on one rank's device, from when all before has ended.

    Of a wait of the host it is the part in which the device had no work any more: a host that waits for a GPU's next
    work has often queued seconds of it.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._seconds = 0.0
        self._pending: deque[tuple[Moment, Moment]] = deque()

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Around what is timed, on the thread and stream that compute."""
        began = Moment(self._device)
        yield
        self._pending.append((began, Moment(self._device)))

    @property
    def seconds(self) -> float:
        """Of all, as far as the device has got."""
        while self._pending and self._pending[0][1].reached():
            began, ended = self._pending.popleft()
            self._seconds += ended.since(began)
        return self._seconds
