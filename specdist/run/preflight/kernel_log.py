# SPDX-License-Identifier: Apache-2.0
"""XID errors of GPUs, from the kernel's log.

NVML reports them only to a process that listened when they happened. Their history is in the kernel's log alone, which
many systems keep from ordinary users and containers: then it is unknown.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator

import msgspec

_XID = re.compile(r"^(?:<\d+>)?\[ *([\d.]+)\] NVRM: Xid \(PCI:([0-9a-fA-F:.]+)\): (\d+)(?:, *(.*))?$", re.MULTILINE)
_LIMIT_S = 10.0

APPLICATION_XIDS = frozenset({13, 31, 43, 45, 68, 69})
"""Errors that a program causes (a wrong address, an exception in a kernel) or that follow from its end."""


class Xid(msgspec.Struct, frozen=True):
    """One report of the driver. `age_s`: how long ago it was, in seconds."""

    bus: str
    code: int
    age_s: float
    text: str

    @property
    def hardware(self) -> bool:
        """Whether the GPU, its memory, a link or the driver is at fault, rather than a program."""
        return self.code not in APPLICATION_XIDS


def read_xids() -> tuple[Xid, ...] | None:
    """The XID errors since the host was booted that its log still holds; None where the log cannot be read."""
    try:
        log = subprocess.run(["dmesg", "--raw"], capture_output=True, timeout=_LIMIT_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return tuple(parse_xids(log.decode(errors="replace"), time.monotonic()))


def parse_xids(log: str, now_s: float) -> Iterator[Xid]:
    """The XIDs in lines of `dmesg --raw`; `now_s` is the time since boot, in seconds."""
    for stamp, bus, code, text in _XID.findall(log):
        yield Xid(bus, int(code), now_s - float(stamp), text.strip())
