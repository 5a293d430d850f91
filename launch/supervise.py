# SPDX-License-Identifier: Apache-2.0
"""Starts of a job, one after the other, for launchers that have no batch system to start it again."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable

from specdist.core.launch_env import Attempt
from specdist_launch.verdict import AGAIN


def supervise(
    start: Callable[[Attempt], int], job: str, retries: int, stopped: Callable[[], bool] = lambda: False
) -> int:
    """Run `start` until it says that the job is done or given up, at most `retries` times more.

    Args:
        start: runs one attempt to its end and returns the verdict's exit status.
        job: the job's id.
        stopped: whether this launcher was asked to stop the job: then it is not started again.

    Returns:
        The last attempt's exit status.
    """
    for restart in range(retries + 1):
        status = start(Attempt(job, restart))
        if status != AGAIN:
            return status
        if stopped():
            break
    print("specdist: this launcher starts it no more: the same command goes on from there", file=sys.stderr)
    return AGAIN


def new_job(launcher: str, role: str = "both") -> str:
    """An id for a job that no batch system has named; two jobs of one run directory cannot start in one second, apart
    from target worlds."""
    place = f"-{socket.gethostname()}-{os.getpid()}" if role == "target" else ""
    return f"{launcher}-{time.strftime('%Y%m%d-%H%M%S')}{place}"
