# SPDX-License-Identifier: Apache-2.0
"""The progress of a preparation on stderr: a live bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

LOG_EVERY_S = 10.0


class Display:
    def __init__(self, enabled: bool) -> None:
        self.console = Console(stderr=True, quiet=not enabled, soft_wrap=True, highlight=False)
        self.live = enabled and self.console.is_terminal
        columns = (TextColumn("prompts"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self._progress = Progress(
            *columns, TextColumn("{task.description}"), console=self.console, disable=not self.live, transient=True
        )
        self._task = self._progress.add_task("", total=None)
        self._total = 0
        self._done = 0
        self._logged = time.monotonic()
        self._said = ""

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def say(self, message: str) -> None:
        """Show what is being waited for; the same message again is shown once more only after a while."""
        self._progress.update(self._task, description=message)
        if not self.live and (message != self._said or self._due()):
            self._said = message
            self._print(message)

    def start(self, total_bytes: int) -> None:
        self._total = total_bytes
        self._progress.update(self._task, total=total_bytes, completed=0, description="")

    def advance(self, size: int, sequences: int, tokens: int, bad: int) -> None:
        self._done += size
        text = f"{sequences:,} sequences, {tokens:,} tokens" + (f", {bad:,} bad samples" if bad else "")
        self._progress.update(self._task, advance=size, description=text)
        if not self.live and self._due():
            self._print(f"{min(self._done / max(self._total, 1), 1):.0%}: {text}")

    def _due(self) -> bool:
        return time.monotonic() - self._logged > LOG_EVERY_S

    def _print(self, text: str) -> None:
        self._logged = time.monotonic()
        self.console.print(f"prompts: {text}", markup=False)
