# SPDX-License-Identifier: Apache-2.0
"""How far an evaluation is, on stderr: a bar on a terminal, in a log file a line now and then, and where it was
interrupted."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from specdist.evaluate.report import Tally

LINE_EVERY_S = 10.0


class EvaluationProgress:
    """Of one or several evaluations of the same prompts, one after the other."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._live = sys.stderr.isatty()
        self._bar = Progress(
            *columns, TextColumn("{task.fields[figures]}"), console=Console(stderr=True), transient=True,
            disable=not self._live,
        )  # fmt: skip
        self._name, self._task = "", self._bar.add_task("", visible=False, figures="")
        self._said, self._line = time.monotonic(), ""

    def __enter__(self) -> EvaluationProgress:
        self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()
        if isinstance(error, KeyboardInterrupt) and self._line:
            print(self._line, file=sys.stderr, flush=True)

    def begin(self, name: str, prompts: int) -> None:
        """Another evaluation, of so many prompts."""
        self._name, self._task = name, self._bar.add_task(name, total=prompts, figures="")

    def show(self, done: int, prompts: int, tally: Tally) -> None:
        """What `done` of `prompts` prompts have come to; as `evaluate` calls its `progress`."""
        figures = f"acceptance length {tally.acceptance_length:.2f}, {tally.tokens_per_second:,.0f} tokens/s"
        self._bar.update(self._task, completed=done, figures=figures)
        self._line = f"{self._name}: {done} of {prompts} prompts, {figures}"
        now = time.monotonic()
        if not self._live and now - self._said >= LINE_EVERY_S:
            self._said = now
            print(self._line, file=sys.stderr, flush=True)
