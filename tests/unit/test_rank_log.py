# SPDX-License-Identifier: Apache-2.0
"""A rank's log and what of it is shown on the terminal."""

from __future__ import annotations

import contextlib
import io
import os

from specdist.run.rank_log import Tee


def test_a_terminal_that_is_gone_does_not_end_the_run():
    reader, writer = os.pipe()
    log, terminal = io.StringIO(), os.fdopen(writer, "w", buffering=1)
    spoken = Tee(log, terminal)
    print("before", file=spoken)
    assert os.read(reader, 100) == b"before\n"
    os.close(reader)
    for _ in range(3):
        print("after", file=spoken, flush=True)
    assert log.getvalue() == "before\nafter\nafter\nafter\n"
    with contextlib.suppress(BrokenPipeError):
        terminal.close()
