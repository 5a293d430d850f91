# SPDX-License-Identifier: Apache-2.0
"""A lease on a run directory: the attempt that leads the run renews a file every few seconds.

Two starts in one directory would mix their checkpoints and records. `filelock` does not serve here: the starts are on
different hosts, not every shared file system has locks, and the lock of a host that is lost stays. The age of the file
does not serve either: clocks differ, and shared file systems show old contents for a while. So the second start watches
whether the file still changes.
"""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path
from types import TracebackType

from specdist.core.attempts import AttemptRecord, attempts
from specdist.core.errors import ConfigError

PULSE_S, WATCH_S = 3.0, 10.0
_GONE_S = 300.0
"""What has been silent for longer is not watched; more than clocks of hosts differ."""
_FILE = "alive"


class Lease:
    """Held by an attempt, and renewed from a thread, until the context is left."""

    def __init__(self, record: AttemptRecord) -> None:
        self._file = record.directory / _FILE
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._pulse, name="specdist-lease", daemon=True)

    def __enter__(self) -> Lease:
        self._say(0)
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()
        self._file.unlink(missing_ok=True)

    def _pulse(self) -> None:
        count = 0
        while not self._over.wait(PULSE_S):
            count += 1
            self._say(count)

    def _say(self, count: int) -> None:
        fresh = self._file.with_name(f".{_FILE}")
        with contextlib.suppress(OSError):  # a full disk is reported by what has something to keep
            fresh.write_text(f"{count} {time.time():.0f}\n")
            fresh.rename(self._file)


def holder(home: Path, job: str) -> AttemptRecord | None:
    """The attempt of another job that is at work in `home`, if there is one; takes up to `WATCH_S` seconds where the
    last one has ended without a word. An earlier start of `job` itself is over, or it would not be started again."""
    history = attempts(home)
    last = history[-1] if history else None
    if last is None or last.name.rpartition(".")[0] == job:
        return None
    found = _read(last)
    if found is None or time.time() - float(found.split()[1]) > _GONE_S:
        return None
    deadline = time.monotonic() + WATCH_S
    while time.monotonic() < deadline:
        if last.ending() is not None or last.failure() is not None:
            return None
        if _read(last) not in (found, None):
            return last
        time.sleep(PULSE_S / 10)
    return None


def refuse_if_held(home: Path, job: str) -> None:
    """Raise ConfigError where another job is at work in `home`."""
    held = holder(home, job)
    if held is None:
        return
    started = held.started()
    assert started is not None
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(started.time))
    raise ConfigError.at(
        "run.dir",
        f": {home} is in use: attempt {held.name} has been at work there since {since}, led by host "
        f"{started.hosts[0]}: wait for it, stop it, or choose another run.dir",
    )


def _read(record: AttemptRecord) -> str | None:
    """What the attempt has written last; None: nothing, or it has left."""
    try:
        return (record.directory / _FILE).read_text()
    except FileNotFoundError:
        return None
