# SPDX-License-Identifier: Apache-2.0
"""Where a run is, told from its files; and what rank 0 says while nothing happens."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from specdist.core.attempts import AttemptRecord, Ending, Failure, Started
from specdist.core.errors import ConfigError, DataError
from specdist.core.files import read_json, to_json
from specdist.core.launch_env import Attempt
from specdist.core.progress import AnswersProgress, Cursor, Progress
from specdist.core.stop import StopReason
from specdist.core.topology import Topology
from specdist.job.resume_plan import ResumePlan
from specdist.job.run_dir import RunDirectory
from specdist.prompts.schedule import Schedule
from specdist.run.status import Status, describe
from specdist.run.status_writer import StatusWriter
from specdist.scheduler.config import ControlConfig
from specdist.scheduler.messages import Statistics
from specdist.scheduler.peers import Peer, Peers, Phase

NOW = 1_000_000.0
SLOW = {"torch", "transformers", "numpy", "pyarrow", "huggingface_hub", "rich", "jinja2", "zmq", "psutil"}
ATTEMPT = Attempt("17", 1, deadline=NOW + 3600)
COUNTS = Statistics(elapsed_s=100.0, replicas=1, dispatched=9, delivered=7, released=5, computing=1, queued=1)
TOPOLOGY = Topology("split", ("a", "a", "b"), ((0,),), ((1,), (2,)), 2)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text("run: {dir: x}\n")
    (tmp_path / "checkpoints").mkdir()
    return tmp_path


def note_phase(peer: Peer, phase: str, since: float, step: int) -> None:
    peer.phase, peer.phase_since, peer.step = phase, since, step


def write(run_dir: Path, step_s: float = 2.0, **changes: object) -> AttemptRecord:
    record = AttemptRecord(ATTEMPT.directory(run_dir))
    record.begin(Started("slurm", ("a", "b"), 3, time=NOW - 100))
    settings: dict[str, object] = {
        "attempt": ATTEMPT.name, "deadline": ATTEMPT.deadline, "hosts": ("a", "a", "b"), "started": True,
        "step": 40, "total_steps": 100, "statistics": COUNTS,
        "phases": (Phase("draft", "training on item N", 2, 1, "a", 0.5),), "time": NOW - 3,
    }  # fmt: skip
    status = Status(**(settings | changes))  # type: ignore[arg-type]
    (run_dir / "status.json").write_text(json.dumps(asdict(status)))
    figures = {"loss": 1.5, "tokens_per_s": 4000.0, "step_s": step_s, "draft_wait": 0.3, "target_wait": 0.0}
    (run_dir / "metrics.jsonl").write_text(json.dumps({"step": 40, **figures}) + '\n{"step": 41, "lo')
    return record


def test_a_run_that_trains_tells_step_queues_bottleneck_and_time(run_dir: Path) -> None:
    write(run_dir)
    said = describe(run_dir, NOW)
    assert "training, attempt 17.1 on a, b; as of 3 s ago" in said
    assert "40 of 100 (40%), 2.00 s a step, 120 s to go".replace("120 s", "2 min") in said
    assert "the time limit is in 60 min" in said
    assert "saved and started again" not in said
    assert "dropped" not in said
    write(run_dir, dropped=3, trouble="step 40 could not be saved")
    assert "not saved   step 40 could not be saved" in describe(run_dir, NOW)
    assert "dropped     3 connections or messages that are not this run's" in describe(run_dir, NOW)
    assert "loss 1.5, 4,000 tokens/s" in said
    assert "the target side: target ranks waited 0% of the time for the draft, draft ranks 30% for the target" in said
    assert "1 queued and 1 computing at the targets, 2 before the draft" in said
    assert "2 draft ranks: training on item N (rank 1, 0 s)" in said
    assert "checkpoint  none yet" in said


def test_a_record_of_a_step_that_was_not_finite_is_told_as_well(run_dir: Path) -> None:
    write(run_dir)
    figures = {"loss": 1.25, "tokens_per_s": 5000.0, "step_s": 2.0, "draft_wait": 0.3, "target_wait": 0.0}
    line = json.dumps({"step": 41, "grad_norm": float("nan"), **figures})
    (run_dir / "metrics.jsonl").write_text(f"{line}\n")
    assert "loss 1.25, 5,000 tokens/s" in describe(run_dir, NOW)


def test_roles_that_share_their_ranks_wait_for_none(run_dir: Path) -> None:
    write(run_dir, statistics=Statistics())
    assert "bottleneck" not in describe(run_dir, NOW)


def test_a_draft_world_without_a_target_world_says_so(run_dir: Path) -> None:
    write(run_dir, statistics=Statistics(elapsed_s=100.0, slots=10))
    assert "no target replica is there" in describe(run_dir, NOW)


def test_a_run_longer_than_its_time_limit_says_so(run_dir: Path) -> None:
    write(run_dir, step_s=200.0)
    assert "it will be saved and started again" in describe(run_dir, NOW)


def test_the_end_of_an_attempt_outlives_its_status(run_dir: Path) -> None:
    write(run_dir).end(Ending("stopped", 44, StopReason("SIGUSR2"), " on rank 1"))
    said = describe(run_dir, NOW)
    assert said.startswith(f"{run_dir}: stopped at step 44 (SIGUSR2 on rank 1)")
    assert "queues" not in said


def test_a_failure_is_named(run_dir: Path) -> None:
    record = write(run_dir)
    record.fail(Failure("lost", "the connection to it is lost\nmore", 0, "target replica 0 tp 0", "a", 40))
    said = describe(run_dir, NOW)
    assert "failed in attempt 17.1: rank 0 (target replica 0 tp 0, host a): the connection to it is lost (see" in said


def test_silence_and_a_new_attempt_are_not_taken_for_training(run_dir: Path) -> None:
    write(run_dir, time=NOW - 300)
    assert "silent: was training, but rank 0 has written nothing for 5 min" in describe(run_dir, NOW)
    AttemptRecord(Attempt("17", 2).directory(run_dir)).begin(Started("slurm", ("a", "b"), 3, time=NOW - 1))
    said = describe(run_dir, NOW)
    assert "attempt 17.2 is starting: its ranks have not met yet" in said
    assert "before this one: 17.1 vanished" in said


def test_answers_in_the_making_are_told_until_something_else_happens(run_dir: Path) -> None:
    record = write(run_dir, time=NOW - 200)
    (run_dir / "answers").mkdir()
    progress = AnswersProgress(250, 1000, 4321.0, 1800.0, time=NOW - 5)
    (run_dir / "answers/progress.json").write_text(to_json(progress))
    said = describe(run_dir, NOW)
    assert said.startswith(f"{run_dir}: writing answers, attempt 17.1 on a, b; as of 5 s ago\n")
    assert "250 of 1,000 conversations (25%), 4,321 tokens/s, 30 min to go" in said
    assert "silent: was writing answers, but rank 0 has written nothing for 10 min" in describe(run_dir, NOW + 600)
    record.fail(Failure("lost", "the connection to it is lost", 0, "", "a", time=NOW))
    assert "failed in attempt 17.1" in describe(run_dir, NOW + 1)


def test_any_other_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no run directory"):
        describe(tmp_path)


def observer(run_dir: Path, told: threading.Event | None = None) -> StatusWriter:
    progress = Progress(10, 10, Cursor(0, 0), "prompts")
    resume = ResumePlan(progress, None, Schedule(10, 10, 100, 1))
    record, job = AttemptRecord(run_dir / "logs/17.1"), SimpleNamespace(control=ControlConfig())
    start = SimpleNamespace(attempt=ATTEMPT, told=told or threading.Event())
    context: Any = SimpleNamespace(run_dir=RunDirectory(run_dir), record=record, start=start, job=job)
    return StatusWriter(context, resume)


@pytest.mark.parametrize("text", [None, b"", b"none"])
def test_a_lost_or_damaged_draft_vocabulary_is_named_and_no_checkpoint_is_blamed(tmp_path: Path, text) -> None:
    run_dir = RunDirectory(tmp_path)
    assert run_dir.vocabulary(None, 9) is None
    run_dir.save_vocabulary(torch.tensor([1, 4]))
    (tmp_path / "usual").touch()
    (vocabulary,) = tmp_path.rglob("draft_vocabulary.safetensors")
    assert vocabulary.stat().st_mode == (tmp_path / "usual").stat().st_mode
    assert run_dir.vocabulary(2, 9).tolist() == [1, 4]  # type: ignore[union-attr]
    with pytest.raises(DataError, match="has 2 tokens: the draft has 9"):
        run_dir.vocabulary(None, 9)
    file = tmp_path / "draft_vocabulary.safetensors"
    file.unlink() if text is None else file.write_bytes(text)
    with pytest.raises(DataError, match=f"{file} (is missing, which means 9 tokens: the draft has 2|cannot be read)"):
        run_dir.vocabulary(2, 9)


def test_a_silent_start_says_what_the_ranks_do_less_and_less_often(run_dir: Path, capsys) -> None:
    watcher, peers = observer(run_dir), Peers(TOPOLOGY, 0.0)
    for rank in range(3):
        peers[rank].join(100 + rank)
        note_phase(peers[rank], "loading part 5" if rank == 0 else f"building the draft {rank}", 1.0, -1)
    told = []
    for second in range(0, 100, 5):
        watcher.pulse(peers, Statistics(), False, float(second))
        if words := capsys.readouterr().err:
            told.append((second, words))
    watcher.close()
    assert [second for second, _ in told] == [20, 40, 80]
    assert (
        "starting, 20 s: 1 target rank loading part 5 (rank 0 on a for 19 s); 2 draft ranks building the" in told[0][1]
    )
    status = read_json(run_dir / "status.json", Status)
    assert (status.step, status.total_steps, status.started, status.attempt) == (10, 100, False, "17.1")
    assert {(phase.what, phase.count) for phase in status.phases} == {
        ("loading part 5", 1),
        ("building the draft 1", 2),
    }
    assert status.stalled.startswith("95 s: rank 0 (target replica 0 tp 0, host a) silent for 95 s")


def test_a_stalled_rank_heads_the_status(run_dir: Path) -> None:
    watcher, peers = observer(run_dir), Peers(TOPOLOGY, 0.0)
    for rank in range(3):
        peers[rank].join(100 + rank)
    found = []
    for heard in (58.0, 30.0):
        peers[0].heard_at, peers[1].heard_at, peers[2].heard_at = 60.0, heard, 59.0
        for now in (0.0, 60.0):
            watcher.pulse(peers, Statistics(), True, now)
        watcher.close()
        watcher = observer(run_dir)
        found.append(read_json(run_dir / "status.json", Status).stalled)
    watcher.close()
    assert found == [
        "60 s: no step done, 1 target rank starting (rank 0 on a for 60 s)",
        "30 s: rank 1 (draft dp 0 cp 0, host a) silent for 30 s",
    ]
    write(run_dir, stalled=found[1])
    assert f"STALLED {found[1]}, attempt 17.1" in describe(run_dir, NOW)


def test_progress_ends_the_silence(run_dir: Path, capsys) -> None:
    watcher, peers = observer(run_dir), Peers(TOPOLOGY, 0.0)
    peers[1].join(101)
    for second in range(0, 60, 5):
        note_phase(peers[1], "training", float(second), 10 + second // 15)
        watcher.pulse(peers, Statistics(), True, float(second))
    assert capsys.readouterr().err == ""
    watcher.pulse(peers, Statistics(), True, 90.0)
    assert "no step done for" in capsys.readouterr().err
    watcher.close()
    assert read_json(run_dir / "status.json", Status).step == 13


def test_an_evaluation_is_no_silence(run_dir: Path, capsys) -> None:
    watcher, peers = observer(run_dir), Peers(TOPOLOGY, 0.0)
    peers[1].join(101)
    for second in range(0, 200, 5):
        note_phase(peers[1], "exporting and evaluating", 0.0, 100)
        watcher.pulse(peers, Statistics(), True, float(second))
    watcher.close()
    assert capsys.readouterr().err == ""


def test_the_first_failure_is_recorded_and_shown_once(run_dir: Path, capsys) -> None:
    told = threading.Event()
    watcher = observer(run_dir, told)
    watcher.failed(Failure("error", "first", 1, "draft dp 0 cp 0", "a", exception="KeyError", traceback="Traceback"))
    watcher.failed(Failure("error", "second", 2, "draft dp 1 cp 0", "b"))
    said = capsys.readouterr().err
    assert "KeyError: first" in said
    assert "second" not in said
    assert told.is_set()  # so that this rank does not tell it again where it cannot be recorded


@pytest.mark.parametrize(
    ("words", "said"),
    [("status {run_dir}", "{run_dir}: "), ("keys", "optimizer.lr = 0.0001"), ("train prompts.file=x", "unknown key")],
)
def test_it_answers_without_importing_what_is_slow(words: str, said: str, run_dir: Path) -> None:
    """Torch takes seconds from a cluster's file system; the list of keys and what is wrong with one need it no more."""
    program = (
        "import sys; from specdist_launch.cli import main; main(sys.argv[1:]); "
        f"print(sorted({SLOW} & {{name.partition('.')[0] for name in sys.modules}}))"
    )
    command = [sys.executable, "-c", program, *words.format(run_dir=run_dir).split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert said.format(run_dir=run_dir) in done.stdout + done.stderr
    assert done.stdout.endswith("[]\n"), done.stdout[-200:]


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    done = subprocess.run(f"{sys.executable} -m specdist_launch.cli keys | head -1", shell=True, capture_output=True)
    assert (done.stdout, done.stderr) == (b"# what most jobs set\n", b"")
