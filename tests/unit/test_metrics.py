# SPDX-License-Identifier: Apache-2.0
"""The trackers: what they write, and that a resumed run tells one story."""

import io
import json
import re
import resource
import sys
from contextlib import nullcontext

import pytest
import wandb

from specdist.core.errors import ConfigError
from specdist.training.metrics import (
    JsonlTracker,
    MetricsConfig,
    ProgressTracker,
    TensorBoardTracker,
    WandbTracker,
    check_trackers,
)


def test_jsonl_drops_the_steps_that_are_done_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path)
    for step in (1, 2, 3):
        tracker.log(step, {"loss": float(step)})
    tracker.close()
    path.write_text(path.read_text() + '{"step": 4, "lo')  # a kill in the middle of a line
    resumed = JsonlTracker(path, resume_step=2)
    resumed.log(3, {"loss": 30.0})
    resumed.close()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["step"], r["loss"]) for r in records] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_a_full_disk_leaves_no_part_of_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path)
    tracker.log(1, {"loss": 1.0})
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (10, 0):
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + room, unlimited[1]))
        try:
            with pytest.raises(OSError, match=r"No space|too large"):
                tracker.log(2, {"loss": 2.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    tracker.log(3, {"loss": 3.0})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 3]


def test_tensorboard_holds_every_figure(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = TensorBoardTracker(tmp_path)
    tracker.log(5, {"loss": 1.5, "lr": 0.1})
    tracker.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(5, 1.5)]


def test_wandb_missing_says_how_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[trackers\]'"):
        WandbTracker("project", tmp_path, {})


def test_wandb_without_a_login_is_told_of_before_the_world_starts(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for mode, refused in (
        ("online", pytest.raises(ConfigError, match="nobody is logged in")),
        ("offline", nullcontext()),
    ):
        monkeypatch.setenv("WANDB_MODE", mode)
        wandb.teardown()
        with refused:
            check_trackers(MetricsConfig(wandb=True))
    wandb.teardown()


@pytest.mark.parametrize("columns", [60, 80, 100, 140])
def test_a_narrow_terminal_cuts_the_figures_and_nothing_else(columns, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    tracker = ProgressTracker(1000, 0)
    tracker.log(500, {"loss": 11.2, "simulated_acceptance_length": 1.3, "tokens_per_s": 7786.0})
    tracker.close()
    line = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", sys.stderr.getvalue()).replace("\r", "\n").strip().splitlines()[-1]
    assert "500/1000" in line
    assert "eta" in line
    assert len(line) <= columns
    shown = ["loss 11.2", "len 1.30", "tok/s 7,786"]
    assert [figure for figure in shown if figure in line] == shown[: {60: 1}.get(columns, 3)]
    assert "…" not in line


def test_a_log_file_gets_plain_lines(capsys):
    tracker = ProgressTracker(10, 0, leave_out=("target_wait",))
    tracker.log(4, {"loss": 1.2345, "draft_wait": 0.051, "target_wait": 0.1, "lr": 1e-4})
    tracker.log(8, {"loss": 1.0})  # too soon
    tracker.log(10, {"loss": 0.5})
    tracker.close()
    assert [line[20:] for line in capsys.readouterr().err.splitlines()] == [
        "step 4/10  loss 1.23  draft waits 5%",
        "step 10/10  loss 0.5",
    ]


def test_what_was_held_out_says_of_which_step_it_is(capsys):
    tracker = ProgressTracker(10, 0)
    tracker.log(4, {"held_out/loss": 2.0, "held_out/acceptance_length": 1.5})
    tracker.log(10, {"loss": 1.0})
    tracker.log(10, {"held_out/loss": 0.5, "held_out/acceptance_length": 2})
    tracker.close()
    assert [line[20:] for line in capsys.readouterr().err.splitlines()] == [
        "step 4/10  held-out loss 2  held-out acceptance length 1.50",
        "step 10/10  loss 1  held-out loss 2  held-out acceptance length 1.50 (step 4)",
        "step 10/10  loss 1  held-out loss 0.5  held-out acceptance length 2.00",
    ]
