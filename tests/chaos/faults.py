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

_PIDFD_GETFD = 438
"""Of x86-64 and arm64."""
_DELAY_S = 1.5


@dataclass
class Victims:
    """Who may be hit: the ranks by number, what started them, and the directory of the run, on a file system of its own
    where `full` is possible."""

    ranks: dict[int, psutil.Process]
    launcher: psutil.Process
    disk: Path
    chance: random.Random

    def rank(self) -> tuple[int, psutil.Process]:
        number = self.chance.choice(sorted(self.ranks))
        return number, self.ranks[number]


@dataclass(frozen=True)
class Fault:
    """One kind of it. `strike` returns whom it hit: a rank's number, or None where none is to blame.

    Attributes:
        survived: the run goes on as if nothing had happened.
        named: words that the failure has where it hits no rank; empty: whatever the run says.
    """

    strike: Callable[[Victims], int | None]
    survived: bool = False
    named: str = ""


def _kill(victims: Victims) -> int:
    number, process = victims.rank()
    process.kill()
    return number


def _stop(victims: Victims) -> int:
    number, process = victims.rank()
    process.suspend()
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


def _full(victims: Victims) -> None:
    with (victims.disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def _launcher(victims: Victims) -> None:
    victims.launcher.kill()


def _asked(victims: Victims) -> None:
    victims.launcher.send_signal(signal.SIGTERM)


FAULTS = {
    "kill": Fault(_kill),
    "stop": Fault(_stop),
    "delay": Fault(_delay, survived=True),
    "cut": Fault(_cut),
    "full": Fault(_full, named="No space left"),
    "launcher": Fault(_launcher),
    "asked": Fault(_asked),
}
