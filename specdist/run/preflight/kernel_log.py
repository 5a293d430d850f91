# SPDX-License-Identifier: Apache-2.0
"""XID errors of GPUs, from the kernel's log.

NVML reports them only to a process that listened when they happened. Their history is in the kernel's log alone, which
many systems keep from ordinary users and containers: then it is unknown.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

KERNEL_LOG = Path("/dev/kmsg")
_RECORD_BYTES = 8192
"""The kernel's own limit of a record."""
_XID = re.compile(r"NVRM: Xid \(PCI:([0-9a-fA-F:.]+)\): (\d+)(?:, *(.*))?")

APPLICATION_XIDS = frozenset({13, 31, 43, 45, 68, 69})
"""Errors that a program causes (a wrong address, an exception in a kernel) or that follow from its end."""


@dataclass(frozen=True)
class Xid:
    """One report of the driver."""

    bus: str
    code: int
    age_s: float
    """How long ago it was, in seconds."""
    text: str

    @property
    def hardware(self) -> bool:
        """Whether the GPU, its memory, a link or the driver is at fault, rather than a program."""
        return self.code not in APPLICATION_XIDS


def read_xids(log: Path = KERNEL_LOG) -> tuple[Xid, ...] | None:
    """The XID errors since the host was booted that its log still holds; None where the log cannot be read."""
    try:
        return tuple(parse_xids(_records(log), time.monotonic()))
    except OSError:
        return None


def parse_xids(records: Iterable[str], now_s: float) -> Iterator[Xid]:
    """Find the XIDs in records of /dev/kmsg: `level,number,microseconds since boot,flags;text`."""
    for record in records:
        found = _XID.search(record)
        if found:
            stamp = record.split(";", 1)[0].split(",")[2]
            yield Xid(found[1], int(found[2]), now_s - int(stamp) / 1e6, (found[3] or "").strip())


def _records(log: Path) -> Iterator[str]:
    descriptor = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
    try:
        while True:
            try:
                record = os.read(descriptor, _RECORD_BYTES)
            except BlockingIOError:  # that was the newest
                return
            except OSError as error:
                if error.errno == errno.EPIPE:  # overwritten while we read: the next read goes on behind it
                    continue
                raise
            if not record:
                return
            yield record.decode(errors="replace")
    finally:
        os.close(descriptor)
