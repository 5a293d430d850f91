# SPDX-License-Identifier: Apache-2.0
"""A wait beside work of the GPU is none."""

from __future__ import annotations

import time

import pytest
import torch

from specdist.core.device_timer import DeviceTimer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_only_what_the_queued_work_does_not_hide_is_lost() -> None:
    clock, matrix = DeviceTimer(torch.device("cuda")), torch.randn(8192, 8192, device="cuda")

    def lost(seconds: float, products: int) -> float:
        torch.cuda.synchronize()
        before = clock.seconds
        for _ in range(products):
            matrix @ matrix
        with clock.timed():
            time.sleep(seconds)
        torch.cuda.synchronize()
        return clock.seconds - before

    lost(0.0, 3)
    began = time.monotonic()
    lost(0.0, 100)
    work = time.monotonic() - began
    assert lost(work / 2, 100) < work / 20
    assert lost(2 * work, 100) == pytest.approx(work, rel=0.2)
    assert lost(work, 0) == pytest.approx(work, rel=0.2)
