# SPDX-License-Identifier: Apache-2.0
"""Which slot of the receive rings each item that is sent has, and which slots a lost replica may still write to.

A target replica that is lost may come back to life, or what it sent may still be on its way, and a one-sided write
cannot be refused. So a slot that it was to write to is in doubt: it is not given to another item before that replica
is known to write no more.
"""

from __future__ import annotations

from collections import deque


class Slots:
    """The slots of the rings of one pod, which are alike on all its draft ranks; the one that was free for longest is
    taken next. And how far its ranks have come: they release its items in order, once the next `together` of them are
    there.

    Attributes:
        low: the lowest item of the pod that is not released.
    """

    def __init__(self, count: int, first: int = 0, every: int = 1, together: int = 1):
        """`first`: the pod's first item; from there on each `every`-th is its."""
        self.count, self.low = count, first
        self._every, self._together = every, together
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

    def needed(self, end: int | None) -> range:
        """The items, before `end`, without which the ranks release none."""
        stop = self.low + self._every * self._together
        return range(self.low, stop if end is None else min(stop, end), self._every)

    def place(self, item: int, end: int | None) -> bool:
        """Give `item` a slot, unless those that are free are for others that are needed; whether it has one. One that
        had a slot before its replica was lost moves out of it where it is in doubt. Where none is free it keeps that,
        for a late write of the same item brings the same rows."""
        needed = self.needed(end)
        spare = self.free - sum(other not in self for other in needed)
        if item in self:
            moves = spare > 0 and self._of[item] in self._doubted
        else:
            moves = self.free > 0 and (spare > 0 or item in needed)
        if moves:
            self._of[item] = self._free.popleft()
        return item in self

    def release_low(self) -> None:
        """No rank needs the rows of item `low` any more."""
        slot = self._of.pop(self.low, None)  # None: nothing is sent anywhere
        if slot is not None and slot not in self._doubted:
            self._free.append(slot)
        self.low += self._every

    def doubt(self, item: int, replica: int) -> None:
        """`replica` was to write `item`, and may still do so."""
        self._doubted.setdefault(self._of[item], set()).add(replica)

    def clear(self, replica: int) -> None:
        """`replica` is known to write no more."""
        used = set(self._of.values())
        for slot, doubted in list(self._doubted.items()):
            doubted.discard(replica)
            if not doubted:
                del self._doubted[slot]
                if slot not in used:
                    self._free.append(slot)
