# SPDX-License-Identifier: Apache-2.0
"""What happens to a run."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests import forks
from tests.chaos import frames

_PIDFD_GETFD = 438
"""Of x86-64 and arm64."""
_DELAY_S = 1.5


@dataclass
class Victims:
    """Who may be hit: one of the worlds that work for a run.

    Attributes:
        role: the world's, `target` where it is one that serves another.
        ranks: its ranks by number; a fault that is none's own may find none yet.
        launcher, agent: what started them; the agent may not be there yet.
        disk: the directory of the run, on a file system of its own where `full` is possible.
        orders: see tests.chaos.frames.
    """

    role: str
    ranks: dict[int, psutil.Process]
    launcher: psutil.Process
    agent: psutil.Process | None
    disk: Path
    orders: Path
    chance: random.Random

    def rank(self) -> tuple[int, psutil.Process]:
        number = self.chance.choice(sorted(self.ranks))
        return number, self.ranks[number]


@dataclass(frozen=True)
class Fault:
    """One kind of it. `strike` returns whom it hit: a rank's number, or None where none is to blame.

    Attributes:
        of_rank: it hits one of the ranks.
        survived: the run goes on as if nothing had happened.
        deadly: the run ends by it, or says that it has lost a part.
        link: rank 0, at the other end of what was broken, may be named in the place of the rank.
        named: words that the failure has where it hits no rank; empty: whatever the run says.
    """

    strike: Callable[[Victims], int | None]
    of_rank: bool = True
    survived: bool = False
    deadly: bool = False
    link: bool = False
    named: str = ""


def _kill(victims: Victims) -> int:
    number, process = victims.rank()
    process.kill()
    return number


def _stop(victims: Victims) -> int:
    number, process = victims.rank()
    forks.suspend(process)
    return number


def _delay(victims: Victims) -> int:
    """Hold up all that a rank sends and receives."""
    number, process = victims.rank()
    process.suspend()
    time.sleep(_DELAY_S)
    with contextlib.suppress(psutil.NoSuchProcess):
        process.resume()
    return number


def _cut(victims: Victims) -> None:
    """Shut one of a rank's connections down, whichever it is: the control plane, the store, gloo, Mooncake."""
    _, process = victims.rank()
    found = [c.fd for c in process.net_connections("tcp") if c.status == psutil.CONN_ESTABLISHED and c.fd >= 0]
    if not found:
        return
    holder, libc = os.pidfd_open(process.pid), ctypes.CDLL(None, use_errno=True)
    with contextlib.closing(os.fdopen(holder, "rb", closefd=True)):
        number = libc.syscall(_PIDFD_GETFD, holder, victims.chance.choice(found), 0)
        if number >= 0:
            with socket.socket(fileno=number) as connection, contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def _frame(what: str) -> Callable[[Victims], int]:
    """Lose or hold up one message of a rank's, or to it: the next one."""

    def strike(victims: Victims) -> int:
        number, _ = victims.rank()
        frames.order(victims.orders, f"{victims.role}{number}", victims.chance.choice(("to", "from")), what)
        return number

    return strike


def _full(victims: Victims) -> None:
    with (victims.disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def _launcher(victims: Victims) -> None:
    victims.launcher.kill()


def _agent(victims: Victims) -> None:
    (victims.agent or victims.launcher).kill()


def _asked(victims: Victims) -> None:
    victims.launcher.send_signal(signal.SIGTERM)


FAULTS = {
    "kill": Fault(_kill, deadly=True),
    "stop": Fault(_stop, deadly=True),
    "delay": Fault(_delay, survived=True),
    "cut": Fault(_cut),
    "lose": Fault(_frame("lose"), link=True),
    "hold": Fault(_frame("hold"), survived=True),
    "full": Fault(_full, of_rank=False, named="No space left"),
    "launcher": Fault(_launcher, of_rank=False, deadly=True),
    "agent": Fault(_agent, of_rank=False, deadly=True),
    "asked": Fault(_asked, of_rank=False, deadly=True),
}
