# SPDX-License-Identifier: Apache-2.0
"""A lock between processes, of one host or of several that share a file system."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

LOOK_S = 0.5


@contextmanager
def locked(path: Path, waiting: Callable[[float], object]) -> Iterator[bool]:
    """Hold the lock file `path`; whether it is held: a file system without locks, or one that cannot be written, keeps
    nobody away, and says so. `waiting`: called twice a second while another process has it, with the seconds so far;
    what it raises ends the wait."""
    lock, began = FileLock(path, fallback_to_soft=False), time.monotonic()  # a soft one of a lost host stays
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while not lock.is_locked:
            try:
                lock.acquire(timeout=LOOK_S)
            except Timeout:
                waiting(time.monotonic() - began)
    except OSError as error:
        print(f"specdist: {path} cannot be locked: {error}", file=sys.stderr, flush=True)
    try:
        yield lock.is_locked
    finally:
        lock.release()
