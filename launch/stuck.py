# SPDX-License-Identifier: Apache-2.0
"""Ranks that do not end with their world: one that is stuck, and alone on its node, nobody else would end."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

import psutil

from specdist.core.attempts import AttemptRecord
from specdist.run.rank_log import SHOW_STACKS

_LOOK_S, _SHOW_S = 5.0, 2.0
PATIENCE_S = 75.0
"""Ranks that can end themselves in 60 at most (`SAVE_S` of specdist/run/control_plane.py)."""


@contextlib.contextmanager
def ending_stuck_ranks(record: AttemptRecord, patience_s: float = PATIENCE_S) -> Iterator[None]:
    """While the block runs, give this process's children `patience_s` seconds after the attempt's failure is on record,
    then have them show where they are and kill them."""
    over = threading.Event()

    def watch() -> None:
        while not record.failure_file.exists():
            if over.wait(_LOOK_S):
                return
        if over.wait(patience_s):
            return
        for number, wait_s in ((SHOW_STACKS, _SHOW_S), (signal.SIGKILL, 0.0)):
            for child in psutil.Process().children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.send_signal(number)
            if over.wait(wait_s):
                return

    threading.Thread(target=watch, name="specdist-stuck", daemon=True).start()
    try:
        yield
    finally:
        over.set()
