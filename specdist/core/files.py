# SPDX-License-Identifier: Apache-2.0
"""Files that are there whole or not at all, those that take what they can, and locks between processes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import msgspec
from filelock import FileLock, Timeout

from specdist.core.errors import DataError, DiskError, UserError, say
from specdist.core.words import is_text

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

T = TypeVar("T")


def write_atomically(path: Path, content: str | bytes, private: bool = False) -> None:
    """Write a small file so that a reader sees all of it or nothing, also after a power loss. `private`: for this user
    alone to read."""
    temporary, mode = path.with_name(path.name + ".tmp"), 0o600 if private else 0o666
    try:
        if private:
            temporary.unlink(missing_ok=True)  # it may be one that others can read
        with open(temporary, "xb" if private else "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_directory(path.parent)


class _Unfailing(io.FileIO):
    def write(self, data: ReadableBuffer) -> int:
        with contextlib.suppress(OSError):
            return super().write(data)
        return memoryview(data).nbytes


def unfailing(file: Path | int) -> TextIO:
    """A file to append to, or a descriptor, that drops what it cannot take: no run may end because the disk of its log
    is full, or who read its terminal is gone. A descriptor stays open: the next socket would get a standard one's
    number, and what libraries write there."""
    raw = _Unfailing(file, "a", closefd=isinstance(file, Path))
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8", errors="backslashreplace", line_buffering=True)


def unwritable(directory: Path) -> OSError | None:
    """Why nothing can be written into `directory`; None where it can."""
    try:
        with tempfile.TemporaryFile(dir=directory) as probe:
            probe.write(b"x" * 4096)
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        return error
    return None


def existing(directory: Path) -> Path:
    """It, or the lowest folder above it that is there."""
    return next(path for path in (directory.absolute(), *directory.absolute().parents) if os.path.exists(path))


def check_output(option: str, path: str | Path, folder: bool = False) -> None:
    """Raise UserError where an option's file, or a `folder` that is made with those above it, cannot be written."""
    if folder and not is_text(whole := Path(path).absolute()):  # what is in it names it
        raise UserError(f"{option}: {str(whole)!r} is not UTF-8: choose another name")
    parent = existing(Path(path).parent) if folder else Path(path).absolute().parent
    if (cause := unwritable(parent)) is not None:
        raise UserError(f"{option} {path}: {parent} cannot be written: {cause.strerror}")
    if not folder and Path(path).is_dir():
        raise UserError(f"{option} {path} is a directory: give a file")


def of_full_disk(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def telling_full_disk(directory: Path) -> Iterator[None]:
    """Raise DiskError, which names `directory`, for an exception inside that says that its file system is full."""
    try:
        yield
    except OSError as error:
        if not of_full_disk(error):
            raise
        raise DiskError(f"{directory} takes no more: {error}: make room, and the same command goes on") from error


def to_json(value: Any) -> str:
    """A dataclass, or what JSON knows, as text for people and programs."""
    return msgspec.json.format(msgspec.json.encode(value), indent=1).decode() + "\n"


def read_json(path: Path, kind: type[T]) -> T | None:
    """The value of type `kind` in a file; None where there is no file. Raises DataError: the file holds something else,
    as one of another version may."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not what specdist writes there: {error}") from error


def sha256(path: Path) -> str:
    """Of a file's bytes, in hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable, as fsync of a file does not."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def directory_made_whole(final: Path, marker: str, maker: str = "") -> Iterator[Path]:
    """A directory to write into, which becomes `final` when the block is over: a kill leaves no half of it. Where
    another process has been quicker, so that `final` has its file `marker`, that one stays. `maker`: whose work it is,
    as a part of its name until then."""
    work = final.with_name(f"{final.name}.{maker}.{uuid.uuid4().hex}.tmp")
    try:
        work.mkdir()
        yield work
        sync_directory(work)
        work.rename(final)
        sync_directory(final.parent)
    except OSError:
        if not (final / marker).exists():
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


LOOK_S = 0.5


@contextlib.contextmanager
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
        say(f"{path} cannot be locked: {error}")
    try:
        yield lock.is_locked
    finally:
        lock.release()
