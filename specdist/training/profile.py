# SPDX-License-Identifier: Apache-2.0
"""Which steps are on the timeline, and a rank's part of it: torch.profiler over the items of these steps."""

import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import torch
from torch.profiler import ProfilerActivity, _ExperimentalConfig

from specdist.core.clock import ClockOffset, ClockReading, clock_offset
from specdist.core.errors import WorldError
from specdist.core.files import write_atomically
from specdist.prompts.schedule import Schedule
from specdist.training.config import WARM_UP_STEPS, TraceConfig

logger = logging.getLogger(__name__)

_LEAD_ITEMS = 8
"""The profiler, which takes a second to load, is loaded this many items before the first traced one."""
_READINGS = 32
_ANSWER_S = 5.0
_FINISH_S = 120.0
_LEAVE_S = 5.0

AskClock = Callable[[float], ClockReading]
"""Asks rank 0 for its time, within a number of seconds; raises WorldError."""


def find_traced_steps(config: TraceConfig, schedule: Schedule) -> tuple[range, range] | None:
    """What a start of the job records that does what `schedule` says; None for nothing: steps, 1 being the first of the
    run, and the items that they are made of. Steps that an earlier start has done are left out."""
    if config.steps is None:
        return None
    first = config.start or schedule.first_step + WARM_UP_STEPS + 1
    last = min(first + config.steps - 1, schedule.total_steps)
    first = max(first, schedule.first_step + 1)
    if last < first:
        return None
    return range(first, last + 1), range(schedule.training(first - 1).start, schedule.training(last - 1).stop)


class PartInfo(msgspec.Struct):
    """What a rank's profile does not say, as it lies in ATTEMPT/trace/rank-N.json beside rank-N.profile.json.

    Attributes:
        label: the rank's role and coordinates.
        first_step, last_step: the traced steps.
        items: the first of their items, and the one after their last.
        clock: the way to rank 0's clock, None where it could not be asked (the run had failed).
        threads: their names by the system's number.
        slots: of rank 0: a moment of the host's clock in ns, and how many slots of a ring are in which state.
    """

    rank: int
    ranks: int
    label: str
    host: str
    first_step: int
    last_step: int
    items: tuple[int, int]
    clock: ClockOffset | None = None
    threads: dict[int, str] = {}
    slots: list[tuple[int, dict[str, int]]] = []


class Profile:
    """The profile of one rank. `reach` is for the rank's main loop alone.

    What takes time (waiting for the device, asking for the clock, the files) is done in a thread when the last traced
    item is over. That thread also stops the profiler when the world has failed and the main thread is stuck.
    `info`: None records nothing. `directory`: where the parts of all ranks go.
    """

    def __init__(self, info: PartInfo | None, device: torch.device, directory: Path):
        self.on, self._items = info is not None, range(0) if info is None else range(*info.items)
        self._info, self._device, self._directory = info, device, directory
        self._ask: AskClock | None = None
        self._over, self._counted, self._failed = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._write, name="specdist-profile", daemon=True)
        self._prepared = False

    @functools.cached_property
    def _profiler(self) -> torch.profiler.profile:
        activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (self._device.type == "cuda")]
        every_thread = _ExperimentalConfig(profile_all_threads=True)
        return torch.profiler.profile(activities=activities, experimental_config=every_thread)

    @contextmanager
    def recording(self, ask: AskClock) -> Iterator[None]:
        """Around the rank's work: what is not written when it ends is written then."""
        self._ask = ask
        try:
            yield
        except BaseException:
            self.abandon()
            raise
        finally:
            self.finish()

    def reach(self, oldest: int, newest: int) -> None:
        """Item `newest` is about to begin on this rank, and all before `oldest` are done."""
        if not self.on or self._over.is_set():
            return
        if not self._prepared and newest >= self._items.start - _LEAD_ITEMS:
            self._prepared = True
            self._profiler.prepare_trace()
        if not self._is_started() and newest >= self._items.start:  # also of a replica that had none of the items
            self._profiler.start_trace()
            self._thread.start()
        if oldest >= self._items.stop:
            self._over.set()

    def ends_at(self, oldest: int) -> bool:
        """Whether `reach` with this oldest item ends the recording."""
        return self._is_started() and not self._over.is_set() and oldest >= self._items.stop

    def count_slots(self, lowest: int, highest: int, counts: dict[str, int]) -> None:
        """The state of a ring's slots now, while the items `lowest` to `highest` are on their way; rank 0 calls it."""
        if not self.on:
            return
        if lowest >= self._items.stop:
            self._counted.set()
        elif highest >= self._items.start:
            assert self._info is not None
            slots = self._info.slots
            if not slots or slots[-1][1] != counts:
                slots.append((time.time_ns(), counts))

    def abandon(self) -> None:
        """The world has failed: what was recorded is written without waiting for anything."""
        self._failed.set()
        self._over.set()
        self._counted.set()

    def finish(self) -> None:
        """Nothing more comes: wait until what was recorded is written. The control plane is still up."""
        self._over.set()
        self._counted.set()
        if self._is_started():
            self._thread.join(_LEAVE_S if self._failed.is_set() else _FINISH_S)

    def _is_started(self) -> bool:
        return self._thread.ident is not None

    def _write(self) -> None:
        info, profiler = self._info, self._profiler
        assert info is not None
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # of this thread
        self._over.wait()
        info.clock = self._clock_offset()
        info.threads = {t.native_id: t.name for t in threading.enumerate() if t.native_id is not None}
        if self._failed.is_set() and profiler.profiler is not None:
            profiler.profiler.use_device = None  # else it waits for the device, where a transfer may be stuck
        try:
            profiler.stop()
            self._directory.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(self._directory / f"rank-{info.rank}.profile.json"))
            if info.slots:
                self._counted.wait()  # the items are in the rings for longer than at this rank
            write_atomically(self._directory / f"rank-{info.rank}.json", msgspec.json.encode(info).decode() + "\n")
        except (OSError, RuntimeError) as error:  # a trace is never worth a run
            logger.warning("this rank's part of the trace could not be written: %s", error)

    def _clock_offset(self) -> ClockOffset | None:
        if self._ask is None or self._failed.is_set():
            return None
        try:
            return clock_offset([self._ask(_ANSWER_S) for _ in range(_READINGS)])
        except WorldError as error:
            logger.warning("this rank's clock could not be compared with rank 0's: %s", error)
            return None


NO_PROFILE = Profile(None, torch.device("cpu"), Path())
