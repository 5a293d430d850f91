# SPDX-License-Identifier: Apache-2.0
"""A plugin of the runs here (`run.plugins`): loses or holds up a control message where a file asks for it.

A file is one order, taken by the process that carries it out: `RANK.way.what`, where RANK is a rank's place such as
`draft2` (`target0`: of a target world), the way `to` or `from` it, and what `lose` or `hold`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

from specdist.scheduler.client import ControlClient
from specdist.scheduler.server import ControlServer
from specdist.scheduler.wire import is_remote

ORDERS = "CHAOS_ORDERS"
"""The variable that names the directory of the files."""
HOLD_S = 1.5


def order(directory: Path, rank: str, way: str, what: str) -> None:
    (directory / f"{rank}.{way}.{what}").touch()


def _lost(rank: str, way: str) -> bool:
    """Whether a message is to be lost; returns late where it is to be held up."""
    for what in ("lose", "hold"):
        try:
            os.unlink(f"{os.environ[ORDERS]}/{rank}.{way}.{what}")
        except OSError:
            continue
        if what == "lose":
            return True
        time.sleep(HOLD_S)
    return False


_put, _send = ControlClient._put, ControlServer._send  # noqa: SLF001 - what a network does no interface offers


def put(self: ControlClient, payload: bytes) -> None:
    role = "draft" if self._hello.place is None else "target"
    if _lost(f"{role}{os.environ['RANK']}", "from"):
        self._sent += 1
    else:
        _put(self, payload)


def send(self: ControlServer, ranks: Iterable[int], payload: bytes) -> list[int]:
    kept = []
    for rank in ranks:
        name = self._identities[rank]
        role = "target" if is_remote(name) else "draft"
        if _lost(f"{role}{int.from_bytes(name[-4:], 'big')}", "to"):
            self._sent[rank] += 1
        else:
            kept.append(rank)
    return _send(self, kept, payload)


if ORDERS in os.environ:  # not where a test only gives orders
    ControlClient._put, ControlServer._send = put, send  # type: ignore[method-assign]  # noqa: SLF001
