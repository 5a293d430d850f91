# SPDX-License-Identifier: Apache-2.0
"""Start a world on this machine: torchrun with as many ranks as the config adds up to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from specdist.errors import ConfigError
from specdist.job import JobConfig


def world_size(job: JobConfig, devices: int) -> int:
    """How many ranks to start: what the config adds up to, or one per GPU where it leaves a number open."""
    target, draft = job.target.replicas * job.target.tp, job.draft.dp
    if job.world.mode == "split":
        if draft is not None:
            return target + draft * job.draft.cp
        if devices > target:
            return devices
        raise ConfigError(
            f"draft.dp is not set and this machine shows {devices} GPUs: set draft.dp, or --nproc-per-node, to say how "
            f"many ranks beside the {target} of the target to start"
        )
    return max(devices, 1) if draft is None else max(draft * job.draft.cp, target)


def start(files: Sequence[str], overrides: Sequence[str], ranks: int) -> int:
    """Run `torchrun -m specdist.train` (see agent.py) and return its exit status.

    SIGINT and SIGTERM go to the ranks, which finish the step, save and leave; torchrun itself would end with an error.
    From the second one on they go to torchrun, which kills what has not left after half a minute.
    """
    command = [sys.executable, "-m", "specdist_launch.agent", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", "specdist.train", *(part for file in files for part in ("--config", file)), *overrides]
    asked = False

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        children = [] if asked else _children(process.pid)
        asked = True
        for pid in children or [process.pid]:
            os.kill(pid, number)

    # A session of its own: a terminal's Ctrl-C would reach torchrun directly.
    # torchrun would give every rank one thread and say so at length; share the cores out instead.
    threads = os.environ.get("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // ranks, 1)))
    process = subprocess.Popen(command, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": threads})
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    return process.wait()


def _children(pid: int) -> list[int]:
    """The processes that process `pid` started and that still run; none where the system does not say (not Linux)."""
    return [int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()]
