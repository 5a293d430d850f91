# SPDX-License-Identifier: Apache-2.0
"""Requests to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from specdist.core.stop import STOP_SIGNALS, StopFlag, StopReason


@pytest.fixture
def flag() -> Iterator[StopFlag]:
    earlier = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    flag = StopFlag()
    flag.install()
    yield flag
    for number, handler in earlier.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_a_signal_sets_the_flag_and_the_first_one_is_the_reason(flag: StopFlag, number: signal.Signals) -> None:
    assert not flag
    os.kill(os.getpid(), number)
    assert flag
    assert flag.reason == number.name
    os.kill(os.getpid(), signal.SIGUSR1)
    assert flag.reason == number.name


def test_a_second_ctrl_c_ends_the_process(flag: StopFlag) -> None:
    flag.request(StopReason.INTERRUPT, " on rank 0")  # the others may know of the first one before it arrives here
    os.kill(os.getpid(), signal.SIGINT)
    assert flag
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_the_end_of_the_time_limit_asks_for_a_stop_by_itself() -> None:
    assert not StopFlag(deadline=time.time() + 100, margin_s=60)
    near = StopFlag(deadline=time.time() + 59, margin_s=60)
    assert near
    assert near.reason == StopReason.TIME_LIMIT


def test_who_leaves_is_gone_though_what_it_said_cannot_be_written() -> None:
    """Above all a fork, which would go on as the process that it is a copy of."""
    script = "import sys; from specdist.core.stop import leave; sys.stdout = open('/dev/full', 'w'); print(1); leave(3)"
    assert subprocess.run([sys.executable, "-c", script], stderr=subprocess.DEVNULL).returncode == 3
