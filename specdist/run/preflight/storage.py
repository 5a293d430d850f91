# SPDX-License-Identifier: Apache-2.0
"""Whether the run directory can be written, is the same one on all hosts, and how much room it has."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from specdist.core.files import write_atomically

VISIBLE_S = 5.0
"""So long another host's file may take to show: network file systems cache directories."""
_LOOK_AGAIN_S = 0.2


@dataclass(frozen=True)
class Mark:
    """A file that rank 0 puts into the run directory for the other hosts to find."""

    name: str
    error: str
    """Why it could not be written; empty where it was."""


@dataclass(frozen=True)
class Storage:
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
def marked(directory: Path) -> Iterator[Mark]:
    """Put a mark into `directory`, which is created for as long where it does not exist."""
    name = f".preflight-{secrets.token_hex(8)}"
    file = directory / name
    created: list[Path] = []
    error = ""
    try:
        created = [path for path in (directory, *directory.parents) if not path.exists()]
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(file, name)
    except OSError as failure:
        error = words_of(failure)
    try:
        yield Mark(name, error)
    finally:
        with contextlib.suppress(OSError):  # what could not be written need not go
            file.unlink()
        for path in created:
            with contextlib.suppress(OSError):  # somebody uses it by now
                path.rmdir()


def examine_storage(directory: Path, mark: Mark, host: str) -> Storage:
    """Look for the mark in `directory`, and write a file of this host's own beside it."""
    shared = None if mark.error else _appears(directory / mark.name, VISIBLE_S)
    own = directory / f"{mark.name}-{host}"
    error = ""
    try:
        write_atomically(own, host)
        own.unlink()
    except OSError as failure:
        error = words_of(failure)
    try:
        free = shutil.disk_usage(directory).free
    except OSError:
        free = None
    return Storage(str(directory), error, shared, free)


def words_of(failure: OSError) -> str:
    """What went wrong, without the name of the file, so that it is the same on all hosts."""
    return failure.strerror or str(failure)


def _appears(file: Path, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not _readable(file):
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_AGAIN_S)  # a file system tells nobody what another host has done
    return True


def _readable(file: Path) -> bool:
    try:
        return file.read_text() == file.name
    except OSError:
        return False
