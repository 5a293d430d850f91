# SPDX-License-Identifier: Apache-2.0
"""Start a world on this machine: one agent, with as many ranks as the config adds up to."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

from specdist.core.errors import ConfigError
from specdist.core.launch_env import Attempt
from specdist.core.stop import STOP_SIGNALS
from specdist.job.config import JobConfig
from specdist_launch.supervise import new_job, supervise

TRAIN = "specdist.train"


def world_size(job: JobConfig, devices: int) -> int:
    """How many ranks to start: what the config adds up to, or one per GPU where it leaves a number open."""
    target, draft = job.target.replicas * job.target.tp, job.draft.dp
    if job.world.role == "target":
        return target
    if job.world.mode == "split" and job.world.role == "both":
        if draft is not None:
            return target + draft * job.draft.cp
        if devices > target:
            return devices
        raise ConfigError.at(
            "draft.dp",
            f"is not set and this machine shows {devices} GPUs: set draft.dp, or --nproc-per-node, to say how "
            f"many ranks beside the {target} of the target to start",
        )
    if job.world.role == "draft":
        target = 0
    return max(devices, 1) if draft is None else max(draft * job.draft.cp, target)


def ranks_per_node(job: JobConfig, nodes: int, devices: int = 0) -> int:
    """The ranks of each of `nodes` equal nodes; raises ConfigError where the job's ranks do not divide among them."""
    ranks = world_size(job, devices * nodes)
    if ranks % nodes:
        raise ConfigError(
            f"{ranks} ranks (target.replicas x target.tp + draft.dp x draft.cp) do not divide among {nodes} nodes: "
            "change one of them, or say with --nproc-per-node how many ranks each node has",
            "target.replicas target.tp draft.dp draft.cp",
        )
    return ranks // nodes


def start(
    files: Sequence[str],
    overrides: Sequence[str],
    ranks: int,
    module: str = TRAIN,
    retries: int = 0,
    role: str = "both",
) -> int:
    """Run a world on this machine, up to `retries` times more where that may help; returns its exit status.

    SIGINT and SIGTERM go to the ranks, which finish the step, save and leave. A second one kills them.
    """
    words, asked = [*files, *overrides], list[int]()

    def attempt(attempt: Attempt) -> int:
        place = ["--nproc-per-node", str(ranks), "--job", attempt.job, "--restart", str(attempt.restart)]
        return run_agent([*place, "--launcher", "local", "--module", module, *words], asked)

    return supervise(attempt, new_job("local", role), retries, lambda: bool(asked))


def run_agent(words: Sequence[str], asked: list[int]) -> int:
    """Run an agent of this machine as a process of its own; returns its exit status.

    Requests to stop are passed on to it, and noted in `asked`.
    """
    # A session of its own: a terminal's Ctrl-C would reach the agent twice.
    command = [sys.executable, "-m", "specdist_launch.agent", *words]
    process = subprocess.Popen(command, start_new_session=True)

    def forward(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        process.send_signal(number)

    earlier = {number: signal.signal(number, forward) for number in STOP_SIGNALS}
    try:
        status = process.wait()
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
    return 128 - status if status < 0 else status  # as a shell says it
