# SPDX-License-Identifier: Apache-2.0
"""What a submitit task does at signals and at the end of its agent, which here a few lines of shell play."""

from __future__ import annotations

import json
import math
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import submitit
from submitit.core.utils import DelayedSubmission, UncompletedJobError
from submitit.local.local import LOCAL_REQUEUE_RETURN_CODE, LocalJobEnvironment

from specdist.core.attempts import AttemptRecord, Failure
from specdist.core.launch_env import Attempt
from specdist_launch.agents import AgentProcess
from specdist_launch.submit import task
from specdist_launch.submit.task import Run, RunFailed, RunSummary, Task, read_summary

SUMMARY = {
    "step": 4, "total_steps": 4, "finished": True, "checkpoint": "run/checkpoints/step-00000004", "exports": [],
    "sides": {"draft_tokens_per_s": 100.0, "target_tokens_per_s": 200.0},
    "evaluation": {"before": {"acceptance_length": 1.0}, "after": {"acceptance_length": 2.5}},
}  # fmt: skip


def test_a_summary_as_it_is_read(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    found = read_summary(tmp_path)
    assert (found.step, found.acceptance_length, found.acceptance_length_before) == (4, 2.5, 1.0)
    assert (found.draft_tokens_per_s, found.target_tokens_per_s) == (100.0, 200.0)
    assert found.checkpoint == Path.cwd() / SUMMARY["checkpoint"]
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY | {"evaluation": None}))
    assert read_summary(tmp_path).acceptance_length is None
    (tmp_path / "summary.json").write_text(json.dumps({"mode": "target_only", "tokens_per_s": 7.0}))
    assert read_summary(tmp_path).target_tokens_per_s == 7.0


class ScriptedAgent(AgentProcess):
    """A shell script in the agent's place, which is sent signals themselves; it says in a file that it listens."""

    def __init__(self, script: str, ready: Path):
        super().__init__(["bash", "-c", f"{script}\n touch {ready}; while :; do sleep 0.02; done"])
        self._awaited = ready.with_name("awaited")

    def wait(self, timeout_s: float = math.inf) -> int | None:
        self._awaited.touch()
        return super().wait(timeout_s)

    def signal(self, number: int) -> None:
        self._process.send_signal(number)


class Bench:
    """A task in submitit's own harness for local jobs, in this process."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch):
        self.directory, self._monkeypatch = directory, monkeypatch
        self.starts: list[Attempt] = []
        self.run = Run(directory / "job.yaml", directory, "local", 5, Attempt("j"), ranks=1, retries=2)
        for name, value in {"EXECUTOR": "local", "LOCAL_JOB_ID": "7", "FOLDER": str(directory)}.items():
            monkeypatch.setenv(f"SUBMITIT_{name}", value)
        (directory / "summary.json").write_text(json.dumps(SUMMARY))

    def agent(self, *scripts: str) -> None:
        """What the agents of the next starts do."""
        left = list(scripts)

        def start(run: Run, attempt: Attempt) -> ScriptedAgent:
            self.starts.append(attempt)
            return ScriptedAgent(left.pop(0), self.directory / "ready")

        self._monkeypatch.setattr(Run, "agent", start)

    def submit(self, run: Run | None = None, minutes: int = 60, timeouts: int = 100) -> RunSummary | None:
        environment = LocalJobEnvironment()
        delayed = DelayedSubmission(Task(run or self.run))
        delayed.set_timeout(minutes, timeouts)
        environment._handle_signals(environment.paths, delayed)  # noqa: SLF001  as its process_job does
        return delayed.result()

    def pickled(self) -> Run:
        """The run that submitit starts next."""
        return pickle.loads((self.directory / "7_submitted.pkl").read_bytes()).function.run

    def soon(self, *signals: int) -> None:
        """Send signals to this process once the agent listens, and the task waits for it."""

        def send() -> None:
            while not all((self.directory / name).exists() for name in ("ready", "awaited")):
                time.sleep(0.01)
            for number in signals:
                os.kill(os.getpid(), number)
                time.sleep(0.1)
            (self.directory / "sent").touch()

        threading.Thread(target=send, daemon=True).start()


@pytest.fixture
def bench(tmp_path, monkeypatch):
    numbers = (signal.SIGTERM, signal.SIGCONT, signal.SIGUSR2)
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield Bench(tmp_path, monkeypatch)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def ends_with(status: int, call: Callable[[], object]) -> None:
    with pytest.raises(SystemExit) as left:
        call()
    assert left.value.code == status


def test_a_preempted_task_waits_for_the_agent_and_is_requeued(bench):
    bench.agent("trap 'sleep 0.3; touch saved; exit 75' USR2".replace("saved", str(bench.directory / "saved")))
    bench.soon(signal.SIGUSR2)
    ends_with(LOCAL_REQUEUE_RETURN_CODE, bench.submit)
    assert (bench.directory / "saved").exists()
    assert bench.pickled().attempt == Attempt("j", 1)


def test_signals_meanwhile_do_no_harm(bench, monkeypatch):
    def dump(value: object, file: Path) -> None:
        file.write_bytes(pickle.dumps(value))
        os.kill(os.getpid(), signal.SIGUSR2)  # a second pass of submitit's handler would find this file and give up

    monkeypatch.setattr("submitit.core.utils.cloudpickle_dump", dump)
    bench.agent(f"trap 'until [ -e {bench.directory}/sent ]; do sleep 0.02; done; exit 75' USR2; trap '' TERM")
    bench.soon(signal.SIGUSR2, signal.SIGUSR2, signal.SIGTERM)
    ends_with(LOCAL_REQUEUE_RETURN_CODE, bench.submit)
    assert bench.pickled().attempt == Attempt("j", 1)


def test_an_agent_that_does_not_end_is_left_behind(bench, monkeypatch, capsys):
    bench.agent("trap '' USR2")
    monkeypatch.setattr(bench, "run", Run(**{**vars(bench.run), "patience_s": 0.3}))
    bench.soon(signal.SIGUSR2)
    agents = []
    start = Run.agent
    monkeypatch.setattr(Run, "agent", lambda run, attempt: agents.append(start(run, attempt)) or agents[0])
    ends_with(LOCAL_REQUEUE_RETURN_CODE, bench.submit)
    agents[0].signal(signal.SIGKILL)
    assert "not saved and left within 0 s" in capsys.readouterr().err


def test_a_run_that_finishes_as_the_signal_comes_has_its_result(bench):
    bench.agent("trap 'exit 0' USR2")
    bench.soon(signal.SIGUSR2)
    found = bench.submit()
    assert found is not None
    assert found.acceptance_length == 2.5
    assert not (bench.directory / "7_submitted.pkl").exists()


def test_a_run_that_is_over_is_not_requeued(bench):
    bench.agent("exit 0")
    bench.submit()
    os.kill(os.getpid(), signal.SIGUSR2)  # while submitit writes the result


def test_an_agent_that_says_again_is_requeued_without_a_signal(bench):
    bench.agent("exit 75")
    ends_with(LOCAL_REQUEUE_RETURN_CODE, bench.submit)
    assert bench.pickled().attempt == Attempt("j", 1)


def test_an_agent_that_is_stopped_before_it_listens_has_not_failed(bench):
    bench.agent("kill -USR2 $$")
    ends_with(LOCAL_REQUEUE_RETURN_CODE, bench.submit)


def test_a_terminated_local_job_saves_and_stays_down(bench):
    bench.agent("trap 'exit 75' TERM")
    bench.soon(signal.SIGTERM)
    ends_with(75, bench.submit)
    assert not (bench.directory / "7_submitted.pkl").exists()


def test_a_signal_that_comes_while_the_agent_is_started_is_not_lost(bench, monkeypatch):
    bench.agent("trap 'exit 75' TERM")
    start = Run.agent

    def slowly(run: Run, attempt: Attempt) -> AgentProcess:
        agent = start(run, attempt)
        while not (bench.directory / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        return agent

    monkeypatch.setattr(Run, "agent", slowly)
    ends_with(75, bench.submit)


@pytest.mark.parametrize(("state", "status"), [("RUNNING", LOCAL_REQUEUE_RETURN_CODE), ("COMPLETING", 75)])
def test_slurm_requeues_by_itself_what_it_preempts(bench, monkeypatch, state, status):
    asked = []
    monkeypatch.setattr(task, "scontrol", lambda *words: asked.append(words) or f"JobId=9 JobState={state} X=1")
    slurm = {"JOB_ID": "9", "NODEID": "0", "ARRAY_JOB_ID": "8", "ARRAY_TASK_ID": "1", "RESTART_COUNT": "3"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    bench.agent("exit 75")
    ends_with(status, lambda: bench.submit(Run(bench.directory, bench.directory, "slurm", 5)))
    assert bench.starts == [Attempt("9", 3)]
    assert asked == [("show", "job", "8_1")]


def test_other_tasks_leave_requeueing_to_the_first(bench, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    monkeypatch.setenv("SLURM_NODEID", "1")
    run = Run(bench.directory, bench.directory, "slurm", 5)
    bench.agent("exit 0")
    assert bench.submit(run) is None
    bench.agent("exit 1")
    with pytest.raises(RunFailed, match="the agent of node 1 ended with status 1"):
        bench.submit(run)


def test_a_failure_is_the_first_failures_block(bench):
    failure = Failure("error", "it broke", rank=2, role="draft dp 1", host="n7", step=5)
    record = AttemptRecord(Attempt("j", 0).directory(bench.directory))
    record.fail(failure)
    bench.agent("exit 1")
    with pytest.raises(RunFailed) as failed:
        bench.submit()
    assert str(failed.value) == failure.render(record.failure_file)
    assert "rank 2 (draft dp 1, host n7): it broke" in str(failed.value)


def test_a_failure_without_a_record(bench):
    bench.agent("exit 2")
    with pytest.raises(RunFailed, match="ended with status 2; what it said is in the job's stderr"):
        bench.submit()


def test_submitits_own_limit_of_timeouts_is_heard(bench):
    bench.agent("trap 'exit 75' USR2")
    bench.soon(signal.SIGUSR2)
    with pytest.raises(UncompletedJobError, match="timed-out too many times"):
        bench.submit(minutes=5, timeouts=0)  # of ten minutes or less: each signal counts as a timeout


def test_the_debug_executor_starts_again_by_itself(bench):
    debug = Run(**{**vars(bench.run), "cluster": "debug"})
    bench.agent("exit 75", "exit 0")
    found = submitit.DebugExecutor(bench.directory).submit(Task(debug)).result()
    assert found.finished
    assert bench.starts == [Attempt("j", 0), Attempt("j", 1)]
    AttemptRecord(Attempt("j", 2).directory(bench.directory)).fail(Failure("error", "the third one"))
    bench.agent("exit 75", "exit 75", "exit 75")
    error = submitit.DebugExecutor(bench.directory).submit(Task(debug)).exception()
    assert "the third one" in str(error)


def test_ctrl_c_in_the_debug_executor_stops_the_run_first(bench):
    debug = Run(**{**vars(bench.run), "cluster": "debug"})
    bench.agent(f"trap 'sleep 0.2; touch {bench.directory}/saved; exit 75' TERM")
    bench.soon(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        Task(debug)()
    assert (bench.directory / "saved").exists()
