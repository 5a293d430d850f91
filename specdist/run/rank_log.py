# SPDX-License-Identifier: Apache-2.0
"""Every rank's output in a file of its own; few of them also write to the terminal.

Both output descriptors go to the file, so that what libraries and a dying interpreter write is there too. Rank 0 and
the first draft rank also write to the terminal, and so does the rank that meets the world's first failure.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import signal
import sys
from pathlib import Path
from typing import TextIO

from specdist.core.files import unfailing
from specdist.core.launch_env import RankFacts

SHOW_STACKS = signal.SIGQUIT
"""Has a rank write where all its threads are into its log, also one that runs no Python any more."""
_ESCAPE = "\x1b"


class RankLog:
    """Redirects this process's output to `directory`/starting/HOST-rankN.log, and into its role's folder once that is
    known; `directory` may be another by then. Raises OSError: the file cannot be created."""

    def __init__(self, directory: Path, facts: RankFacts):
        self.directory, self._name = directory, f"{facts.host}-rank{facts.rank}.log"
        self.path = self._place("starting")
        file = unfailing(self.path)
        sys.stdout.flush()
        sys.stderr.flush()
        self.terminal = unfailing(os.dup(sys.stderr.fileno()))
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
        sys.stdout = sys.stderr = self.file = file
        faulthandler.register(SHOW_STACKS, file)
        if facts.rank == 0:
            self.show_on_terminal()

    def move_to(self, role: str) -> None:
        path = self._place(role)
        self.path.rename(path)
        with contextlib.suppress(OSError):  # others are still in there
            os.removedirs(self.path.parent)
        self.path = path

    def show_on_terminal(self) -> None:
        """From here on what this rank prints is shown on the terminal too."""
        sys.stderr = Tee(self.file, self.terminal)

    def _place(self, folder: str) -> Path:
        path = self.directory / folder / self._name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


class Tee(io.TextIOBase):
    """Writes to a rank's log and to the terminal; what moves the cursor (a live display) to the terminal only."""

    def __init__(self, log: TextIO, terminal: TextIO):
        self._log, self._terminal = log, terminal

    def write(self, text: str) -> int:
        if _ESCAPE not in text:
            self._log.write(text)
        self._terminal.write(text)
        return len(text)

    def flush(self) -> None:
        self._log.flush()
        self._terminal.flush()

    def isatty(self) -> bool:
        return self._terminal.isatty()

    def fileno(self) -> int:
        return self._log.fileno()

    def writable(self) -> bool:
        return True
