# SPDX-License-Identifier: Apache-2.0
"""Spawns real torchrun worlds for tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]


def torchrun(ranks: int, arguments: Sequence[str], timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run `torchrun --nproc-per-node RANKS ARGUMENTS` from the project's root and wait for it."""
    process = start_torchrun(ranks, arguments)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill_all(process)
        raise AssertionError(f"the world did not end within {timeout} s") from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def start_torchrun(ranks: int, arguments: Sequence[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def kill_all(process: subprocess.Popen[str]) -> None:
    """SIGKILL the agent and all its ranks: nobody has time to save anything."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        member.kill()
    process.communicate()


def train(ranks: int, words: Sequence[str], timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run a training job and return its finished process."""
    return torchrun(ranks, ["-m", "specdist.train", *words], timeout)
