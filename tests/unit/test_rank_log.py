# SPDX-License-Identifier: Apache-2.0
"""A rank's log and what of it is shown on the terminal."""

from __future__ import annotations

import io
import os
from pathlib import Path

from specdist.core.files import unfailing
from specdist.run.rank_log import Tee


def test_a_terminal_that_is_gone_does_not_end_the_run():
    reader, writer = os.pipe()
    log, terminal = io.StringIO(), unfailing(writer)
    spoken = Tee(log, terminal)
    print("before", file=spoken)
    assert os.read(reader, 100) == b"before\n"
    os.close(reader)
    for _ in range(3):
        print("after", file=spoken, flush=True)
    assert log.getvalue() == "before\nafter\nafter\nafter\n"
    os.close(writer)


def test_a_stream_that_another_one_replaces_leaves_its_descriptor_open(tmp_path):
    """What libraries wrote to stderr went to the connection that got its number, and ended that."""
    reader, writer = os.pipe()
    stream = unfailing(writer)
    stream = unfailing(tmp_path / "log")
    os.write(writer, b"after")
    assert os.read(reader, 100) == b"after"
    stream.close()
    os.close(writer)
    os.close(reader)


def test_a_full_disk_of_the_log_does_not_end_the_run():
    log = unfailing(Path("/dev/full"))
    terminal = io.StringIO()
    for _ in range(3):
        print("said" * 5000, file=Tee(log, terminal), flush=True)
    log.close()  # as an interpreter that ends would
    assert terminal.getvalue().count("said" * 5000) == 3
