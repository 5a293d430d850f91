# SPDX-License-Identifier: Apache-2.0
"""What is kept of every start of a job, and what is made of it."""

from __future__ import annotations

import errno
import io
import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from specdist.core.attempts import AttemptRecord, Ending, Failure, Started, attempts
from specdist.core.errors import ConfigError, DataError, WorldError
from specdist.core.files import write_atomically
from specdist.core.launch_env import Attempt
from specdist.core.stop import StopReason
from specdist.job.launch_config import LaunchConfig
from specdist_launch import verdict
from specdist_launch.verdict import AGAIN, DONE, GIVE_UP, USER_ERROR, judge

CONFIG = LaunchConfig(retries=2)
ERROR = Failure("error", "index out of range", 3, "draft dp 1 cp 0", "b", 40, "training", "IndexError", "Traceback ...")
FULL = OSError(errno.ENOSPC, "No space left on device")
LOST = Failure("lost", "the connection to it is lost", 0, "target replica 0 tp 0", "a", 40)


class History:
    """Attempts of a run, written one after the other."""

    def __init__(self, run_dir: Path):
        self.run_dir, self.restart = run_dir, -1

    def add(self, end: Ending | Failure | None, step: int = 0) -> History:
        self.restart += 1
        record = AttemptRecord(Attempt("17", self.restart).directory(self.run_dir))
        record.begin(Started("slurm", ("a", "b"), 4, step, time=float(self.restart)))
        if isinstance(end, Ending):
            record.end(end)
        elif end is not None:
            record.fail(end)
        return self

    def verdict(self) -> tuple[int, str]:
        found = judge(self.run_dir, CONFIG)
        return found.status, found.reason


def test_records_come_back_as_they_were_and_in_order(tmp_path: Path) -> None:
    history = History(tmp_path).add(LOST).add(None, step=10).add(Ending("finished", 50), step=10)
    records = attempts(tmp_path)
    assert [record.name for record in records] == ["17.0", "17.1", "17.2"]
    assert records[0].failure() == LOST
    assert (records[1].failure(), records[1].ending()) == (None, None)
    ending, started = records[2].ending(), records[2].started()
    assert ending is not None
    assert started is not None
    assert (ending.state, ending.step, started.hosts, started.step) == ("finished", 50, ("a", "b"), 10)
    assert history.verdict() == (DONE, "finished at step 50")


@pytest.mark.parametrize(
    ("text", "reason", "detail"),
    [
        ("", None, ""),
        ("SIGTERM", StopReason.TERMINATE, ""),
        ("SIGUSR2 on rank 3", StopReason.USER2, " on rank 3"),
        ("the end of the time limit, during the evaluation", StopReason.TIME_LIMIT, ", during the evaluation"),
    ],
)
def test_the_outcome_that_version_0_1_wrote_is_read(
    tmp_path: Path, text: str, reason: StopReason | None, detail: str
) -> None:
    record = AttemptRecord(tmp_path / "17.0")
    record.begin(Started("slurm", ("a",), 4))
    written = {"state": "stopped" if text else "finished", "step": 7, "reason": text, "time": 1.5}
    (record.directory / "outcome.json").write_text(json.dumps(written))
    ending = record.ending()
    assert ending == Ending("stopped" if text else "finished", 7, reason, detail, 1.5)
    assert ending.why == text
    record.end(ending)
    assert record.ending() == ending


def test_what_killed_ranks_had_begun_to_write_is_removed(tmp_path: Path) -> None:
    record = AttemptRecord(tmp_path / "17.0")
    record.end(Ending("finished", 50))
    (record.directory / "start-up").mkdir()
    for name in ("outcome.json.tmp", "start-up/rank-1.json.tmp", "start-up/rank-0.json"):
        (record.directory / name).touch()
    record.clear()
    left = sorted(str(path.relative_to(record.directory)) for path in record.directory.rglob("*") if path.is_file())
    assert left == ["outcome.json", "start-up/rank-0.json"]


def test_only_the_first_failure_is_kept_whoever_writes_at_once(tmp_path: Path) -> None:
    record, first = AttemptRecord(tmp_path / "17.0"), []
    together = threading.Barrier(8)

    def write(rank: int) -> None:
        together.wait()
        if record.fail(replace(ERROR, rank=rank, host=f"h{rank}")):
            first.append(rank)

    threads = [threading.Thread(target=write, args=(rank,)) for rank in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(first) == 1
    kept = record.failure()
    assert kept is not None
    assert kept.rank == first[0]
    assert [path.name for path in record.directory.iterdir()] == ["failure.json"]


@pytest.mark.parametrize(
    ("end", "status", "words"),
    [
        (Ending("finished", 50), DONE, "finished at step 50"),
        (Ending("stopped", 30, StopReason("SIGUSR2"), " on rank 1"), AGAIN, "stopped at step 30 (SIGUSR2 on rank 1)"),
        (Ending("stopped", 30, StopReason.TIME_LIMIT), AGAIN, "the end of the time limit"),
        (Ending("stopped", 30, StopReason("SIGINT"), " on rank 0"), DONE, "by Ctrl-C"),
        (Failure("input", "unknown key 'x'"), USER_ERROR, "not started again: unknown key"),
        (ERROR, AGAIN, "try 1 of 2 (kind: error)"),
        (LOST, AGAIN, "try 1 of 2 (kind: lost)"),
        (None, AGAIN, "it vanished"),
        (
            Failure.of(FULL),
            GIVE_UP,
            "not started again before there is room",
        ),
    ],
)
def test_what_an_attempt_left_behind_is_told_apart(tmp_path: Path, end, status: int, words: str) -> None:
    found, said = History(tmp_path).add(end).verdict()
    assert found == status
    assert words in said


def test_a_failure_is_told_where_it_cannot_be_kept_and_the_job_is_not_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history, terminal = History(tmp_path).add(None), io.StringIO()
    record = attempts(tmp_path)[0]
    with monkeypatch.context() as patch:
        patch.setattr("specdist.core.attempts._LATER_S", 0)
        patch.setattr(Path, "write_text", lambda path, text: (_ for _ in ()).throw(FULL))
        record.tell(ERROR, terminal)
    said = terminal.getvalue()
    assert "rank 3 (draft dp 1 cp 0, host b): IndexError: index out of range" in said
    assert "failure.json; which cannot be written: [Errno 28] No space left on device" in said
    monkeypatch.setattr(verdict, "unwritable", lambda directory: FULL)
    assert history.verdict()[0] == GIVE_UP
    for _ in range(2):  # there is room again: shown once, and kept
        record.tell(ERROR, terminal)
    assert terminal.getvalue().count("index out of range") == 2
    assert record.failure() == ERROR


def test_the_same_error_at_the_same_step_is_not_tried_again(tmp_path: Path) -> None:
    assert History(tmp_path / "same").add(ERROR).add(ERROR).verdict()[0] == GIVE_UP
    assert "the same error at the same step" in History(tmp_path / "words").add(ERROR).add(ERROR).verdict()[1]
    later, other = replace(ERROR, step=41), replace(ERROR, exception="KeyError")
    assert History(tmp_path / "later").add(ERROR).add(later).verdict()[0] == AGAIN
    assert History(tmp_path / "other").add(ERROR).add(other).verdict()[0] == AGAIN
    assert History(tmp_path / "lost").add(LOST).add(LOST).verdict()[0] == AGAIN  # a host may well be lost twice


def test_retries_are_bounded_but_progress_counts_anew_and_preemptions_not_at_all(tmp_path: Path) -> None:
    assert History(tmp_path / "bounded").add(LOST).add(LOST).add(LOST).verdict()[0] == GIVE_UP
    progress = History(tmp_path / "progress").add(LOST).add(LOST).add(LOST, step=10)
    assert progress.verdict() == (
        AGAIN,
        "another start may help, try 1 of 2 (kind: lost): the connection to it is lost",
    )
    stop = Ending("stopped", 0, StopReason("SIGTERM"), " on rank 0")
    preempted = History(tmp_path / "preempted").add(LOST).add(stop).add(stop).add(LOST)
    assert "try 2 of 2" in preempted.verdict()[1]
    assert preempted.add(stop).add(LOST).verdict()[0] == GIVE_UP


def test_a_time_limit_that_is_too_short_is_not_tried_for_ever(tmp_path: Path) -> None:
    early, late = (
        Ending("stopped", 30, StopReason("SIGUSR2"), " on rank 0"),
        Ending("stopped", 30, StopReason.TIME_LIMIT),
    )
    history = History(tmp_path / "short").add(early, step=30).add(late, step=30)
    assert history.verdict()[0] == AGAIN
    status, said = history.add(early, step=30).verdict()
    assert (status, "3 times in a row before a step was done (now 30)" in said) == (GIVE_UP, True), said
    (tmp_path / "short/answers").mkdir()
    (tmp_path / "short/answers/part-1.jsonl").touch()  # the target was writing answers
    assert history.verdict()[0] == AGAIN
    progress = (
        History(tmp_path / "progress").add(late, step=30).add(late, step=20).add(late, step=30).add(late, step=30)
    )
    assert progress.verdict()[0] == AGAIN
    preempted = Ending("stopped", 30, StopReason("SIGTERM"), " on rank 0")
    assert (
        History(tmp_path / "busy").add(preempted, step=30).add(preempted, step=30).add(late, step=30).verdict()[0]
        == AGAIN
    )


def test_who_was_stopped_before_it_could_say_so_has_not_failed(tmp_path: Path) -> None:
    for failure, status in ((LOST, AGAIN), (ERROR, GIVE_UP)):
        history = History(tmp_path / failure.kind)
        for _ in range(4):
            history.add(failure)
            attempts(history.run_dir)[-1].end(Ending("stopped", 0, StopReason("SIGTERM")))
        assert history.verdict()[0] == status


def test_a_job_that_left_nothing_failed_before_its_ranks(tmp_path: Path) -> None:
    assert judge(tmp_path, CONFIG).status == GIVE_UP


def raised(error: BaseException) -> BaseException:
    with pytest.raises(type(error)) as caught:
        raise error
    return caught.value


def test_failures_are_classed_by_their_exceptions() -> None:
    defect = Failure.of(raised(KeyError("no_such")), 2, "b")
    assert (defect.kind, defect.rank, defect.exception) == ("error", 2, "KeyError")
    assert 'raised(KeyError("no_such"))' not in defect.traceback
    assert "raise error" in defect.traceback
    assert Failure.of(raised(torch.AcceleratorError("CUDA error: an illegal access", 700)), 2, "b").kind == "device"
    wrong = Failure.of(raised(ConfigError("draft.dp is at least 1")), 2, "b")
    assert (wrong.kind, wrong.traceback) == ("input", "")
    gone = Failure.of(raised(WorldError("rank 0 is gone", culprit=0)), 2, "b")
    assert (gone.kind, gone.rank, gone.host) == ("lost", 0, "")
    apart = Failure.of(raised(WorldError("3 ranks missing")), 2, "b")
    assert (apart.kind, apart.rank) == ("world", -1)


def test_the_block_on_the_terminal_names_who_when_and_what(tmp_path: Path) -> None:
    block = ERROR.render(tmp_path / "failure.json").splitlines()
    assert block[0] == "specdist: rank 3 (draft dp 1 cp 0, host b): IndexError: index out of range"
    assert "  step     40" in block
    assert "  doing    training" in block
    assert "  Traceback ..." in block
    assert str(tmp_path / "failure.json") in block[-2]
    assert block[-1] == "  see      docs/troubleshooting.md#defect"
    assert Failure("world", "3 ranks missing").render(tmp_path).startswith("specdist: 3 ranks missing\n")
    lost_host = Failure("lost", "exited without an error message", host="n2").render(tmp_path)
    assert lost_host.startswith("specdist: host n2: exited without an error message\n")


def test_attempts_of_one_job_have_directories_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_JOB_END_TIME", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    attempt = Attempt("17", 2, 1234.5)
    for name, value in attempt.environment().items():
        monkeypatch.setenv(name, value)
    assert Attempt.from_environment() == attempt
    assert attempt.directory(tmp_path) == tmp_path / "logs/17.2"
    for name in attempt.environment():
        monkeypatch.delenv(name)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # torchrun's default, which all runs share
    assert Attempt.from_environment().job.startswith("pid")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "abc")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert Attempt.from_environment() == Attempt("abc", 1)


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    record = AttemptRecord(tmp_path / "logs/7.0")
    record.begin(Started("torchrun", ("n1",), 2, 0))
    for text in ('{"state": "asleep", "step": 3}', '["stopped"]', '{"sta'):
        (record.directory / "outcome.json").write_text(text)
        with pytest.raises(DataError, match=r"7\.0/outcome\.json: not what specdist writes there"):
            record.ending()


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "outcome.json", "{}")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_whatever_a_library_makes_of_it() -> None:
    """torch's compiler raises an error of its own `from None`."""

    def compile_something() -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError(f"while compiling: {error}") from None

    with pytest.raises(RuntimeError) as caught:
        compile_something()
    assert Failure.of(caught.value).kind == "disk"
    assert Failure.of(RuntimeError("a defect")).kind == "error"


def test_starts_stand_in_their_order_though_the_clock_was_set_back(tmp_path: Path) -> None:
    records = [AttemptRecord(Attempt("7", restart).directory(tmp_path)) for restart in range(3)]
    for record, moment in zip(records, (1000.0, 900.0, 950.0), strict=True):
        record.begin(Started("local", ("a",), 2, time=moment))
    assert attempts(tmp_path) == records
    records[2].begin(Started("local", ("a",), 2, time=800.0))
    assert attempts(tmp_path) == records


_STUCK = """
import signal, subprocess, sys, time
from pathlib import Path
import psutil
from specdist.core.attempts import AttemptRecord, Failure
from specdist_launch import stuck as module

module._LOOK_S, module.STOPPED_LOOKS, module.PATIENCE_S, record = 0.1, 8, 1, AttemptRecord(Path(sys.argv[1]))
stuck = "import faulthandler, signal, time; faulthandler.register(signal.SIGQUIT); print(flush=True); time.sleep(99)"
log = record.directory / "target/h2-rank1.log"
log.parent.mkdir(parents=True)

def start():
    child = psutil.Popen([sys.executable, "-c", stuck], stdout=subprocess.PIPE, stderr=log.open("w"))
    child.stdout.readline()
    return child

def send(number, *processes):
    for process in processes:
        process.send_signal(number)
        while (process.status() == psutil.STATUS_STOPPED) != (number == signal.SIGSTOP):
            time.sleep(0.01)

def looks():  # what happens before each of them
    for number in (signal.SIGSTOP, signal.SIGCONT) * 3:  # never for long
        send(number, waiting)
        yield from range(3)
    for number in (signal.SIGSTOP, signal.SIGCONT):  # both for long: the job is suspended
        send(number, waiting, stopped)
        yield from range(12)
    found.append((waiting.poll(), stopped.poll(), set(killed)))
    send(signal.SIGSTOP, stopped)
    while stopped.poll() is None:
        yield
    found.append((waiting.poll(), stopped.poll(), set(killed)))

def running():
    next(story, None) if ranks else None
    return {rank: process for rank, process in ranks.items() if process.poll() is None}

ranks, found, story = {}, [], looks()
with module.ending_stuck_ranks(running, record, "h2", record.fail) as killed:
    waiting, stopped = start(), start()
    ranks |= {1: waiting, 2: stopped}
    assert waiting.wait(60) == -signal.SIGKILL
    assert killed == {1, 2}
    assert found == [(None, None, set()), (None, -signal.SIGKILL, {2})]
record.add_stacks()
"""


def test_a_rank_that_a_signal_has_stopped_is_named_and_who_outlives_the_failure_shows_where_it_is(
    tmp_path: Path,
) -> None:
    """Both are killed."""
    done = subprocess.run([sys.executable, "-c", _STUCK, tmp_path], check=True, timeout=120, stderr=subprocess.PIPE)
    assert done.stderr.decode() == "specdist: all ranks on h2 are stopped, and go on with SIGCONT\n"
    failure = AttemptRecord(tmp_path).failure()
    assert failure is not None
    assert (failure.kind, failure.place) == ("lost", "rank 2 (host h2)")
    assert failure.message.startswith("stopped by a signal, and it did not go on for 1 s: Ctrl-Z suspends a job whole")
    assert list(failure.stacks) == ["target/h2-rank1"]
    assert failure.stacks["target/h2-rank1"].startswith("Current thread 0x")
    assert 'File "<string>", line 1 in <module>' in failure.stacks["target/h2-rank1"]


def test_agents_of_many_nodes_add_stacks_at_once_and_the_record_is_whole_at_any_time(tmp_path: Path) -> None:
    record, over = AttemptRecord(tmp_path), threading.Event()
    (tmp_path / "draft").mkdir()
    (tmp_path / "draft/n1-rank0.log").write_text("Current thread 0x1 (most recent call first):\n  File\n" * 50)
    record.add_stacks()  # without a failure there is nothing to add to
    record.fail(Failure("lost", "silent", rank=1))

    def add() -> None:
        while not over.is_set():
            record.add_stacks()

    agents = [threading.Thread(target=add) for _ in range(3)]
    for agent in agents:
        agent.start()
    try:
        for _ in range(8000):
            failure = record.failure()
            assert failure is not None
            assert failure.message == "silent"
    finally:
        over.set()
        for agent in agents:
            agent.join()
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["failure.json"]
    (tmp_path / "draft/n1-rank2.log").symlink_to("moved away")
    record.add_stacks()
    assert record.failure() is not None
