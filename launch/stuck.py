# SPDX-License-Identifier: Apache-2.0
"""Ranks that do not end with their world, and a rank that a signal has stopped beside others that go on: nobody else
would end them, and while the ranks meet nobody else would know. Where all are stopped somebody suspends the job."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

import psutil

from specdist.core.attempts import AttemptRecord, Failure
from specdist.core.errors import say
from specdist.run.rank_log import SHOW_STACKS

_LOOK_S, _SHOW_S = 1.0, 2.0
STOPPED_LOOKS = 10
"""A rank that is stopped at so many looks in a row, while others are not, is lost to them. Looks, not seconds: where a
batch system suspends a job, this process is stopped too. A debugger's hold is another state."""
PATIENCE_S = 75.0
"""Ranks that can end themselves in 60 at most (`SAVE_S` of specdist/run/control_plane.py)."""


@contextlib.contextmanager
def ending_stuck_ranks(
    running: Callable[[], dict[int, psutil.Process]],
    record: AttemptRecord,
    host: str,
    tell: Callable[[Failure], None],
) -> Iterator[set[int]]:
    """While the block runs, `tell` of each of the `running` ranks on `host` that was stopped alone, and kill it; and
    give all `PATIENCE_S` seconds after the attempt's failure is on record, then have them show where they are and kill
    them. Yields the numbers of those that were killed."""
    over, killed = threading.Event(), set[int]()

    def kill(ranks: dict[int, psutil.Process]) -> None:
        killed.update(ranks)
        _send(ranks, signal.SIGKILL)

    def watch() -> None:
        stopped, suspended, most, failed_at = Counter[int](), 0, 0, None
        while not over.wait(_LOOK_S):
            ranks = running()
            most = max(most, len(ranks))
            stopped = Counter({rank: stopped[rank] + 1 for rank in ranks if _is_stopped(ranks[rank])})
            suspended = suspended + 1 if 0 < most == len(stopped) else 0
            if suspended:
                stopped.clear()  # they may go on one after the other
            if suspended == STOPPED_LOOKS:
                say(f"all ranks on {host} are stopped, and go on with SIGCONT")
            for rank in [rank for rank, looks in stopped.items() if looks >= STOPPED_LOOKS]:
                words = f"stopped by a signal, and it did not go on for {STOPPED_LOOKS * _LOOK_S:.0f} s"
                words += ": Ctrl-Z suspends a job whole, and no rank of it is lost"
                tell(Failure("lost", words, rank, host=host, pid=ranks[rank].pid))
                kill({rank: ranks[rank]})
            if failed_at is None and os.path.exists(record.failure_file):  # false where it cannot be seen
                failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() - failed_at > PATIENCE_S:
                _send(ranks, SHOW_STACKS)
                if not over.wait(_SHOW_S):
                    kill(ranks)
                return

    threading.Thread(target=watch, name="specdist-stuck", daemon=True).start()
    try:
        yield killed
    finally:
        over.set()


def _is_stopped(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.status() == psutil.STATUS_STOPPED)
    return False


def _send(ranks: dict[int, psutil.Process], number: int) -> None:
    for process in ranks.values():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
