# SPDX-License-Identifier: Apache-2.0
"""What long work shows where there is no terminal, and a command that is interrupted."""

from __future__ import annotations

import contextlib
import re
import signal

import pytest

from specdist.core.progress_bar import ProgressBar
from specdist_launch import cli


def test_a_log_file_gets_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    for clock in ("time.monotonic", "rich.console.monotonic"):
        monkeypatch.setattr(clock, lambda: now[0])
    with ProgressBar("evaluate", 3) as bar:
        for done, moment in enumerate((4.0, 11.0, 15.0), 1):
            now[0] = moment
            bar.update(done, "half", f"{done} of 3: half")
        bar.say("waiting", "waiting for a lock")
        bar.say("waiting", "waiting for a lock")
    told = capsys.readouterr().err.splitlines()
    assert [line[20:] for line in told] == ["2 of 3: half, 7 s to go", "waiting for a lock"]
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in told)


def test_what_was_found_so_far_is_not_lost(capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(KeyboardInterrupt), ProgressBar("evaluate", 3) as bar:
        bar.update(2, "half", "2 of 3: half")
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "2 of 3: half\n"


def test_nothing_is_shown_on_other_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(KeyboardInterrupt), ProgressBar("prompts", None, enabled=False) as bar:
        bar.say("waiting", "waiting for a lock")
        raise KeyboardInterrupt
    assert capsys.readouterr() == ("", "")


def test_an_interrupted_command_ends_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("specdist.run.status.describe", interrupted)
    assert cli.main(["status", "run"]) == 128 + signal.SIGINT
    assert capsys.readouterr().err == "specdist: interrupted\n"
