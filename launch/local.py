# SPDX-License-Identifier: Apache-2.0
"""Start a world on this machine: torchrun with as many ranks as the config adds up to."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence

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
    """Run `torchrun -m specdist.train` and return its exit status. Signals go on to the ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", "specdist.train", *(part for file in files for part in ("--config", file)), *overrides]
    process = subprocess.Popen(command)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _frame: process.send_signal(received))
    return process.wait()
