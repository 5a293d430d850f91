# SPDX-License-Identifier: Apache-2.0
"""What the ranks of a channel's benchmark tell each other: numbers of items, through named pipes.

A pipe wakes its reader directly and hands over at once all that has come: 3 to 4 system calls an item at each end where
sockets with threads of their own take 16. A payload of a few MiB does not hide those.
"""

from __future__ import annotations

import contextlib
import os
import select
import struct
import tempfile
from collections.abc import Collection
from pathlib import Path

import torch.distributed as dist

from specdist.world.groups import World

_NOTE = struct.Struct("<q")
_MOST_BYTES = 65536
"""Read at once: what a pipe holds."""


class Notes:
    """Numbers of items, told to partners, ranks of this machine that name this one as theirs. One thread tells and one
    hears."""

    def __init__(self, world: World, partners: Collection[int]):
        store, rank = dist.PrefixStore("bench/notes", world.store), world.facts.rank
        with tempfile.TemporaryDirectory(prefix="specdist-notes-") as folder:
            path = Path(folder) / str(rank)
            os.mkfifo(path)
            self._inbox = os.open(path, os.O_RDWR | os.O_NONBLOCK)  # with a writer of its own it never ends
            store.set(str(rank), str(path))
            self._outboxes = [os.open(store.get(str(partner)).decode(), os.O_WRONLY) for partner in partners]
            for partner in partners:
                store.set(f"open/{rank}/{partner}", "")
            store.wait([f"open/{partner}/{rank}" for partner in partners])  # then the names may go
        self._poll = select.poll()
        self._poll.register(self._inbox, select.POLLIN)

    def tell(self, item: int) -> None:
        """Tell all partners. Waits where one has more than 8192 notes to hear."""
        note = _NOTE.pack(item)
        for outbox in self._outboxes:
            os.write(outbox, note)

    def heard(self, timeout_ms: int) -> list[int]:
        """What has been told to this rank; waits at most `timeout_ms` milliseconds for the first."""
        found = self._read()
        if not found and timeout_ms and self._poll.poll(timeout_ms):
            found = self._read()
        return found

    def _read(self) -> list[int]:
        with contextlib.suppress(BlockingIOError):
            return [item for (item,) in _NOTE.iter_unpack(os.read(self._inbox, _MOST_BYTES))]
        return []
