# SPDX-License-Identifier: Apache-2.0
"""A lock between processes and hosts that share a directory: a file made with O_EXCL, kept young by a heartbeat.

The lock saves work and no more: whoever holds it prepares in a directory of its own and renames it at the end, so two
holders at once (a paused one that comes back) would do the same work twice and harm nothing.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from specdist.core.errors import WorldError

HEARTBEAT_S = 5.0
STALE_AFTER_S = 60.0
POLL_S = 0.5


@dataclass(frozen=True)
class Holder:
    host: str
    pid: int
    namespace: str
    """Tells apart containers of one host name: a pid means something only within it."""
    nonce: str

    @classmethod
    def this_process(cls) -> Holder:
        return cls(socket.gethostname(), os.getpid(), _pid_namespace(), uuid.uuid4().hex)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    def is_gone(self) -> bool:
        """Whether it ran here and runs no more. False where that cannot be known."""
        if (self.host, self.namespace) != (socket.gethostname(), _pid_namespace()):
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False


@contextmanager
def lock_or_done(
    path: Path,
    done: Callable[[], bool],
    timeout: float,
    waiting: Callable[[str], None],
    stale_after: float = STALE_AFTER_S,
) -> Iterator[bool]:
    """Wait until `done()`, giving False, or until the lock at `path` is this process's, giving True.

    A lock whose holder has died here, or whose heartbeat has not moved for `stale_after` seconds as watched from here
    (no clocks of two hosts are compared), is taken over.

    Raises:
        WorldError: neither within `timeout` seconds; names the holder.
    """
    me = Holder.this_process()
    if not _acquire(path, me, done, timeout, waiting, stale_after):
        yield False
        return
    stop = threading.Event()
    heart = threading.Thread(target=_beat, args=(path, me, stop), name="prompts-lock-heartbeat", daemon=True)
    heart.start()
    try:
        yield True
    finally:
        stop.set()
        heart.join()
        holder, _ = _look(path)
        if holder == me:
            path.unlink(missing_ok=True)


def _acquire(
    path: Path,
    me: Holder,
    done: Callable[[], bool],
    timeout: float,
    waiting: Callable[[str], None],
    stale_after: float,
) -> bool:
    deadline = time.monotonic() + timeout
    seen: tuple[Holder | None, int] | None = None
    seen_at = time.monotonic()
    while not done():
        if _create(path, me):
            if done():  # it was finished between the two looks
                path.unlink(missing_ok=True)
                return False
            return True
        now = time.monotonic()
        found = _look(path)
        if found != seen:
            seen, seen_at = found, now
        holder, beat = found
        if beat and ((holder is not None and holder.is_gone()) or now - seen_at > stale_after):
            waiting(f"taking over from {holder or 'an unknown process'}, which has stopped")
            _remove_stale(path, found, me)
            continue
        if now > deadline:
            raise WorldError(
                f"waited {timeout:.0f} s for {holder or 'an unknown process'} to prepare the prompts; its last sign of "
                f"life was {now - seen_at:.0f} s ago. Its lock is {path}"
            )
        waiting(f"{holder or 'another process'} prepares the prompts; waiting")
        time.sleep(POLL_S)
    return False


def _create(path: Path, me: Holder) -> bool:
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(asdict(me), file)
    return True


def _look(path: Path) -> tuple[Holder | None, int]:
    """The holder (None if the file does not say) and its last heartbeat in ns (0 if there is no lock).

    Opening the file makes NFS fetch fresh attributes; a bare stat may be a minute old.
    """
    try:
        with open(path, encoding="utf-8") as file:
            beat = os.fstat(file.fileno()).st_mtime_ns
            return Holder(**json.load(file)), beat
    except FileNotFoundError:
        return None, 0
    except (ValueError, TypeError):
        return None, beat


def _remove_stale(path: Path, found: tuple[Holder | None, int], me: Holder) -> None:
    if _look(path) != found:
        return
    grave = path.with_name(f"{path.name}.{me.nonce}")
    try:
        os.rename(path, grave)  # of several that find it stale, one succeeds
    except FileNotFoundError:
        return
    grave.unlink(missing_ok=True)


def _beat(path: Path, me: Holder, stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT_S):
        holder, _ = _look(path)
        if holder != me:
            return  # taken over while this process was paused
        os.utime(path)


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        return ""
