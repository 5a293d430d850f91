# SPDX-License-Identifier: Apache-2.0
"""Keeps in memory what a rank tells of the traced items. Telling is all the stations do: appending to lists, recording
events; what takes time is done by `writer`."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from specdist.core.topology import Link
from specdist.core.trace import NO_TRANSFER, NOTHING, AskClock, Trace, Transfer, Value
from specdist.run.trace.part import Count, Span
from specdist.run.trace.spans import ComputeSpan, DeviceTransfer, HostSpan, HostTransfer, thread_track
from specdist.run.trace.watch import Watcher
from specdist.run.trace.writer import Kept, Who, Writer
from specdist.training.trace_config import Window

_MOST_RECORDS = 200_000
_LINK_STREAMS = 16


class Recorder(Trace):
    """The recorder of a rank. Several threads may tell it things; `reach` is for the rank's main loop alone.

    Args:
        directory: where the parts of all ranks go.
        most: records that are kept at most; what is beyond is counted.
    """

    on = True

    def __init__(self, window: Window, who: Who, directory: Path, most: int = _MOST_RECORDS):
        self._items, self._device, self._room = window.items, who.device, most
        self._kept = Kept()
        self._writer = Writer(self._kept, window, who, directory)
        self._watchers: dict[Link, Watcher] = {}
        self._streams: dict[Link, torch.cuda.Stream] = {}

    @contextmanager
    def recording(self, ask: AskClock) -> Iterator[None]:
        self._writer.ask = ask
        try:
            yield
        except BaseException:
            self.abandon()
            raise
        finally:
            self.finish()

    def reach(self, item: int) -> None:
        if item >= self._items.start:
            self._writer.start()
        if item >= self._items.stop:
            self._writer.over.set()

    def abandon(self) -> None:
        self._writer.hurry()

    def finish(self) -> None:
        self._writer.join()
        for watcher in self._watchers.values():
            watcher.close()

    def span(self, name: str, item: int, **args: Value) -> AbstractContextManager[None]:
        if not self._takes(item):
            return NOTHING
        return HostSpan(self._kept.spans.append, name, {"item": item, **args})

    def compute(self, name: str, item: int, **args: Value) -> AbstractContextManager[None]:
        if not self._takes(item):
            return NOTHING
        if self._device.type != "cuda":
            return HostSpan(self._kept.spans.append, name, {"item": item, **args})
        return ComputeSpan(self._kept.spans.append, self._kept.timed.append, name, {"item": item, **args})

    def waited(self, name: str, since_ns: int, item: int) -> None:
        if self._takes(item):
            self._kept.spans.append(Span(thread_track(), name, since_ns, time.monotonic_ns(), {"item": item}))

    def transfer(self, name: str, item: int, link: Link, size: int, on_device: bool = False) -> Transfer:
        if not self._takes(item):
            return NO_TRANSFER
        track = f"link {link.source} to {link.destination}"
        args: dict[str, Value] = {
            "item": item, "bytes": size, "source": link.source, "destination": link.destination,
        }  # fmt: skip
        made: HostTransfer
        if on_device:
            made = DeviceTransfer(track, name, args, self._stream(link))
        else:
            made = HostTransfer(track, name, args, functools.partial(self._watch, link))
        self._kept.transfers.append(made)
        return made

    def count(self, name: str, lowest: int, highest: int, **values: int) -> None:
        if lowest >= self._items.stop:
            self._writer.counted.set()
        elif highest >= self._items.start:
            counts = self._kept.counts
            if (not counts or counts[-1].values != values) and self._has_room():
                counts.append(Count(name, time.monotonic_ns(), values))

    def _takes(self, item: int) -> bool:
        return item in self._items and self._has_room()

    def _has_room(self) -> bool:
        """Take room for one record. Threads may overdraw by one each: it is a bound on memory, not a sum to keep."""
        if self._room > 0:
            self._room -= 1
            return True
        self._kept.dropped += 1
        return False

    def _watch(self, link: Link, work: dist.Work, ended: Callable[[], None]) -> dist.Work:
        if link not in self._watchers:
            self._watchers[link] = Watcher()
        return self._watchers[link].watch(work, ended)

    def _stream(self, link: Link) -> torch.cuda.Stream:
        """A stream to wait for the transfers of `link` on: few of them, of a priority that nothing else here uses, so
        that CUDA does not give out one that does work."""
        if link not in self._streams:
            made = list(self._streams.values())
            full = len(made) >= _LINK_STREAMS
            self._streams[link] = (
                made[len(made) % _LINK_STREAMS] if full else torch.cuda.Stream(self._device, priority=-1)
            )
        return self._streams[link]
