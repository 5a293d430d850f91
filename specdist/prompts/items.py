# SPDX-License-Identifier: Apache-2.0
"""Work items by index, on every rank: the stream is a pure function, so no rank is ever told what is in an item."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from specdist.core.progress import Cursor
from specdist.core.records import WorkItem
from specdist.prompts.stream import Stream


class Items:
    """A window over the stream that moves forward. Safe to use from several threads."""

    def __init__(self, stream: Stream, start: Cursor, first: int, end: int):
        self.first, self.end = first, end
        self._source: Iterator[WorkItem] = stream.items(start, first)
        self._window: dict[int, WorkItem] = {}
        self._next = self._floor = first
        self._lock = threading.Lock()

    def __getitem__(self, index: int) -> WorkItem:
        """Item `index`; it must not have been forgotten."""
        with self._lock:
            while self._next <= index:
                item = next(self._source)
                if self._next >= self._floor:
                    self._window[self._next] = item
                self._next += 1
            return self._window[index]

    def forget(self, before: int) -> None:
        """Drop the items below `before`; they will not be asked for again."""
        with self._lock:
            self._floor = max(self._floor, before)
            for index in [i for i in self._window if i < before]:
                del self._window[index]
