# SPDX-License-Identifier: Apache-2.0
"""How far something is that takes long, on stderr: a live bar on a terminal, in a log a plain line now and then."""

import math
import sys
import time
from typing import Self

_BEFORE_TEXT = 35
"""Columns that the live line has before its text, but for name and counts: figures of the text are left out rather than
the time to go, and the bar, which takes 10 of them, gives way to times of a day and more."""
_RATE_S = 600.0
"""Over how long the rate is taken that the time to go follows from."""


def duration(seconds: float) -> str:
    """A time in the unit that says enough of it."""
    if seconds < 120:
        return f"{max(seconds, 0):.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


class ProgressBar:
    """One stretch of work. As a context, it says how far the work came when Ctrl-C ends it.

    Args:
        total: in the unit of `done`; None: not known yet, see `set_total`.
        counted: whether "done/total" is shown, else a percentage.
        every_s: seconds between two lines in a log, at least.
        at_once: whether the first line comes at once.
        transient: whether the bar is removed in the end.
        enabled: False shows nothing at all.
    """

    def __init__(
        self,
        name: str,
        total: int | None,
        done: int = 0,
        *,
        counted: bool = True,
        every_s: float = 10.0,
        at_once: bool = False,
        transient: bool = True,
        enabled: bool = True,
    ):
        # Here, because everything that reads a configuration would load it.
        from rich import progress as rich
        from rich.console import Console

        self._enabled, self._live = enabled, enabled and sys.stderr.isatty()
        self._every_s, self._written_at = every_s, -math.inf if at_once else time.monotonic()
        self._before = _BEFORE_TEXT + len(name) + (2 * len(str(total)) if counted else 4)
        self._line = self._said = ""
        columns = (
            rich.TextColumn(f"[bold]{name}"),
            rich.BarColumn(bar_width=None),
            rich.MofNCompleteColumn() if counted else rich.TaskProgressColumn(),
            rich.TimeElapsedColumn(),
            rich.TextColumn("eta"),
            rich.TimeRemainingColumn(),
            rich.TextColumn("{task.fields[text]}", markup=False),
        )
        console, hidden = Console(stderr=True), not self._live
        self._bar = rich.Progress(
            *columns,
            console=console,
            expand=True,
            transient=transient,
            disable=hidden,
            speed_estimate_period=_RATE_S,
        )
        self._task = self._bar.add_task(name, total=total, completed=done, text="")
        self._bar.start()

    def set_total(self, total: int) -> None:
        self._bar.update(self._task, total=total, completed=0, text="")

    def move(self, done: int) -> None:
        """Move the live bar; its text stays."""
        self._bar.update(self._task, completed=done)

    def update(self, done: int, text: str, line: str, now: bool = False) -> None:
        """`text` stands beside the live bar. In a log `line` is written, with the time to go, if it is time for one or
        `now`."""
        self._bar.update(self._task, completed=done, text=self._cut(text))
        left = self.left_s
        self._line = line = line if not left else f"{line}, {duration(left)} to go"
        if now or time.monotonic() - self._written_at >= self._every_s:
            self._write(line)

    def say(self, text: str, line: str) -> None:
        """What is being waited for. In a log the same line comes again only after a while, and an empty one never."""
        self._bar.update(self._task, text=self._cut(text))
        if line and (line != self._said or time.monotonic() - self._written_at >= self._every_s):
            self._said = line
            self._write(line)

    @property
    def left_s(self) -> float | None:
        """Seconds to go, at the rate that it went of late; None as long as there is no rate."""
        return self._bar.tasks[0].time_remaining

    def close(self) -> None:
        self._bar.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.close()
        if isinstance(error, KeyboardInterrupt) and self._line and self._enabled:
            print(self._line, file=sys.stderr, flush=True)

    def _cut(self, text: str) -> str:
        """The figures of `text`, with two blanks between them, for which there is room."""
        room = max(self._bar.console.width - self._before, 0)
        while len(text) > room and "  " in text:
            text = text.rpartition("  ")[0]
        return text if len(text) <= room else text[: max(room - 1, 0)] + "…"

    def _write(self, line: str) -> None:
        if self._enabled and not self._live:
            self._written_at = time.monotonic()
            print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}", file=sys.stderr, flush=True)
