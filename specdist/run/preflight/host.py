# SPDX-License-Identifier: Apache-2.0
"""What the first rank of each host reports for all of them: the run directory, address and clock."""

import contextlib
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import msgspec
import torch.distributed as dist

from specdist.core.files import write_atomically

VISIBLE_S = 5.0
"""How long another host's file may take to appear: network file systems cache directories."""
_LOOK_AGAIN_S = 0.2


class Storage(msgspec.Struct, frozen=True):
    """The run directory as one host sees it.

    Attributes:
        error: what went wrong when a file was created and made durable; empty for nothing.
        shared: whether this host sees the file of rank 0; None where there is none to see.
        free: room for an ordinary user, in bytes; None where the directory cannot be asked.
    """

    directory: str
    error: str
    shared: bool | None
    free: int | None


class Clock(msgspec.Struct, frozen=True):
    """What a host's clock said, in seconds since the epoch, at a point that all hosts passed within `within_s`."""

    now_s: float
    within_s: float


class HostFacts(msgspec.Struct, frozen=True):
    """The facts of one host. `address`: on the route to the rendezvous, and which interface has it; empty where no
    world was started. `clock`: None where no world was started, or a host is missing."""

    storage: Storage
    address: str = ""
    clock: Clock | None = None


@contextlib.contextmanager
def marked(directory: Path) -> Iterator[str]:
    """Put a file where `directory` is, or would be created. Yields its name; empty where it cannot be written."""
    file = _existing(directory) / f".preflight-{secrets.token_hex(8)}"
    with contextlib.suppress(OSError):
        write_atomically(file, "")
    try:
        yield file.name if os.path.exists(file) else ""
    finally:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)


def examine_storage(directory: Path, mark: str) -> Storage:
    """Look for rank 0's file `mark` where `directory` is, or would be, and write one that no kill leaves behind."""
    there = _existing(directory)
    shared = _appears(there / mark) if mark else None
    error, free = "", None
    try:
        with tempfile.TemporaryFile(dir=there) as own:
            own.write(b"written")
            own.flush()
            os.fsync(own.fileno())
    except OSError as failure:
        error = failure.strerror or str(failure)  # without the name of the file: the same on all hosts
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(there).free
    return Storage(str(directory), error, shared, free)


def _existing(directory: Path) -> Path:
    return next(path for path in (directory.absolute(), *directory.absolute().parents) if os.path.exists(path))


def _appears(file: Path) -> bool:
    deadline = time.monotonic() + VISIBLE_S
    while not os.path.exists(file):
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_AGAIN_S)  # a file system does not tell what another host has done
    return True


def read_clock(store: dist.Store, hosts: int, timeout_s: float) -> Clock | None:
    """This host's clock at a point that `hosts` processes, all that call this, pass together; None if one does not come
    within `timeout_s` seconds."""
    for point in ("present", "clock"):  # the first absorbs how late they come
        began = time.time()
        if store.add(f"{point}/count", 1) == hosts:
            store.set(point, "")
        try:
            store.wait([point], timedelta(seconds=timeout_s))
        except dist.DistStoreError:
            return None
    now = time.time()
    return Clock(now, now - began)
