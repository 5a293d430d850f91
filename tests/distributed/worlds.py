# SPDX-License-Identifier: Apache-2.0
"""Spawns real torchrun worlds for tests."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from specdist.channel.mooncake.engine import check_installed
from specdist.core.errors import ConfigError
from tests import forks
from tests.ports import reserve_port

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "5d" * 16
"""Of the worlds here that no launcher of ours starts."""


def mooncake_loads() -> bool:
    """Whether Mooncake's Transfer Engine can be used here."""
    try:
        check_installed()
    except ConfigError:
        return False
    return True


def torchrun(ranks: int, arguments: Sequence[str], timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run `torchrun --nproc-per-node RANKS ARGUMENTS` from the project's root and wait for it."""
    return _finished(start_torchrun(ranks, arguments), timeout)


def specdist(*words: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run the specdist command to its end."""
    return _finished(start_command([sys.executable, "-m", "specdist_launch.cli", *words]), timeout)


def _finished(process: subprocess.Popen[str], timeout: float) -> subprocess.CompletedProcess[str]:
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill_all(process)
        raise AssertionError(f"{process.args} did not end within {timeout} s") from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def start_torchrun(ranks: int, arguments: Sequence[str]) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return start_command(["env", f"SPECDIST_TOKEN={TOKEN}", *launcher, *arguments])


def start_command(command: Sequence[str]) -> subprocess.Popen[str]:
    """Start a command from the project's root, in a process group of its own; this interpreter's are forked."""
    python = forks.python()
    words = [python if word == sys.executable else word for word in command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": forks.PYTHONPATH}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        words, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


def run_on_hosts(
    commands: Mapping[str, Sequence[str]],
    environments: Mapping[str, Mapping[str, str]] | None = None,
    python: Path = Path(sys.executable),
    timeout: float = 240,
) -> dict[str, subprocess.CompletedProcess[str]]:
    """Run one rank on each of several hosts, `python -m COMMAND`, and wait for all of them. A torchrun agent of this
    machine stands for each host. `environments`: variables of single hosts."""
    port, processes = str(reserve_port()), {}
    for node, (host, command) in enumerate(commands.items()):
        own = {"SPECDIST_HOST": host, "SPECDIST_TOKEN": TOKEN}
        own |= (environments or {}).get(host, {})
        rendezvous = ["--nnodes", str(len(commands)), "--node-rank", str(node), "--nproc-per-node", "1"]
        rendezvous += ["--master-addr", "127.0.0.1", "--master-port", port]
        agent = [str(python), "-m", "torch.distributed.run", *rendezvous]
        processes[host] = start_command(["env", *(f"{k}={v}" for k, v in own.items()), *agent, "-m", *command])
    try:
        said = {host: process.communicate(timeout=timeout) for host, process in processes.items()}
    finally:
        for process in processes.values():
            process.kill()
    return {
        host: subprocess.CompletedProcess(process.args, process.returncode, *said[host])
        for host, process in processes.items()
    }


def kill_all(process: subprocess.Popen[str]) -> None:
    """SIGKILL the agent and all its ranks: nobody has time to save anything."""
    for member in forks.family(process.pid):
        with contextlib.suppress(psutil.NoSuchProcess):  # it went with one before it
            member.kill()
    process.communicate()


def ranks_below(pid: int) -> dict[int, psutil.Process]:
    """The ranks that a process has started, itself or through others, by number."""
    found = {}
    for process in forks.family(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            number = forks.rank_of(process)
            if number is not None:
                found.setdefault(number, forks.fork_of(process))
    return found


def train(ranks: int, words: Sequence[str], timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run a training job and return its finished process."""
    return torchrun(ranks, ["-m", "specdist.train", *words], timeout)


def start_by_hand(
    ranks: Sequence[int],
    world_size: int,
    arguments: Sequence[str],
    stderr: Path,
    environments: Mapping[int, Mapping[str, str]] | None = None,
    wrappers: Mapping[int, Sequence[str]] | None = None,
) -> dict[int, subprocess.Popen[str]]:
    """Start some ranks of a world without torchrun, as srun would: rank 0 serves the store. Each writes to its own file
    `stderr / RANK`, so that none waits for a reader. `environments`: variables of single ranks, beside the common ones.
    `wrappers`: commands that start single ranks."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC")}
    environment |= {
        "OMP_NUM_THREADS": "1", "PYTHONPATH": forks.PYTHONPATH, "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(reserve_port()), "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
        "SPECDIST_TOKEN": TOKEN,
    }  # fmt: skip
    python, processes = forks.python(), {}
    environment |= {key: value for key, value in os.environ.items() if key.startswith("SPECDIST_FORKS")}
    for rank in ranks:
        own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), **(environments or {}).get(rank, {})}
        with (stderr / str(rank)).open("w") as file:
            processes[rank] = subprocess.Popen(
                [*(wrappers or {}).get(rank, ()), python, *arguments],
                cwd=ROOT,
                env=own,
                stdout=subprocess.DEVNULL,
                stderr=file,
                text=True,
            )
    return processes
