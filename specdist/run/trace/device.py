# SPDX-License-Identifier: Apache-2.0
"""Times of CUDA events on the host's clock, found when the traced stretch is over."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

_TRIES = 8


@dataclass(frozen=True)
class _Anchor:
    """An event whose time on the host is known: between two looks at the host's clock, `error` ns from the middle."""

    event: torch.cuda.Event
    time: int
    error: int


class DeviceClock:
    """Knows the device's time at two moments and takes what lies around them as even.

    `anchor` waits for an event on a stream of its own, on which nothing else runs, so no other stream waits.
    """

    def __init__(self, device: torch.device):
        torch.cuda.set_device(device)  # of the calling thread, which would look at GPU 0
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._anchors: list[_Anchor] = []

    def anchor(self) -> None:
        """Look at both clocks; call it before and after what is to be timed."""
        self._anchors.append(min((self._look() for _ in range(_TRIES)), key=lambda a: a.error))

    def _look(self) -> _Anchor:
        event = torch.cuda.Event(enable_timing=True)
        before = time.monotonic_ns()
        event.record(self._stream)
        event.synchronize()
        after = time.monotonic_ns()
        return _Anchor(event, (before + after) // 2, (after - before + 1) // 2)

    @property
    def error(self) -> int:
        """How far a time may be off, in ns."""
        return max(anchor.error for anchor in self._anchors)

    def time(self, event: torch.cuda.Event) -> int:
        """The host's monotonic time, in ns, at which the device had come to `event`, which has happened."""
        first, last = self._anchors[0], self._anchors[-1]
        passed = first.event.elapsed_time(last.event)
        rate = (last.time - first.time) / passed if passed else 1e6
        return first.time + round(first.event.elapsed_time(event) * rate)
