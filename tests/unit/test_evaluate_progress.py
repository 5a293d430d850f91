# SPDX-License-Identifier: Apache-2.0
"""What an evaluation shows while it runs where there is no terminal, and a command that is interrupted."""

from __future__ import annotations

import contextlib
import signal

import pytest

from specdist.evaluate import progress as evaluate_progress
from specdist.evaluate.progress import EvaluationProgress
from specdist.evaluate.report import Tally
from specdist_launch import cli

HALF = Tally(prompts=1, tokens=9, forwards=4, seconds=3.0, drafted=(4,), reached=(4,), accepted=(2,))


def test_a_log_file_gets_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(evaluate_progress.time, "monotonic", lambda: now[0])
    with EvaluationProgress() as progress:
        progress.begin("evaluate before training", 3)
        for done, moment in enumerate((4.0, 11.0, 15.0), 1):
            now[0] = moment
            progress.show(done, 3, HALF)
    said = "evaluate before training: 2 of 3 prompts, acceptance length 2.00, 3 tokens/s\n"
    assert capsys.readouterr() == ("", said)


def test_what_was_found_so_far_is_not_lost(capsys: pytest.CaptureFixture[str]) -> None:
    progress = EvaluationProgress()
    with contextlib.suppress(KeyboardInterrupt), progress:
        progress.begin("evaluate", 3)
        progress.show(2, 3, HALF)
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "evaluate: 2 of 3 prompts, acceptance length 2.00, 3 tokens/s\n"


def test_an_interrupted_command_ends_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_status", interrupted)
    assert cli.main(["status", "run"]) == 128 + signal.SIGINT
    assert capsys.readouterr().err == "specdist: interrupted\n"
