# SPDX-License-Identifier: Apache-2.0
"""Python processes for tests that need no time to import torch: forked from a server that has done so.

`python()` is the path of a program that is called as the interpreter is, `-m MODULE ARGUMENTS`. It asks the server for
a fork with its own arguments, environment, directory and standard streams, passes signals on to it, and ends as it
ends. `family` finds the forks below a process, which the system does not show as its children.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
PYTHONPATH = f"{ROOT}{os.pathsep}{ROOT / 'src'}"
"""So that a checkout is tested that is not the one installed."""
_CLIENT = Path(__file__).with_name("client")
_START_S = 500.0
"""Less than a test has: on a busy machine its imports take minutes."""


@cache
def _directory() -> Path:
    return _serve(sys.executable, {"PYTHONPATH": PYTHONPATH}, [])


def _serve(interpreter: str, variables: Mapping[str, str], modules: Sequence[str]) -> Path:
    """Start a server of this process; the directory of its socket and of its notes, one a fork."""
    holder = tempfile.TemporaryDirectory(prefix="forks-")
    atexit.register(holder.cleanup)
    directory = Path(holder.name)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    environment["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # a thread of pyarrow's allocator
    log = (directory / "log").open("w")
    command = [interpreter, "-m", "tests.forks.server", str(directory), *modules]
    server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, stdin=subprocess.PIPE)
    atexit.register(server.kill)
    deadline = time.monotonic() + _START_S
    while not (directory / "socket").exists():
        assert server.poll() is None, (directory / "log").read_text()
        assert time.monotonic() < deadline, "the fork server did not start"
        time.sleep(0.05)
    return directory


def python() -> str:
    """The interpreter that forks; sets what its processes need in the environment of this one."""
    os.environ["SPECDIST_FORKS"] = str(_directory())
    os.environ["SPECDIST_FORKS_PYTHON"] = sys.executable
    return str(_CLIENT)


def of_another(interpreter: Path, variables: Mapping[str, str], modules: Sequence[str]) -> tuple[Path, dict[str, str]]:
    """A program that is called as `interpreter` is, and its environment: these variables, and what makes it fork from a
    process that has imported these modules, too."""
    directory = _serve(str(interpreter), variables, modules)
    return _CLIENT, {**variables, "SPECDIST_FORKS": str(directory), "SPECDIST_FORKS_PYTHON": str(interpreter)}


def rank_of(process: psutil.Process) -> int | None:
    """Which rank a process is: a fork of its agent has the name, another has the variable."""
    if name := re.fullmatch(r"rank (\d+)", process.name()):
        return int(name[1])
    number = process.environ().get("RANK")
    return None if number is None else int(number)


def fork_of(process: psutil.Process) -> psutil.Process:
    """The process that does the work of `process`: its fork, or itself."""
    with contextlib.suppress(FileNotFoundError):
        return psutil.Process(int((_directory() / str(process.pid)).read_text()))
    return process


def suspend(fork: psutil.Process) -> None:
    """Stop a process, and where it is a fork also the one that whoever started it sees in its place."""
    fork.suspend()
    for note in _directory().iterdir():
        with contextlib.suppress(FileNotFoundError, psutil.NoSuchProcess):
            if note.name.isdigit() and int(note.read_text()) == fork.pid:
                psutil.Process(int(note.name)).suspend()


def family(pid: int) -> list[psutil.Process]:
    """A process, its fork, and all that descends from them."""
    found: list[psutil.Process] = []
    waiting = [psutil.Process(pid)]
    while waiting:
        process = waiting.pop()
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(process)
            fork = fork_of(process)
            waiting += [*process.children(), *([fork] if fork != process else [])]
    return found
