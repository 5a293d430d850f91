# SPDX-License-Identifier: Apache-2.0
"""Whether the run directory can be written, is the same one on all hosts, and how much room it has."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from specdist.core.files import write_atomically

VISIBLE_S = 5.0
"""How long another host's file may take to appear: network file systems cache directories."""
_LOOK_AGAIN_S = 0.2


class Storage(msgspec.Struct, frozen=True):
    """The run directory as one host sees it.

    Attributes:
        error: what went wrong when a file was created, made durable, renamed and deleted; empty for nothing.
        shared: whether this host sees the file of rank 0; None where rank 0 could not write one.
        free: room for an ordinary user, in bytes; None where the directory cannot be asked.
    """

    directory: str
    error: str
    shared: bool | None
    free: int | None


@contextlib.contextmanager
def marked(directory: Path) -> Iterator[str]:
    """Put a file into `directory`, which is created for as long where it does not exist. Yields the file's name; empty
    where it could not be written."""
    file = directory / _new_name()
    created = [path for path in (directory, *directory.parents) if not os.path.exists(path)]
    with contextlib.suppress(OSError):
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(file, file.name)
    try:
        yield file.name if os.path.exists(file) else ""
    finally:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # others use it by now, or it could not be created
            for path in created:
                path.rmdir()


def examine_storage(directory: Path, mark: str) -> Storage:
    """Look for the file `mark` of rank 0 in `directory`, and write one of this host's own beside it."""
    shared = _appears(directory / mark) if mark else None
    own, error, free = directory / _new_name(), "", None
    try:
        write_atomically(own, "")
        own.unlink()
    except OSError as failure:
        error = failure.strerror or str(failure)  # without the name of the file: the same on all hosts
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(directory).free
    return Storage(str(directory), error, shared, free)


def _new_name() -> str:
    return f".preflight-{secrets.token_hex(8)}"


def _appears(file: Path) -> bool:
    deadline = time.monotonic() + VISIBLE_S
    while not os.path.exists(file):
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_AGAIN_S)  # a file system does not tell what another host has done
    return True
