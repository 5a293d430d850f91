# SPDX-License-Identifier: Apache-2.0
"""Which slot of the receive rings each item that is sent has, and which slots a lost replica may still write to.

A target replica that is lost may come back to life, or what it sent may still be on its way, and a one-sided write
cannot be refused. So a slot that it was to write to is in doubt: it is not given to another item before that replica
is known to write no more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable


class Slots:
    """The slots of the rings, which are alike on all draft ranks. The one that was free for longest is taken next."""

    def __init__(self, count: int):
        self.count = count
        self._free = deque(range(count))
        self._of: dict[int, int] = {}
        self._doubted: dict[int, set[int]] = {}

    def __getitem__(self, item: int) -> int:
        return self._of[item]

    def __contains__(self, item: int) -> bool:
        return item in self._of

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self, item: int) -> None:
        self._of[item] = self._free.popleft()

    def give_back(self, item: int) -> None:
        """No rank needs the rows of `item` any more."""
        slot = self._of.pop(item)
        if slot not in self._doubted:
            self._free.append(slot)

    def doubt(self, items: Iterable[int], replica: int) -> None:
        """`replica` was to write these items, and may still do so."""
        for item in items:
            self._doubted.setdefault(self._of[item], set()).add(replica)

    def renew(self, item: int) -> None:
        """Another replica is to write `item`: it moves out of a slot in doubt. Where none is free it keeps its own, for
        a late write of the same item brings the same rows."""
        if self._of[item] in self._doubted and self._free:
            self.take(item)

    def clear(self, replica: int) -> None:
        """`replica` is known to write no more."""
        used = set(self._of.values())
        for slot, doubted in list(self._doubted.items()):
            doubted.discard(replica)
            if not doubted:
                del self._doubted[slot]
                if slot not in used:
                    self._free.append(slot)
