# SPDX-License-Identifier: Apache-2.0
"""A node's ranks as forks of its agent, so that a node imports once what takes seconds to import. They see the
environment that torchrun would give them, and end as its ranks do."""

import gc
import importlib
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Self

import psutil
import torch

from specdist.core.errors import say
from specdist.core.imports import uncollected
from specdist.core.stop import STOP_SIGNALS, end_with_launcher
from specdist_launch.agents import fork, may_fork

_NEEDED = ("transformers.modeling_utils", "specdist.run.runtime")
"""By a rank of either role. None of it begins a CUDA driver."""
_LOOK_S, _LEAVE_S = 0.1, 30.0


class RankForks:
    """`count` ranks, for `main` of `module` with these arguments, that wait until `run` gives them their environments;
    those that are left when the block ends are killed. Forks only where `may_fork`: else processes of their own."""

    def __init__(self, count: int, module: str, arguments: Sequence[str]):
        with uncollected():
            for name in (module, *_NEEDED):
                importlib.import_module(name)
        gc.freeze()  # what is here already no rank looks through again
        own = not may_fork()
        self._forks = [_Fork(module, arguments, own) for _ in range(count)]
        self._begun: dict[int, _Fork] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()

    def running(self) -> dict[int, psutil.Process]:
        """The processes of those that have begun and not ended, by rank."""
        return {number: rank.process for number, rank in self._begun.items() if rank.ended is None}

    def run(self, environments: Sequence[Mapping[str, str]]) -> dict[int, int]:
        """Have the ranks begin, and wait for their end. Once one has failed the others have 30 seconds to leave after a
        SIGTERM. Returns the exit status of each that did not end well; negative: the signal that killed it."""
        self._begun = {int(told["RANK"]): rank for told, rank in zip(environments, self._forks, strict=True)}
        for told, rank in zip(environments, self._forks, strict=True):
            rank.begin({**os.environ, **told})
        while None in (statuses := [rank.status() for rank in self._forks]) and not any(statuses):
            time.sleep(_LOOK_S)
        self._send(signal.SIGTERM)
        self._kill()
        return {number: rank.ended for number, rank in self._begun.items() if rank.ended}

    def _kill(self) -> None:
        """Send SIGKILL to those that are left; one that a device or a file server holds does not end of it."""
        self._send(signal.SIGKILL)
        for rank in [rank for rank in self._forks if rank.status() is None]:
            say(f"process {rank.process.pid} has not ended {_LEAVE_S:.0f} s after SIGKILL: a device or disk holds it")
            rank.ended = -signal.SIGKILL

    def _send(self, number: int) -> None:
        """To all that have not ended, and to what they have started, and wait up to 30 seconds for their end."""
        for rank in self._forks:
            if rank.status() is None:
                try:
                    os.killpg(rank.process.pid, number)
                except ProcessLookupError:  # it has no session of its own yet
                    os.kill(rank.process.pid, number)
        deadline = time.monotonic() + _LEAVE_S
        while None in [rank.status() for rank in self._forks] and time.monotonic() < deadline:
            time.sleep(_LOOK_S)


class _Fork:
    def __init__(self, module: str, arguments: Sequence[str], own: bool):
        told, self._tell = Pipe(duplex=False)
        self.process = psutil.Process(fork(lambda: _wait_and_run(told, module, arguments, own)))
        told.close()
        self.ended: int | None = None

    def begin(self, environment: Mapping[str, str]) -> None:
        with suppress(BrokenPipeError):  # it may have been killed
            self._tell.send(environment)

    def status(self) -> int | None:
        """As it ended, once it has."""
        if self.ended is None:
            pid, status = os.waitpid(self.process.pid, os.WNOHANG)
            self.ended = os.waitstatus_to_exitcode(status) if pid else None
        return self.ended


def _wait_and_run(told: Connection, module: str, arguments: Sequence[str], own: bool) -> int:
    end_with_launcher()
    for number in (*STOP_SIGNALS, signal.SIGTSTP, signal.SIGCONT):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    environment = told.recv()
    os.environ.clear()
    os.environ.update(environment)
    if own:
        os.execv(sys.executable, [sys.executable, "-m", module, *arguments])
    Path("/proc/self/comm").write_text(f"rank {environment['RANK']}")  # for `top`: the command line is the agent's
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"].partition(",")[0]))  # of a list: for the outer teams
    return int(importlib.import_module(module).main(arguments))
