# SPDX-License-Identifier: Apache-2.0
"""Waits are added up, and those that fail are not; on a GPU, only what its queued work does not hide."""

from __future__ import annotations

import time

import pytest
import torch

from specdist.core.device_timer import DeviceTimer


def test_waits_of_a_cpu_are_added_up() -> None:
    clock = DeviceTimer(torch.device("cpu"))
    for _ in range(2):
        with clock.timed():
            time.sleep(0.02)
    time.sleep(0.02)
    found = clock.seconds
    assert found >= 0.04
    with pytest.raises(KeyError), clock.timed():
        raise KeyError
    assert clock.seconds == found


class PlayedEvent:
    """An event of a device on which everything queued so far ends at `ends`."""

    now, ends = 0.0, 0.0

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self) -> None:
        self.at = max(PlayedEvent.now, PlayedEvent.ends)

    def query(self) -> bool:
        return PlayedEvent.now >= self.at

    def elapsed_time(self, end: PlayedEvent) -> float:
        return (end.at - self.at) * 1e3


def test_work_that_a_gpu_still_has_hides_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", PlayedEvent)
    clock = DeviceTimer(torch.device("cuda"))

    def wait(queued: float, seconds: float) -> None:
        PlayedEvent.ends = PlayedEvent.now + queued
        with clock.timed():
            PlayedEvent.now += seconds

    wait(queued=5.0, seconds=3.0)
    assert clock.seconds == 0.0  # the device has not got there
    wait(queued=1.0, seconds=3.0)
    assert clock.seconds == pytest.approx(2.0)
    wait(queued=0.0, seconds=3.0)
    assert clock.seconds == pytest.approx(5.0)
